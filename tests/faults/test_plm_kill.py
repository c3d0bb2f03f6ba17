"""Pretraining with a memory that is killed in a step or in a save, and started again, also on other ranks."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from support import ENVIRONMENT, distlm, mpirun_command
from support.deadline import DEADLINE_S, until
from support.plm import memory_of, plm_settings, tiny_shards
from support.train import curve, newest, relative, same_end, train_all

pytestmark = pytest.mark.multiprocess

LONG = ["memory.kind=resm", "train.updates=40", "train.save_every=4", "train.keep_last=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the undisturbed run `whole` of two ranks."""
    folder = tmp_path_factory.mktemp("plm-kill")
    shards = tiny_shards(folder)
    train_all(2, folder, [plm_settings(shards, folder / "whole", *LONG)])
    return folder


def kill(overrides: list[str], run: Path, save: bool, seed: int) -> None:
    """Start two ranks and kill one: after some update, or when a save has written the first file of a memory."""
    process = subprocess.Popen(
        mpirun_command(2, ["-m", "distlm", "train", "plm-base", *overrides]),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    update = random.Random(seed).randrange(6, 30)
    record = run / "metrics.jsonl"

    def reached() -> bool:
        there = record.exists() and f'"step": {update},' in record.read_text("utf-8")
        return there and (not save or any((run / "checkpoints").glob(".step-*.tmp/memory-*")))

    until(reached, f"update {update}", lambda: process.poll() is None, pause=0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    ranks = [int(pid) for pid in children if b"distlm" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait(DEADLINE_S) != 0


@pytest.mark.parametrize(
    ("save", "ranks", "seed"),
    [pytest.param(False, 2, 1, id="step", marks=pytest.mark.slow), pytest.param(True, 1, 2, id="save")],
)
def test_killed_and_started_again(folder: Path, tmp_path: Path, save: bool, ranks: int, seed: int) -> None:
    """On as many ranks the same bytes, memory included; on another number the same curve and rounding apart."""
    overrides, run, whole = plm_settings(folder / "shards", tmp_path / "run", *LONG), tmp_path / "run", folder / "whole"
    kill(overrides, run, save, seed)
    # The worst place: a memory's file is there, the marker is not.
    shutil.copytree(newest(run), run / "checkpoints" / "step-00000039")
    (run / "checkpoints" / "step-00000039" / "complete.json").unlink()
    done = distlm("train", "plm-base", *overrides, ranks=ranks)
    assert "continuing from" in done.stderr
    assert curve(whole, "train/data_fingerprint") == curve(run, "train/data_fingerprint")
    if ranks == 2:
        assert same_end(whole, run) and curve(whole) == curve(run)
    assert relative(curve(whole), curve(run)) < 1e-4
    for layer in (1, 3):
        one, other = memory_of(whole, layer), memory_of(run, layer)
        for name, tensor in one.items():
            if ranks == 2:
                assert torch.equal(tensor, other[name]), name
            assert (tensor.double() - other[name].double()).abs().max() <= 1e-3 * tensor.double().abs().max(), name
