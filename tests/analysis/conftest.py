"""A tiny kNN run, trained and evaluated, that the reports of this folder read."""

from pathlib import Path

import pytest
from support import write_text
from support.knn import in_stage
from support.shared import made_once
from support.store import tiny_config

from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.datastore.writer import run_datastore_write
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.training.loop import run_train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Brute-force neighbours, so that there is no index; read only."""

    def make(folder: Path) -> None:
        config = config_in(folder, write_text(folder / "text"))
        in_stage("prepare", config, run_prepare)
        in_stage("train", config, run_train)
        in_stage("datastore", config, run_datastore_write)
        for function in (run_search, run_tune, run_evaluate):
            in_stage("knn", config, function)

    def config_in(folder: Path, text: Path) -> RunConfig:
        return tiny_config(folder / "w0-s1", text, ["knn.search=brute", "train.l2_weight=0"])

    folder = made_once(tmp_path_factory, "brute", make)
    return config_in(folder, folder / "text")
