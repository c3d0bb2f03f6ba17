"""The environment of children that see the device `sim`."""

import os

import pytest
from support import TESTS, warm
from support.sim.build import MODULE, built, installed


@pytest.fixture(scope="session")
def sim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For a Python that sees `sim`, beside the environment of this one; the device is compiled where it is not kept."""
    site = installed(tmp_path_factory.mktemp("sim"))
    paths = [str(site), str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {MODULE: str(built()), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **warm.COLD}
