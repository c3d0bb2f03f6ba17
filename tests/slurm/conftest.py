"""A real Slurm of four nodes for the tests of this folder: one cluster a session, the jobs of each test ended with it.

A cluster that runs already (SLURM_CONF names one, or cluster.sh's own folder holds one) is used and left running.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.deadline import DEADLINE_S
from support.slurm.cluster import CLUSTER, Cluster, Slurm

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "munged", "srun")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here are marked `slurm`; they run in one process, since there is one cluster on a machine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """The cluster of this session; a named skip where Slurm is not installed, unless DISTLM_REQUIRE_SLURM=1."""
    missing = [program for program in NEEDED if not _installed(program)]
    if missing:
        reason = f"no Slurm here ({', '.join(missing)} missing): `make slurm-packages` installs it (Debian, root)"
        (pytest.fail if os.environ.get("DISTLM_REQUIRE_SLURM") == "1" else pytest.skip)(reason)
    cluster = Cluster(_folder())
    ours = not cluster.running()
    if ours:
        cluster.script("start")
    else:
        cluster.resume()
    yield cluster
    if ours:
        cluster.script("stop")


@pytest.fixture
def slurm(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Slurm]:
    """Slurm for one test; its jobs are ended afterwards."""
    yield from opened(slurm_cluster, tmp_path)


@pytest.fixture(scope="module")
def module_slurm(slurm_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Slurm for runs that the tests of a module share."""
    yield from opened(slurm_cluster, tmp_path_factory.mktemp("slurm"))


def opened(cluster: Cluster, folder: Path) -> Iterator[Slurm]:
    """A Slurm for `folder`, closed after use."""
    here = Slurm(cluster, folder)
    try:
        yield here
    finally:
        here.close()


def _installed(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _folder() -> Path:
    """Folder of the running cluster that SLURM_CONF names, else cluster.sh's own."""
    named = Path(os.environ.get("SLURM_CONF", ""))
    if (named.parent / ".distlm-slurm").exists():
        return named.parent
    shown = subprocess.run(
        ["bash", str(CLUSTER), "env"], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    return Path(shown.stdout.strip().removeprefix("export SLURM_CONF=")).parent
