"""One finished tiny store for the tests that only read, and copies of it for those that damage."""

import shutil
from pathlib import Path

import pytest
from support.store import ready_run, tiny_config

from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.runtime.stage import open_stage


def write_store(config: RunConfig) -> dict[str, object]:
    """Run the stage in this process."""
    with open_stage("datastore", config) as stage:
        return run_datastore_write(stage)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with a finished store; read only."""
    config = ready_run(tmp_path_factory.mktemp("finished"))
    write_store(config)
    return config


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
