"""Makes tests/support/__init__.py importable everywhere, and gives the data folder of tests that need one."""

import os
import sys
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).parent))

from support import ENVIRONMENT, warm
from support.foreign.hangs import Watch

from distlm.runtime.ranks.device import DRIVERS

SERVER = pytest.StashKey[warm.Server]()
WATCH = pytest.StashKey[Watch]()


def pytest_configure(config: pytest.Config) -> None:
    """One server of warm starts for this process and those of xdist, which inherit its environment."""
    os.environ["DISTLM_SPEEDS"] = os.environ["DISTLM_CHECKED"] = ""
    if not any(path.exists() for path in DRIVERS):
        # Before anything imports triton: without a GPU the tests of kernels interpret them, and nothing else uses it.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if warm.VARIABLE not in os.environ:
        config.stash[SERVER] = warm.Server(ENVIRONMENT)
        os.environ[warm.VARIABLE] = ENVIRONMENT[warm.VARIABLE] = config.stash[SERVER].address


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """A test that fails because Open MPI's mpirun hung in its own end is run once more, and that is said."""
    watch = item.config.stash.setdefault(WATCH, Watch())
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    with watch:
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if watch.killed and any(report.failed for report in reports):
            print(f"{item.nodeid}: mpirun {watch.killed[0]} hung in its own end and was killed; the test is run again")
            item._initrequest()  # type: ignore[attr-defined]
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    """End it."""
    if SERVER in config.stash:
        config.stash[SERVER].close()


@pytest.fixture(scope="session")
def wikitext2() -> Path:
    """Folder of WikiText-2, from DISTLM_TEST_DATA/wikitext-2."""
    folder = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "wikitext-2"
    if not (folder / "train.txt").is_file():
        pytest.skip("no WikiText-2: set DISTLM_TEST_DATA to a folder that holds wikitext-2/{train,valid,test}.txt")
    return folder
