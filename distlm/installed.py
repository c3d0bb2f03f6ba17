"""How this copy of distlm was installed, and what mends a library that is missing.

In a source tree launchers/, slurm/ and ds_configs/ lie beside distlm/. A wheel installs `distlm` alone, so that other
environments get no top-level package `launchers`: there the three folders lie in distlm/_tree. A run's copy of the code
(launchers/stages/snapshot.py) has the shape of a source tree.
"""

import re
import shlex
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package `distlm`."""
_IN_WHEEL = PACKAGE / "_tree"


def from_wheel() -> bool:
    """Whether this copy was installed from a wheel."""
    return _IN_WHEEL.is_dir()


def tree() -> Path:
    """The folder with launchers/, slurm/ and ds_configs/. On a path it makes `launchers` importable."""
    return _IN_WHEEL if from_wheel() else PACKAGE.parent


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml into this environment, to be named in an error.

    In a source tree it installs the tree with that extra; elsewhere it names what the extra asks for, since no package
    index is sure to have distlm itself.
    """
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        folder = shlex.quote(f"{PACKAGE.parent}[{extra}]")
        return f"pip install -c {shlex.quote(str(PACKAGE.parent / 'constraints.txt'))} -e {folder}"
    return f"pip install {shlex.join(requirements(extra))}"


def requirements(extra: str) -> list[str]:
    """What an extra asks for, as pip takes it; the extra's own name where this copy was not installed."""
    try:
        lines = metadata.requires("distlm") or []
    except metadata.PackageNotFoundError:
        lines = []
    wanted = [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    return wanted or [f"distlm[{extra}]"]
