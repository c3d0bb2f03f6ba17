"""The environment of children that see the device `sim`."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from support import TESTS, warm
from support.sim.build import MODULE, built, installed


@pytest.fixture(scope="session")
def sim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For a Python that sees `sim`, beside the environment of this one; the device is compiled where it is not kept."""
    if shutil.which("c++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("the simulated device needs a C++ compiler and Python's headers: apt-get install g++ python3-dev")
    site = installed(tmp_path_factory.mktemp("sim"))
    paths = [str(site), str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {MODULE: str(built()), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **warm.COLD}
