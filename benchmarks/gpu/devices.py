"""Environments in which a child sees the device that was asked for, or none."""

import importlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu.part import Device

BENCHMARKS = Path(__file__).resolve().parents[1]
PROJECT = BENCHMARKS.parent
ON_PROCESSOR = {
    "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": "-1", "SIM_DEVICES": "0",
}  # fmt: skip
"""Environment variables under which a child sees no device."""


class NoDevice(Exception):
    """The device that was asked for is not here; says what to do."""


def environment(device: Device, folder: Path) -> dict[str, str]:
    """For a child that sees `device`. `folder` gets what the simulated one needs. Raises NoDevice."""
    # This tree is checked, whatever copy of it is installed.
    paths = [str(BENCHMARKS), str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # What is measured here is no plan for other runs of this user, and nothing of it is remembered.
    changed = {"DISTLM_SPEEDS": "", "DISTLM_CHECKED": ""}
    if device == "cpu":
        changed |= ON_PROCESSOR
    if device == "sim":
        build: Any = _simulated()
        changed |= {build.MODULE: str(build.built()), "SIM_DEVICES": "2"}
        paths = [str(build.installed(folder / "sim")), str(PROJECT / "tests"), *paths]
    return {**os.environ, **changed, "PYTHONPATH": os.pathsep.join(paths)}


def require_gpu() -> None:
    """Raises NoDevice where torch sees no accelerator."""
    from distlm.runtime.ranks.device import accelerator

    if accelerator() is None:
        import torch

        raise NoDevice(
            f"torch {torch.__version__} sees no GPU here; take --device sim for the simulated device, or --device cpu"
        )


def _simulated() -> ModuleType:
    """The module that compiles the tests' simulated device. Raises NoDevice where that cannot be done."""
    tests = PROJECT / "tests"
    if not (tests / "support" / "sim" / "build.py").is_file():
        raise NoDevice(f"--device sim: {tests} has no simulated device; take a source tree, or --device cpu")
    if shutil.which("c++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise NoDevice("--device sim needs a C++ compiler and Python's headers: apt-get install g++ python3-dev")
    sys.path.insert(0, str(tests))
    return importlib.import_module("support.sim.build")
