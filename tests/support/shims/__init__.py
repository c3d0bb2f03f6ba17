"""Shims in C that show a test's processes another machine; built once a session with the system's compiler."""

import subprocess
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import mkdtemp

import pytest


@cache
def _built() -> Path:
    compiler = which("cc") or which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here for the shim")
    made = Path(mkdtemp(prefix="distlm-tests-shim-"), "cluster.so")
    source = Path(__file__).with_name("cluster.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


def shim(no_flock: bool = False, clock: int = 0, node: str = "") -> dict[str, str]:
    """Variables for processes whose file systems have no locks, or whose clock is some seconds ahead (cluster.c)."""
    env = {"LD_PRELOAD": str(_built())}
    if no_flock:
        env["SHIM_NO_FLOCK"] = "1"
    if clock:
        env["SHIM_CLOCK"] = str(clock)
    if node:
        env["SHIM_NODE"] = node
    return env
