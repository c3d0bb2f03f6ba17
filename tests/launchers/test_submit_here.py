"""submitit's local and debug executors run the whole graph on this machine: one rank and two end in the same results.

Both trainings are stopped on the way: the local one by a signal to one of its ranks, after which it goes on by itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT, TINY, write_text
from support.deadline import DEADLINE_S, until
from support.finetune import write_sst2
from support.kinds import readable
from support.plm import PLM

from distlm.runtime.rundir import RunDir

pytestmark = pytest.mark.multiprocess

WORLD = re.compile(r"launchers: train: (rank \d+ of \d+ on \S+ \(from \w+\))")


def settings(text, run, *more):
    return [*TINY, "train.updates=60", "train.valid_every=30", "train.save_every=0", "data.source=folder",
            f"data.text_dir={text}", f"run_dir={run}", *more]  # fmt: skip


def start(folder, *words, recipe="demo"):
    command = [sys.executable, "-m", "launchers.submit", recipe, *words]
    return subprocess.Popen(
        command, cwd=folder, env={**ENVIRONMENT, "HOME": str(folder)}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_takes_ctrl_c,
    )  # fmt: skip


def _takes_ctrl_c():
    """Also where these tests run in the background of a shell, which has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until_an_update(run, running):
    until(
        lambda: any("train/loss" in line for line in lines(run / "metrics.jsonl")),
        lambda: f"an update\n{finish(running)}", lambda: running.poll() is None,
    )  # fmt: skip


def finish(process):
    said = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0, said
    return said


def results(run):
    found = json.loads((run / "results.json").read_text("utf-8"))
    # Where it lay, how long it took, and which copy of the code it was.
    del found["model"]["checkpoint"], found["seconds"], found["code"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write_text(folder / "text", train_lines=300)
    return folder


@pytest.fixture(scope="module")
def debug(folder):
    """The results of the debug executor: one rank, in the process that submits."""
    run = folder / "debug"
    words = [*settings(folder / "text", run), "--cluster=debug"]
    stopped = start(folder, *words, "train.max_updates_this_run=20")
    said = stopped.communicate(timeout=DEADLINE_S)[0]
    assert stopped.returncode == 75 and "stopped after update 20" in said
    said = finish(start(folder, *words))
    (world,) = WORLD.findall(said)
    assert re.fullmatch(r"rank 0 of 1 on \S+ \(from single\)", world)
    return results(run)


@pytest.mark.slow
def test_local_on_two_ranks_stopped_once_and_an_array(folder, debug):
    run = folder / "local"
    running = start(folder, *settings(folder / "text", run), "--cluster=local", "--ranks=2", "--array=2")
    until_an_update(run, running)
    (rank,) = run.glob(".alive/*/rank-00001.json")
    os.kill(json.loads(rank.read_text("utf-8"))["pid"], signal.SIGUSR1)
    said = finish(running)
    logs: dict[str, list[str]] = {}
    for name, log in re.findall(r"^(\S+): \d rank\(s\), process \d+; log (\S+)$", said, re.MULTILINE):
        logs.setdefault(name, []).append(Path(log).read_text("utf-8"))
    assert [len(logs[name]) for name in ("train", "datastore-shares", "datastore", "index-add-shares")] == [1, 2, 1, 2]
    (train,) = logs["train"]
    assert train.count("train: continuing from") == 1 and "requeue: submitit owns it" in train
    assert [world.partition(" on ")[0] for world in WORLD.findall(train)] == ["rank 0 of 2"] * 2
    assert f"report: {run / 'report.html'}" in said
    found = results(run)
    for split, expected in debug["splits"].items():
        # One rank sums the gradients in another order than two, and tuning may then choose its neighbour in the grid.
        for model, tolerance in (("lm", 1e-3), ("knn", 1e-2)):
            wanted = pytest.approx(expected[model]["perplexity"], rel=tolerance)
            assert found["splits"][split][model]["perplexity"] == wanted


def test_a_stop_of_the_command_is_handed_on_to_the_ranks_which_save(folder):
    """One Ctrl-C: the terminal sends it to all that run in it."""
    run = folder / "stopped"
    alone = ("--cluster=local", "--ranks=1", "--stages=prepare,train")
    words = [*settings(folder / "text", run, "train.updates=5000"), *alone]
    running = start(folder, *words)
    until_an_update(run, running)
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=DEADLINE_S)[0]
    assert running.returncode == 75, said
    assert said.endswith("launchers.submit: train: stopped; run the same command again to continue\n")
    assert RunDir(run).complete_checkpoints(), "it saved"
    (log,) = re.findall(r"^train: .* log (\S+)$", said, re.MULTILINE)
    text = Path(log).read_text("utf-8")
    assert len(WORLD.findall(text)) == 1 and "stopped after update" in text, "and was not started again"


def test_a_second_ctrl_c_ends_the_ranks_at_once(folder):
    run = folder / "ended"
    words = [
        *settings(folder / "text", run, "train.updates=5000"),
        "--cluster=local",
        "--ranks=1",
        "--stages=prepare,train",
    ]
    running = start(folder, *words)
    until_an_update(run, running)
    ranks = psutil.Process(running.pid).children(recursive=True)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        # Two signals that wait at once are one; the ranks are told every tenth of a second.
        time.sleep(0.05)
    said = running.communicate(timeout=DEADLINE_S)[0]
    assert running.returncode == 130, said
    assert not psutil.wait_procs(ranks, timeout=DEADLINE_S)[1] and not RunDir(run).complete_checkpoints()


def test_a_failing_stage_ends_the_run_and_shows_why(folder):
    """Of what cannot be seen before it runs; a missing text is refused at once (test_submit.py)."""
    run = folder / "broken"
    run.mkdir()
    (run / "tokens").write_text("in the way", "utf-8")
    broken = start(folder, *settings(folder / "text", run), "--cluster=local", "--ranks=1")
    said = broken.communicate(timeout=DEADLINE_S)[0]
    assert (
        broken.returncode == 1
        and "stage prepare failed; " in said
        and "Traceback" not in said
        and f"{run}/tokens" in said
    )
    assert not (run / "checkpoints").exists()


def lines(path):
    return path.read_text("utf-8").splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_masked_language_model_up_to_its_tasks_on_two_ranks(folder):
    run, glue = folder / "masked", write_sst2(folder / "glue", train=32, dev=12)
    task = [f"finetune.data_dir={glue}", "finetune.tasks=[SST-2]", "finetune.seeds=[1]", "finetune.epochs=1",
            "finetune.rows_per_update=8", "finetune.length=24"]  # fmt: skip
    words = [*readable([*TINY, *PLM]), f"shards.text_dir={folder / 'text'}", f"run_dir={run}", *task]
    said = finish(start(folder, *words, "--cluster=local", "--ranks=2", recipe="plm-base"))
    # What `distlm run` shows at its end.
    assert "finetune: SST-2, dev, median of 1 seeds" in said and f"report: {run / 'report.html'}" in said
    assert json.loads((run / "finetune/SST-2/results.json").read_text("utf-8"))["seeds"]["1"]["ranks"] == 2
    assert "Fine-tuning" in (run / "report.html").read_text("utf-8")
    again = finish(start(folder, *words, "--cluster=local", "--ranks=2", recipe="plm-base"))
    assert "complete; nothing to submit" in again
