"""A tiny run that is ready to be searched: random weights, a written store, a built index."""

import pytest
from support.knn import copy_run, in_stage
from support.store import ready_run

from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Tokens, checkpoint, store and index; read only."""
    config = ready_run(tmp_path_factory.mktemp("indexed"))
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    return config


@pytest.fixture(scope="session")
def searched(indexed: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same with neighbours, frozen settings and results; read only."""
    config = copy_run(indexed, tmp_path_factory.mktemp("searched") / "run")
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    return config
