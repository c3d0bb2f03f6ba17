"""The extension of the device, compiled once for each torch and each state of its sources."""

import fcntl
import hashlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("device.cpp", "operators.cpp", "autocast.cpp")
NAME = "distlm_sim"
MODULE = "DISTLM_SIM"
"""Environment variable: the compiled module; without it Python has no such device."""


def cache() -> Path:
    """Where builds are kept: DISTLM_TEST_CACHE, or the user's cache."""
    given = os.environ.get("DISTLM_TEST_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "distlm-tests"


def built() -> Path:
    """The compiled module; made where it is not there: about a minute of a core, one process at a time."""
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for name in ("sim.h", *SOURCES):
        digest.update((HERE / name).read_bytes())
    module = cache() / f"sim-{digest.hexdigest()[:16]}.so"
    if module.exists():
        return module
    # One folder for all states: what has not changed is not compiled again.
    made = cache() / "sim-build"
    made.mkdir(parents=True, exist_ok=True)
    # Not in that folder, where torch has a lock of its own.
    with (cache() / "sim-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            from torch.utils.cpp_extension import load

            load(
                NAME, [str(HERE / name) for name in SOURCES], extra_cflags=["-O1"], build_directory=str(made),
                is_python_module=False,
            )  # fmt: skip
            (made / f"{NAME}.so").replace(module)
    return module


def installed(folder: Path) -> Path:
    """A folder for PYTHONPATH in which torch finds the device by itself (the entry point `torch.backends`)."""
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nsim = support.sim.device:register\n")
    return folder
