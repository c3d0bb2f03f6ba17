"""Makes tests/support/__init__.py importable everywhere, and gives the data folder of tests that need one."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import ENVIRONMENT, warm

SERVER = pytest.StashKey[warm.Server]()


def pytest_configure(config: pytest.Config) -> None:
    """One server of warm starts for this process and those of xdist, which inherit its environment."""
    os.environ["DISTLM_SPEEDS"] = ""
    if warm.VARIABLE not in os.environ:
        config.stash[SERVER] = warm.Server(ENVIRONMENT)
        os.environ[warm.VARIABLE] = ENVIRONMENT[warm.VARIABLE] = config.stash[SERVER].address


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
