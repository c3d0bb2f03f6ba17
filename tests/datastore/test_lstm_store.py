"""A trained AWD-LSTM writes a datastore, is searched and tuned like any model, with `last_output` as its key."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.lstm import lstm_config
from support.train import tiny_tokens

from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import plan_datastore, run_datastore_write
from distlm.errors import DistlmError
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.io import load_model
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train

SMALL = ["awd.batch=40", "awd.epochs=3", "awd.finetune_epochs=0", "awd.trigger=window", "knn.search=brute"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Token files and a run with a trained model and its datastore."""
    folder = tmp_path_factory.mktemp("store")
    tokens = tiny_tokens(folder)
    config = lstm_config(tokens, folder / "run", *SMALL)
    with open_stage("train", config) as stage:
        run_train(stage)
    assert f"{12} float16" in plan_datastore(config, 1).work
    with open_stage("datastore", config) as stage:
        run_datastore_write(stage)
    return tokens, folder / "run"


def test_keys_are_the_last_layer_s_output_read_from_the_zero_state(run: tuple[Path, Path]) -> None:
    tokens, folder = run
    store = Datastore.open(folder / "datastore")
    ids = np.asarray(TokenFiles.open(tokens).split("train"), dtype=np.int64)
    assert store.tap == "last_output" and store.width == 12 and store.rows == len(ids) - 32
    with open_stage("datastore", lstm_config(tokens, folder, *SMALL)) as stage:
        model = load_model(stage.run.model_checkpoint(stage.config))[0]
    # The second block scores tokens 64 … 95 after the context 32 … 63; its first input is token 31.
    with torch.no_grad():
        states = model(torch.from_numpy(ids[31:95])[None], tap="last_output").tapped[0, 32:]
    keys, values = np.asarray(store.keys(0)[32:64]), np.asarray(store.values(0)[32:64])
    np.testing.assert_allclose(keys, states.numpy(), rtol=2e-3, atol=1e-3)
    assert np.array_equal(values, ids[64:96])


def test_search_and_tuning(run: tuple[Path, Path]) -> None:
    tokens, folder = run
    with open_stage("knn", lstm_config(tokens, folder, *SMALL)) as stage:
        run_search(stage)
        summary = run_tune(stage)
    assert summary["perplexity_per_word"] <= summary["lm_perplexity_per_word"]


def test_the_transformer_s_taps_are_refused(run: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, folder = run
    checkpoint = (folder / "checkpoints").glob("step-*")
    settings = [*SMALL, "datastore.tap=last_ffn_input", f"datastore.checkpoint={sorted(checkpoint)[-1]}"]
    with (
        open_stage("datastore", lstm_config(tokens, tmp_path / "run", *settings)) as stage,
        pytest.raises(DistlmError, match=r"last_ffn_input': no such hidden state; choose one of last_output"),
    ):
        run_datastore_write(stage)
