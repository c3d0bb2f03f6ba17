"""A benchmark's own processes: each starts the same script again, with hidden options that say what to do there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that bind the threads of a process before it can choose."""


def start(script: str, words: Sequence[object], threads: int, own_group: bool = False) -> subprocess.Popen[str]:
    """`python SCRIPT WORDS` on so many threads, whatever the environment says of them here; what it prints is kept.

    own_group: what it starts can be ended with it (`end_group`).
    """
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    return subprocess.Popen(
        [sys.executable, script, *map(str, words)], env=environment, stdout=subprocess.PIPE, text=True,
        start_new_session=own_group,
    )  # fmt: skip


def result(process: "subprocess.Popen[str]") -> Any:
    """What the last line that it printed says in JSON. Ends this process where that one failed; it has said why."""
    printed = process.communicate()[0]
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {subprocess.list2cmdline(list(process.args))}")  # type: ignore[arg-type]
    return json.loads(printed.splitlines()[-1])


def printed_within(process: "subprocess.Popen[str]", limit_s: float) -> tuple[str, bool]:
    """What a process of its own group has printed when it ends, or is ended after limit_s seconds; whether it was."""
    try:
        return process.communicate(timeout=limit_s)[0], False
    except subprocess.TimeoutExpired:
        end_group(process)
        return process.communicate()[0], True
    finally:
        end_group(process)


def end_group(process: "subprocess.Popen[Any]") -> None:
    """End a process that leads a group with all that it started, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
