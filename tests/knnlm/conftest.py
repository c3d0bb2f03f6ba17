"""A tiny run that is ready to be searched: random weights, a written store, a built index."""

import pytest
from support import shared

from distlm.config.schema import RunConfig


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Tokens, checkpoint, store and index; read only."""
    return shared.indexed(tmp_path_factory)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same with neighbours, frozen settings and results; read only."""
    return shared.searched(tmp_path_factory)
