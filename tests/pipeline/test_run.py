"""`distlm run`: the whole pipeline on two ranks, stage by stage and in one command, stopped, continued, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import ENVIRONMENT, distlm, shared
from support.deadline import DEADLINE_S, until
from support.shared import whole_settings as settings

from distlm.runtime.rundir import RunDir


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return shared.whole(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run directory and standard output."""
    return shared.whole(tmp_path_factory)[1:]


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run directory."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_a_run_ends_with_the_table_results_and_report(finished):
    folder, output = finished
    results = json.loads((folder / "results.json").read_text("utf-8"))
    for split in ("valid", "test"):
        assert results["splits"][split]["knn"]["perplexity"] > 1
        assert f"{results['splits'][split]['lm']['perplexity']:.2f}" in output
    assert "perplexity" in output and str(folder / "report.html") in output
    report = (folder / "report.html").read_text("utf-8")
    assert "<img" in report and "http" not in report.replace("http://www.w3.org", "")
    assert (folder / "logs" / "train.log").exists()


def test_run_again_says_complete_and_does_nothing(copy, text):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    done = distlm("run", "demo", *settings(copy, text))
    assert "complete; nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")} == before


def test_another_setting_is_refused_before_anything_starts(copy, text):
    done = distlm("run", "demo", *settings(copy, text), "knn.block=16", check=False)
    assert done.returncode == 1 and "knn.block: 32 there, 16 now" in done.stderr


def test_stages_one_by_one_give_the_same_numbers(finished, text, tmp_path):
    whole, _ = finished
    folder = tmp_path / "run"
    for words, ranks in (
        ("data prepare", 1), ("train", 2), ("datastore write", 2), ("index train", 2), ("index add", 2),
        ("index merge", 2), ("knn search", 2), ("knn tune", 1), ("knn evaluate", 1), ("report", 1),
    ):  # fmt: skip
        distlm(*words.split(), "demo", *settings(folder, text), ranks=ranks)
    one, other = (json.loads((path / "results.json").read_text("utf-8")) for path in (whole, folder))
    assert one["splits"] == other["splits"] and one["settings"] == other["settings"]
    assert (RunDir(whole).index / "merged.index").read_bytes() == (RunDir(folder).index / "merged.index").read_bytes()


def test_a_stop_signal_ends_with_75_and_the_same_command_continues(finished, text, tmp_path):
    whole, _ = finished
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "distlm", "run", "demo", *settings(folder, text)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE) as process:
        until((folder / "checkpoints").exists, "training", lambda: process.poll() is None)
        os.kill(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=DEADLINE_S)[0].decode()
    assert process.returncode == 75, output
    assert "run the same command again" in output
    distlm("run", "demo", *settings(folder, text))
    one, other = (json.loads((path / "results.json").read_text("utf-8")) for path in (whole, folder))
    assert one["splits"] == other["splits"]


def test_with_the_model_of_another_run_nothing_is_trained(finished, text, tmp_path):
    """datastore.checkpoint names the run; what follows from the same text is the same."""
    folder, _ = finished
    run_dir = tmp_path / "other"
    done = distlm("run", "demo", *settings(run_dir, text), f"datastore.checkpoint={folder}")
    assert "distlm train" not in done.stderr and not (run_dir / "checkpoints").exists()
    mine, theirs = (json.loads((root / "results.json").read_text("utf-8"))["splits"] for root in (run_dir, folder))
    for split in theirs:
        assert mine[split]["knn"]["perplexity"] == theirs[split]["knn"]["perplexity"]
    assert (run_dir / "report.html").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    done = distlm("run", "demo", *settings(run_dir, text), f"datastore.checkpoint={empty}", check=False)
    assert done.returncode == 1 and "datastore.checkpoint" in done.stderr and "Traceback" not in done.stderr
