"""Whole stages on a device beside the same on the processor: equal figures for each kind, ZeRO stage, precision.

Each training is a process of its own: DeepSpeed takes one device for all of a process. Dropout is off where losses are
compared: a device draws its masks from a generator of its own.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from support import distlm
from support.lstm import lstm_settings
from support.sim.devices import NEEDS_DEVICE, ON_PROCESSOR
from support.train import curve, newest, relative, settings, tiny_tokens, train_all, weight_difference

pytestmark = NEEDS_DEVICE
DRY = ["model.dropout=0", "model.attention_dropout=0", "model.softmax_dropout=0"]
# Sums in another order: attention and the embedding's gradient have kernels of their own on a processor.
TOLERANCE = 1e-5
# A query between two slots may read the other one.
OF_MEMORY = 1e-4
# ZeRO 3 comes last: DeepSpeed then puts its own linear layer in the place of torch's for the rest of a process, whose
# sums differ in the last bits.
ONE_RANK = {
    "queue": ["train.l2_weight=0.1", "train.regulariser=queue", "train.queue_length=4", "train.encoder_momentum=0.9"],
    "memory": ["memory.kind=pkm", "memory.positions=[1]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4",
               "memory.key_width=8", "memory.value_dropout=0", "memory.query_dropout=0"],
    "fp16": ["train.precision=fp16"],
    "l2": ["train.l2_weight=1.0", "train.deepspeed=zero3"],
}  # fmt: skip
TWO_RANKS = {
    "nag": ["train.deepspeed=zero0", "train.optimizer=nag", "train.lr=0.1", "train.weight_decay=0.01"],
    "memories": [*ONE_RANK["memory"], "train.micro_blocks=2"], "bf16": ["train.precision=bf16"],
    "fp16-zero2": [*ONE_RANK["memory"], "train.micro_blocks=2", "train.precision=fp16", "train.deepspeed=zero2"],
    "fp16-offload": ["train.precision=fp16", "train.deepspeed=zero2-offload"],
    **{f"zero{stage}": [f"train.deepspeed=zero{stage}"] for stage in (1, 2, 3)},
}  # fmt: skip
VARIANTS = {name: ranks for ranks, names in ((1, ONE_RANK), (2, TWO_RANKS)) for name in names}
HALF = ("bf16", "fp16", "fp16-zero2", "fp16-offload")
LSTM_DRY = [f"lstm.{name}_dropout=0" for name in ("embedding", "input", "hidden", "output", "weight")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tokens: Path) -> Path:
    """Runs PLACE/NAME of the variants whose tests were asked for; those in half precision stop once on the device and
    are resumed, too."""
    folder = tokens.parent
    asked = {item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")}
    for ranks, every in ((1, ONE_RANK), (2, TWO_RANKS)):
        variants = {name: lines for name, lines in every.items() if name in asked}
        if not variants:
            continue

        def jobs(place: str, names: Iterable[str], *more: str, of: dict[str, list[str]] = variants) -> list[list[str]]:
            return [settings(tokens, folder / place / name, *DRY, *of[name], *more) for name in names]

        halves = [name for name in variants if name in HALF]
        train_all(ranks, folder / "processor", jobs("processor", variants), **ON_PROCESSOR)
        first = jobs("cut", halves, "train.max_updates_this_run=5") + jobs("device", variants)
        train_all(ranks, folder / "device", first)
        if halves:
            train_all(ranks, folder / "cut", jobs("cut", halves))
    return folder


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in HALF])
def test_training(runs: Path, name: str) -> None:
    there, here = runs / "processor" / name, runs / "device" / name
    tolerance = OF_MEMORY if name.startswith("memor") else TOLERANCE
    assert relative(curve(there), curve(here)) < tolerance
    assert relative(curve(there, "valid/loss"), curve(here, "valid/loss")) < tolerance
    assert curve(there, "train/data_fingerprint") == curve(here, "train/data_fingerprint")


@pytest.mark.parametrize("name", HALF)
def test_half_precision(runs: Path, name: str) -> None:
    """Close to the processor's; a training that was stopped goes on with the same bits and skips the same updates: it
    starts from the loss scale that it had."""
    there, here, cut = (runs / place / name for place in ("processor", "device", "cut"))
    assert relative(curve(there), curve(here)) < 2e-2
    assert curve(cut) == curve(here)
    assert weight_difference(cut, here) == 0
    states = [json.loads((newest(run) / "state.json").read_text("utf-8")) for run in (here, cut)]
    assert states[0]["skipped"] == states[1]["skipped"]


def test_weight_drop_and_averages(tokens: Path, tmp_path: Path) -> None:
    """The AWD-LSTM through NT-ASGD's trigger and fine-tuning; with all dropouts it trains, too, and stops once."""
    for place, environment in (("processor", ON_PROCESSOR), ("device", {})):
        train_all(1, tmp_path / place, [lstm_settings(tokens, tmp_path / place / "dry", *LSTM_DRY)], **environment)
    there, here = tmp_path / "processor" / "dry", tmp_path / "device" / "dry"
    assert relative(curve(there), curve(here)) < 1e-4
    assert relative(curve(there, "valid/loss"), curve(here, "valid/loss")) < 1e-4
    wet = [lstm_settings(tokens, tmp_path / name) for name in ("whole", "cut")]
    train_all(1, tmp_path / "a", [wet[0], [*wet[1], "train.max_updates_this_run=60"]])
    train_all(1, tmp_path / "b", [wet[1]])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert weight_difference(tmp_path / "cut", tmp_path / "whole") == 0


def test_from_tokens_to_perplexity(tokens: Path, tmp_path: Path) -> None:
    """datastore write, index, search with exact distances, cache, tuning with a gate, evaluation, generation."""
    for place, environment in (("processor", ON_PROCESSOR), ("device", {})):
        asked = ["cache.windows=[50]", "cache.thetas=[0.1]", "index.factory=IVF16,Flat"]
        text = [f"data.text_dir={tokens.parent / 'text'}", "data.max_words=0"]
        distlm("run", "demo", *settings(tokens, tmp_path / place, *DRY, *asked, *text), **environment)
    files = [tmp_path / place / "results.json" for place in ("processor", "device")]
    figures = [_figures(json.loads(file.read_text("utf-8"))) for file in files]
    assert figures[0].keys() == figures[1].keys() and len(figures[0]) > 6
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-4), name
    keys = [np.load(next((tmp_path / place).rglob("keys-00000.npy"))) for place in ("processor", "device")]
    assert np.mean(keys[0] == keys[1]) > 0.95
    np.testing.assert_allclose(keys[1].astype(np.float32), keys[0].astype(np.float32), rtol=2e-3, atol=2e-3)


def _figures(found: object, name: str = "") -> dict[str, float]:
    """Every perplexity of a results.json by its place."""
    if isinstance(found, dict):
        return {k: v for key, value in found.items() for k, v in _figures(value, f"{name}/{key}").items()}
    return {name: found} if isinstance(found, float) and "perplexity" in name else {}


def test_a_device_without_memory(tokens: Path, tmp_path: Path) -> None:
    """One line that names settings, exit code 1, and the last checkpoint is whole: with more memory it goes on."""
    run = settings(tokens, tmp_path / "run", *DRY, "train.deepspeed=zero1")
    distlm("train", "demo", *run, "train.max_updates_this_run=4", check=False)
    done = distlm("train", "demo", *run, check=False, SIM_MEMORY="1000000")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "out of memory" in done.stderr and "train.micro_blocks" in done.stderr and "zero1-offload" in done.stderr
    assert "give the run another name" in done.stderr, "one forward pass of other rows is another training"
    distlm("train", "demo", *run)
    assert max(curve(tmp_path / "run")) == 12
    stored = distlm("datastore", "write", "demo", *run, check=False, SIM_MEMORY="300000")
    assert stored.returncode == 1
    assert "out of memory" in stored.stderr and "datastore.batch_blocks" in stored.stderr, stored.stderr
