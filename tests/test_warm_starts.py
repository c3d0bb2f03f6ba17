"""What a test starts warm is what it would start: arguments, environment, streams, signals, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import ENVIRONMENT, distlm, mpirun, warm
from support.deadline import DEADLINE_S, until
from support.drivers import echo


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, echo.__file__, *words], cwd=folder, env={**ENVIRONMENT, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def test_it_has_what_an_ordinary_start_has(tmp_path: Path) -> None:
    found = []
    for extra in ({}, warm.COLD):
        process = start(tmp_path, "read", "7", SAID="two\nlines", **extra)
        output, errors = process.communicate("in", timeout=DEADLINE_S)
        assert (process.returncode, errors) == (7, "")
        found.append(json.loads(output))
    one, other = found
    assert one["torch"] and not other["torch"]
    assert one["parent"] != os.getpid() == other["parent"]
    for changing in ("torch", "parent", "pid"):
        del one[changing], other[changing]
    assert one["environment"].pop(warm.VARIABLE) and not other["environment"].pop(warm.VARIABLE)
    assert one == other and one["input"] == "in"


def test_it_dies_of_what_its_child_dies_of(tmp_path: Path) -> None:
    process = start(tmp_path, "die")
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGTERM


def test_signals_reach_the_child(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    said(process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3


def test_a_killed_start_takes_its_child_along(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    child = said(process)["pid"]
    assert child != process.pid and psutil.pid_exists(child)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    until(lambda: not psutil.pid_exists(child), "the end of the child")


@pytest.mark.multiprocess
def test_ranks_of_mpirun_are_children_of_the_server() -> None:
    parents = {json.loads(line)["parent"] for line in mpirun(2, [echo.__file__, "exit", "0"]).stdout.splitlines()}
    assert len(parents) == 1


def test_an_error_is_shown_as_python_shows_it() -> None:
    done = distlm("train", check=False)
    assert done.returncode == 2 and done.stderr.count("expected one recipe, file or run directory") == 1
