"""One finished tiny store for the tests that only read, and copies of it for those that damage."""

import shutil
from pathlib import Path

import pytest
from support import shared
from support.store import tiny_config

from distlm.config.schema import RunConfig


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with a finished store; read only."""
    return shared.stored(tmp_path_factory)


@pytest.fixture
def store_copy(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of that run, to be damaged."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return tiny_config(tmp_path / "run", Path(finished.data.text_dir))


@pytest.fixture
def ready(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """A run with token files and a checkpoint, and no store yet."""
    shutil.copytree(finished.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("datastore", "datastore.yaml"))
    return tiny_config(tmp_path / "run", Path(finished.data.text_dir))
