"""Makes tests/support/__init__.py importable everywhere, and gives the data folder of tests that need one."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def wikitext2() -> Path:
    """Folder of WikiText-2, from DISTLM_TEST_DATA/wikitext-2."""
    folder = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "wikitext-2"
    if not (folder / "train.txt").is_file():
        pytest.skip("no WikiText-2: set DISTLM_TEST_DATA to a folder that holds wikitext-2/{train,valid,test}.txt")
    return folder
