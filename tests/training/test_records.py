"""state.json and model.json as versions before there were formats wrote them, and what is wrong with them by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from distlm.errors import DistlmError
from distlm.finetune.records import FinetuneState
from distlm.models.awd_lstm.records import LstmState
from distlm.models.card import model_of_card, read_model_card
from distlm.models.transformer.config import TransformerConfig
from distlm.training.records import TrainState, UpdatesState

COMMON: dict[str, Any] = {
    "data": "d1", "dictionary": "d2", "seed": 1, "update": 12, "skipped": 0, "fingerprint": "f",
    "best": {"checkpoint": "step-00000012", "valid_loss": 3.5},
    "last": {"train_loss": 4.0, "tokens_per_s": 812.5, "valid_loss": 3.5, "valid_ppl": 33.1, "parameters": 4096},
    "ranks": 2, "deepspeed": "zero1", "precision": "fp32", "tap": "last_ffn_input",
    "optimizer": {"keys": ["exp_avg"], "average": None, "state": {"step": 12.0}, "group": {}, "scaler": {}},
}  # fmt: skip
LSTM = {
    **COMMON, "lstm.layers": 2, "lstm.width": 12, "lstm.hidden_width": 16, "awd.batch": 8, "awd.bptt": 12,
    "phase": "asgd", "halvings": 0, "losses": [4.0, 3.5],
    "log": [{"epoch": 1, "phase": "sgd", "loss": 4.0, "rule": "masked", "least": None, "fired": False}],
    "finished": False, "epoch": {"number": 2, "ce": 81.5, "tokens": 96, "seconds": 0.25},
}  # fmt: skip
USE = {"mu": 0.9, "top1_mu": 0.25, "kl_u": 1.5, "kl_w": None, "gini": 0.5}
STATES: dict[str, tuple[type[TrainState], dict[str, Any]]] = {
    "blocks": (UpdatesState, {**COMMON, "blocks_per_update": 4}),
    # Before a skipped batch, a fingerprint or an average was known.
    "first": (UpdatesState, {
        **{name: value for name, value in COMMON.items() if name not in ("skipped", "fingerprint", "best")},
        "optimizer": {"keys": ["momentum_buffer"], "state": {}, "group": {"lr_old": 0.1}, "scaler": {}},
        "blocks_per_update": 4,
    }),
    "lstm": (LstmState, LSTM),
    "imported lstm": (LstmState, {name: value for name, value in LSTM.items() if name != "epoch"}),
    "finetune": (FinetuneState, {
        **COMMON, "tap": "", "best": None, "blocks_per_update": 4, "source": "s", "epochs": [{"update": 6, "loss": 0.5,
        "accuracy": 0.75}], "memory_before": {"2": USE}, "memory_after": {"2": {**USE, "labels": {"1|0": {"kl": 0.5,
        "iou": None}}}},
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_an_older_version_is_read_and_written_alike(name: str, tmp_path: Path) -> None:
    kind, tree = STATES[name]
    path = tmp_path / "state.json"
    path.write_text(json.dumps(tree), "utf-8")
    state = kind.read(path)
    assert (state.update, state.seed, state.last["parameters"]) == (12, 1, 4096)
    written = json.loads(json.dumps(state.tree()))
    assert written.pop("format") == 1
    written["optimizer"] = {key: written["optimizer"][key] for key in tree["optimizer"]}
    assert {key: written[key] for key in tree} == tree


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lstm.width": "wide"}, r"state\.json: not a valid state of a checkpoint: .*`\$\.lstm\.width`"),
        ({"lstm.colour": 1}, r"state\.json: not a valid state of a checkpoint: .*unknown field `lstm\.colour`"),
        ({"phase": "resting"}, r"Invalid enum value 'resting' - at `\$\.phase`"),
        ({"epoch": {"number": 1.5}}, r"at `\$\.epoch\.number`"),
    ],
)
def test_what_is_wrong_with_a_state_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(LSTM | change), "utf-8")
    with pytest.raises(DistlmError, match=said):
        LstmState.read(path)


def test_settings_of_an_lstm_identify_it_by_their_names_but_not_the_cut_of_the_work(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(LSTM), "utf-8")
    found = LstmState.read(path).identity()
    assert (found["data"], found["lstm.width"], found["awd.batch"]) == ("d1", 12, 8)
    # Newer than the checkpoint: it had its default value then.
    assert found["awd.log_interval"] == 0 and "awd.micro_batch" not in found


CARD = {
    "kind": "transformer_lm", "config": {"kind": "transformer_lm", "layers": 2, "width": 16, "heads": 2, "dropout": 0},
    "vocabulary": 40, "dictionary": "d", "step": 7, "tap": "last_ffn_input", "weights": "w",
}  # fmt: skip


def test_a_card_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(CARD), "utf-8")
    card = read_model_card(tmp_path)
    assert card.config == CARD["config"] and (card.step, card.tap, card.weights) == (7, "last_ffn_input", "w")
    assert model_of_card(card) == TransformerConfig(layers=2, width=16, heads=2, dropout=0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"layers": "two"}}, r"model\.json: config: not a transformer_lm .*`int`, got `str`.*layers"),
        ({"config": {"colour": 1}}, r"model\.json: config: .*unknown field `colour`"),
        ({"config": {"memory": {"kimd": "pkm"}}}, r"model\.json: config: .*unknown field `memory\.kimd`"),
        ({"config": {"memory": {"k": "32"}}}, r"model\.json: config: .*memory: Expected `int`, got `str`.*k"),
        ({"config": {"memory": [4]}}, r"model\.json: config: .*Expected `object`, got `array`"),
        ({"rows": 38}, r"model\.json: not a valid description of a model: .*unknown field `rows`"),
        ({"step": "seven"}, r"model\.json: not a valid description of a model: .*`\$\.step`"),
        ({"kind": "unigram"}, r"model\.json: kind 'unigram' is unknown; this version reads"),
    ],
)
def test_what_is_wrong_with_a_card_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(CARD | change), "utf-8")
    with pytest.raises(DistlmError, match=said):
        read_model_card(tmp_path)
