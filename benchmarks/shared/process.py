"""A benchmark's own processes: each starts the same script again, with hidden options that say what to do there."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def start(script: str, words: Sequence[object], threads: int) -> subprocess.Popen[str]:
    """`python SCRIPT WORDS` on so many threads, whatever the environment says of them here; what it prints is kept."""
    # They bind the threads of the child before it can choose.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    return subprocess.Popen(
        [sys.executable, script, *map(str, words)], env=environment, stdout=subprocess.PIPE, text=True
    )


def result(process: "subprocess.Popen[str]") -> Any:
    """What the last line that it printed says in JSON. Ends this process where that one failed; it has said why."""
    printed = process.communicate()[0]
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {subprocess.list2cmdline(list(process.args))}")  # type: ignore[arg-type]
    return json.loads(printed.splitlines()[-1])
