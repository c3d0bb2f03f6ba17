"""Stages in which a call of the system fails: started from a warm server that has tests/faults/failing_calls.c."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import ENVIRONMENT, TESTS, warm

SOURCE = TESTS / "faults" / "failing_calls.c"
HANGS_S = 300.0
"""A stage takes seconds."""


def library(folder: Path) -> Path:
    """The compiled shim. Skips where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc): apt-get install gcc libc6-dev")
    made = folder / "failing_calls.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, "-std=gnu11", "-O2", *warnings, "-fPIC", "-shared", "-o", made, SOURCE, "-ldl"], check=True
    )
    return made


@dataclass
class Outcome:
    """How a start ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    output: str
    errors: str
    calls: list[tuple[str, str, Path]] = field(default_factory=list)
    """Kind, error and path: of the calls that failed, or of all where none was to."""

    @property
    def lines(self) -> list[str]:
        """What distlm says of errors, and what `distlm verify` finds."""
        return [line for line in self.errors.splitlines() if "distlm: " in line or line.startswith("FAIL ")]


class Stages:
    """Starts `distlm …` with calls failing below one folder."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for the shim and its logs."""
        self._folder = folder
        self._preload = {"LD_PRELOAD": str(library(folder)), "MALLOC_ARENA_MAX": "2"}
        self._server = warm.Server({**ENVIRONMENT, **self._preload})
        # Results have the commit of the code, which may be changed while the tests run.
        given = {warm.VARIABLE: self._server.address, "DISTLM_CHECKED": "", "DISTLM_SPEEDS": "", "GIT_DIR": "none"}
        self.environment = {**ENVIRONMENT, **given}
        """Of the starts; also of what starts processes itself, as mpirun."""

    def close(self) -> None:
        """End the server."""
        self._server.close()

    def run(
        self, words: Sequence[str], below: Path, at: int = -1, stays: bool = False, turn: int = 0, **more: str
    ) -> Outcome:
        """`distlm WORDS`; the call number `at` below a folder fails (0: count them, -1: leave them alone)."""
        log = self._folder / "calls"
        log.unlink(missing_ok=True)
        armed = armed_by(below, at, log, stays, turn) if at >= 0 else {}
        environment = {**self.environment, **armed, **more}
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            code = self._start(words, environment, output.fileno(), errors.fileno())
            output.seek(0)
            errors.seek(0)
            return Outcome(code, output.read(), errors.read(), read_calls(log))

    def _start(self, words: Sequence[str], environment: Mapping[str, str], output: int, errors: int) -> int:
        start = {
            "arguments": [sys.executable, "-m", "distlm", *words],
            "environment": dict(environment),
            "folder": str(self._folder),
            "cores": list(os.sched_getaffinity(0)),
        }
        text = json.dumps(start).encode()
        with socket.socket(socket.AF_UNIX) as server, open(os.devnull) as nothing:  # noqa: PTH123
            _connect(server, self._server.address)
            socket.send_fds(server, [len(text).to_bytes(4, "big")], [nothing.fileno(), output, errors])
            server.sendall(text)
            answers = server.makefile("r")
            child = int(answers.readline())
            server.settimeout(HANGS_S)
            try:
                status = int(answers.readline())
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                return -signal.SIGALRM
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _connect(server: socket.socket, address: str) -> None:
    for _ in range(100):
        try:
            server.connect(address)
            return
        except OSError:
            time.sleep(0.1)
    raise ConnectionError("the server of warm starts has not come up")


def armed_by(below: Path, at: int, log: Path, stays: bool = False, turn: int = 0, rank: str = "") -> dict[str, str]:
    """The environment in which the shim makes calls fail."""
    return {
        "DISTLM_FAIL_BELOW": str(below),
        "DISTLM_FAIL_AT": str(at),
        "DISTLM_FAIL_STAYS": "yes" if stays else "",
        "DISTLM_FAIL_TURN": str(turn),
        "DISTLM_FAIL_RANK": rank,
        "DISTLM_FAIL_LOG": str(log),
    }


def read_calls(log: Path) -> list[tuple[str, str, Path]]:
    """What the shim has written."""
    if not log.exists():
        return []
    found = (line.split("\t") for line in log.read_text("utf-8").splitlines())
    return [(kind, error, Path(path)) for _, kind, error, path in found]
