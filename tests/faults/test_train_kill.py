"""Training that is killed or stopped at any moment and started again ends in the bytes of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import ENVIRONMENT, distlm, mpirun_command
from support.deadline import DEADLINE_S, until
from support.foreign.trackers import scalars, wandb_curve, wandb_file, wandb_rows
from support.train import curve, newest, relative, same_end, settings, tiny_tokens, train_all, weight_difference

pytestmark = pytest.mark.multiprocess

LONG = ["train.updates=30", "train.save_every=7", "train.valid_every=20", "train.keep_last=3"]


ELASTIC = {"2-to-1": ((2, "zero1"), (1, "zero3")), "1-to-2": ((1, "zero3"), (2, "zero1"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, the undisturbed runs zero1-1, zero1-2 and zero3-2, and the first halves 2-to-1 and 1-to-2."""
    folder = tmp_path_factory.mktemp("kill")
    tokens = tiny_tokens(folder)

    def job(name: str, zero: str, *extra: str) -> list[str]:
        return settings(tokens, folder / name, *LONG, f"train.deepspeed={zero}", *extra)

    half = "train.max_updates_this_run=17"
    train_all(1, folder, [job("zero1-1", "zero1"), job("1-to-2", "zero3", half)])
    train_all(2, folder, [job("zero1-2", "zero1"), job("2-to-1", "zero1", half), job("zero3-2", "zero3")])
    return folder


def start(ranks: int, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`distlm train` in the background, in a process group of its own."""
    return subprocess.Popen(
        mpirun_command(ranks, ["-m", "distlm", "train", "demo", *overrides]),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=log.open("wb"), start_new_session=True,
    )  # fmt: skip


def wait_for_update(run: Path, update: int, process: subprocess.Popen[bytes]) -> None:
    path = run / "metrics.jsonl"
    until(
        lambda: path.exists() and f'"step": {update},' in path.read_text("utf-8"),
        f"update {update}", lambda: process.poll() is None,
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the Python ranks below an mpirun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text("utf-8").split()
    return [int(pid) for pid in children if b"distlm" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def assert_gone(pid: int) -> None:
    """mpirun ends the other ranks; a rank that lived on would write beside the next start."""
    until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of rank {pid}")


def leave_halves(checkpoints: Path) -> None:
    """What saves leave that are killed in the worst places: newer than any whole checkpoint, and with a marker."""
    shutil.copytree(newest(checkpoints.parent), checkpoints / "step-00000028")
    shutil.copytree(checkpoints / "step-00000028", checkpoints / ".step-00000029.tmp")
    (checkpoints / "step-00000028" / "complete.json").unlink()
    (checkpoints / ".best.json.1.tmp").write_text("{", "utf-8")


@pytest.mark.parametrize(("ranks", "seed"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 3)])
def test_killed_run_ends_in_the_same_bytes(folder: Path, tmp_path: Path, ranks: int, seed: int) -> None:
    overrides = settings(folder / "tokens", tmp_path / "run", *LONG, "train.trackers=[tensorboard,wandb]")
    process = start(ranks, overrides, tmp_path / "log")
    wait_for_update(tmp_path / "run", random.Random(seed).randrange(9, 26), process)
    pids = ranks_of(process) if ranks > 1 else [process.pid]
    os.kill(pids[-1], signal.SIGKILL)
    assert process.wait(DEADLINE_S) != 0
    for pid in pids:
        assert_gone(pid)
    leave_halves(tmp_path / "run" / "checkpoints")
    done = distlm("train", "demo", *overrides, ranks=ranks)
    assert "continuing from" in done.stderr
    assert same_end(folder / f"zero1-{ranks}", tmp_path / "run")
    assert curve(folder / f"zero1-{ranks}") == curve(tmp_path / "run")
    assert curve(folder / f"zero1-{ranks}", "valid/loss") == curve(tmp_path / "run", "valid/loss")
    kept = [{path.name for path in (run / "checkpoints").iterdir()} for run in (folder / "zero1-1", tmp_path / "run")]
    assert kept[0] == kept[1]
    board, rows = scalars(tmp_path / "run" / "tensorboard" / "train"), wandb_rows(wandb_file(tmp_path / "run"))
    for name in ("train/loss", "valid/loss"):
        undisturbed = list(curve(folder / f"zero1-{ranks}", name).items())
        assert wandb_curve(rows, name) == undisturbed
        assert board[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in undisturbed]


def test_signal_to_one_rank_stops_all_with_75(folder: Path, tmp_path: Path) -> None:
    overrides = settings(folder / "tokens", tmp_path / "run", *LONG)
    process = start(2, overrides, tmp_path / "log")
    wait_for_update(tmp_path / "run", 9, process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    assert process.wait(DEADLINE_S) == 75, (tmp_path / "log").read_text("utf-8")
    stopped_at = int(newest(tmp_path / "run").name[5:])
    assert 9 <= stopped_at < 30
    assert f"stopped after update {stopped_at}" in (tmp_path / "log").read_text("utf-8")
    distlm("train", "demo", *overrides, ranks=2)
    assert same_end(folder / "zero1-2", tmp_path / "run")


@pytest.mark.parametrize("name", ["2-to-1", pytest.param("1-to-2", marks=pytest.mark.slow)])
def test_resume_on_other_ranks_and_stage_keeps_the_data(folder: Path, name: str) -> None:
    """Loss curves agree to rounding, which they could not if one block came in another update."""
    (before, _), (ranks, zero) = ELASTIC[name]
    assert newest(folder / name).name == "step-00000017"
    overrides = settings(folder / "tokens", folder / name, *LONG, f"train.deepspeed={zero}")
    done = distlm("train", "demo", *overrides, ranks=ranks)
    assert f"saved on {before} ranks" in done.stderr
    assert relative(curve(folder / "zero3-2"), curve(folder / name)) < 1e-6
    assert weight_difference(folder / "zero3-2", folder / name) < 1e-5


PRECISIONS = [
    ("bf16", "zero0"), ("bf16", "zero1"), ("bf16", "zero3"),
    ("fp16", "zero1"), ("fp16", "zero2"), ("fp16", "zero3"), ("fp32", "zero0"),
]  # fmt: skip


@pytest.mark.slow
def test_every_precision_and_stage_resumes_bit_exactly(folder: Path, tmp_path: Path) -> None:
    jobs = []
    for precision, zero in PRECISIONS:
        extra = [
            f"train.precision={precision}", f"train.deepspeed={zero}", "train.updates=4", "train.save_every=0",
            "train.valid_every=0", "train.optimizer=nag", "train.lr=0.05", "train.weight_decay=0.01",
        ]  # fmt: skip
        for name, limit in (("whole", 0), ("part", 2), ("part", 0)):
            run = tmp_path / f"{precision}-{zero}-{name}"
            jobs.append(settings(folder / "tokens", run, *extra, f"train.max_updates_this_run={limit}"))
    results = train_all(2, tmp_path, jobs)
    for number, (precision, zero) in enumerate(PRECISIONS):
        assert ["stopped" in result for result in results[3 * number : 3 * number + 3]] == [False, True, False]
        whole, part = (tmp_path / f"{precision}-{zero}-{name}" for name in ("whole", "part"))
        assert same_end(whole, part), f"{precision} {zero}"
        assert curve(whole) == curve(part)
        # The masters are stored, not their half-precision copies.
        weights = load_file(newest(whole) / "model.safetensors")["layers.0.fc1.weight"]
        assert precision == "fp32" or not weights.equal(weights.half().float())
