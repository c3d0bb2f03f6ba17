"""Going on: a longer training in the same run directory, means over a stop, and another run's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.config import config_of
from support.lstm import lstm_config
from support.plm import memory_of, plm_config, plm_settings, tiny_shards
from support.train import newest, same_end, tiny_config, tiny_tokens

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, Stopped, UsageError
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.training.finished import trained
from distlm.training.loop import run_train


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("carry"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def train(config: RunConfig) -> dict[str, Any]:
    with open_stage("train", config) as stage:
        return run_train(stage)


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    """Update → its line of training losses, without speeds and times; of two the later."""
    text = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [line for line in map(json.loads, text) if "train/loss" in line]
    own = ("time", "perf/tokens_per_s", "perf/data_wait_s")
    return {line["step"]: {key: value for key, value in line.items() if key not in own} for line in found}


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((newest(folder) / "state.json").read_text("utf-8"))
    return {key: value for key, value in found.items() if key not in ("last", "window", "check")}


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_longer_training_is_what_it_would_have_been(tokens, tmp_path, log_every):
    """`log_every` 5 does not divide the first length: its last line comes early."""
    settings = f"train.log_every={log_every}", "train.valid_every=4", "train.save_every=0"
    whole, grown = (tmp_path / name for name in ("whole", "grown"))
    train(tiny_config(tokens, whole, *settings, "train.updates=12"))
    train(tiny_config(tokens, grown, *settings, "train.updates=8"))
    longer = tiny_config(tokens, grown, *settings, "train.updates=12")
    assert not trained(longer, RunDir.of(longer))
    train(longer)
    assert same_end(whole, grown) and state(whole) == state(grown)
    one, two = lines(whole), lines(grown)
    assert {step: two[step] for step in one} == one and two.keys() - one.keys() <= {8}
    with pytest.raises(DistlmError, match=r"train.updates: 12 there, 8 now.*distlm clean"):
        train(tiny_config(tokens, grown, *settings, "train.updates=8"))


def test_kernels_go_on_as_they_were_chosen(tokens, tmp_path, monkeypatch):
    """What the first start chose is in its checkpoint, and the next one is told of it; a third one keeps none."""
    told = []

    def choose(setting, kept, *_):
        told.append((setting, kept))
        return ["update", "slots"] if len(told) < 3 else []

    monkeypatch.setattr("distlm.training.job.choose", choose)
    settings = "train.valid_every=0", "train.save_every=0", "train.updates=9", "train.max_updates_this_run=2"
    for kernels in (["update", "slots"], ["update", "slots"], None):
        with pytest.raises(Stopped):
            train(tiny_config(tokens, tmp_path, *settings, f"train.kernels={'torch' if kernels is None else 'auto'}"))
        assert state(tmp_path).get("kernels") == kernels
    assert told == [("auto", None), ("auto", ["update", "slots"]), ("torch", ["update", "slots"])]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_ends_does_not_grow(tokens, tmp_path, schedule):
    settings = f"train.schedule={schedule}", "train.cosine_period=4", "train.valid_every=0"
    train(tiny_config(tokens, tmp_path / "run", *settings, "train.updates=2"))
    with pytest.raises(DistlmError, match=rf"train.schedule={schedule} is laid out over .*train.init_from="):
        train(tiny_config(tokens, tmp_path / "run", *settings, "train.updates=4"))


def test_means_go_on_over_a_stop_as_without(tokens, tmp_path):
    settings = "train.log_every=4", "train.valid_every=0", "train.save_every=3"
    train(tiny_config(tokens, tmp_path / "whole", *settings))
    stopped = tiny_config(tokens, tmp_path / "run", *settings, "train.max_updates_this_run=5")
    for _ in range(2):
        with pytest.raises(Stopped):
            train(stopped)
    train(stopped)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert same_end(tmp_path / "run", tmp_path / "whole")


def test_means_of_a_memory_go_on_over_a_stop_as_without(shards, tmp_path):
    settings = "memory.kind=resm", "train.log_every=4", "train.updates=8"
    train(plm_config(shards, tmp_path / "whole", *settings))
    stopped = plm_config(shards, tmp_path / "run", *settings, "train.max_updates_this_run=3")
    for _ in range(2):
        with pytest.raises(Stopped):
            train(stopped)
    train(stopped)
    one, two = lines(tmp_path / "whole"), lines(tmp_path / "run")
    assert any(name.startswith("memory/1/rows") for line in one.values() for name in line)
    assert one == two


def test_more_epochs_of_an_lstm_are_what_they_would_have_been(tokens, tmp_path):
    whole, grown = (tmp_path / name for name in ("whole", "grown"))
    train(lstm_config(tokens, whole, "awd.epochs=4", "awd.finetune_epochs=1"))
    train(lstm_config(tokens, grown, "awd.epochs=2", "awd.finetune_epochs=0"))
    train(lstm_config(tokens, grown, "awd.epochs=4", "awd.finetune_epochs=0"))
    longer = lstm_config(tokens, grown, "awd.epochs=4", "awd.finetune_epochs=1")
    assert not trained(longer, RunDir.of(longer))
    train(longer)
    assert trained(longer, RunDir.of(longer))
    assert same_end(whole, grown)
    one, two = ({k: v for k, v in state(folder).items() if k != "epoch"} for folder in (whole, grown))
    assert one == two
    with pytest.raises(DistlmError, match=r"awd.epochs: 4 there, 5 now: fine-tuning follows .*train.init_from="):
        train(lstm_config(tokens, grown, "awd.epochs=5", "awd.finetune_epochs=1"))
    # Fine-tuning that its length has ended goes on, too.
    for folder in (grown, tmp_path / "more"):
        train(lstm_config(tokens, folder, "awd.epochs=4", "awd.finetune_epochs=2"))
    assert same_end(grown, tmp_path / "more")


@pytest.mark.parametrize(("how", "grows"), [("average", False), ("halve", True), ("nothing", True)])
def test_epochs_may_grow_where_no_fine_tuning_follows(tokens, tmp_path, how, grows):
    """awd.finetune_epochs, which recipes set, is not read where nothing is averaged."""
    extra = f"awd.on_trigger={how}", "awd.finetune_epochs=2"
    with pytest.raises(Stopped):
        train(lstm_config(tokens, tmp_path / "run", *extra, "awd.epochs=1", "train.max_updates_this_run=1"))
    longer, run = lstm_config(tokens, tmp_path / "run", *extra, "awd.epochs=2"), RunDir(tmp_path / "run")
    if grows:
        run.refuse_other_config(longer, "train")
        return
    with pytest.raises(DistlmError, match=r"awd.epochs: 1 there, 2 now: fine-tuning follows"):
        run.refuse_other_config(longer, "train")


def test_another_run_starts_from_the_best_weights_with_a_schedule_of_its_own(tokens, tmp_path):
    first = tiny_config(tokens, tmp_path / "first")
    valid = train(first)["valid_loss"]
    source = tmp_path / "first"
    again = tiny_config(
        tokens, tmp_path / "again", f"train.init_from={source}", "train.updates=1", "train.lr=0",
        "train.warmup_updates=0", "train.schedule=cosine", "train.cosine_period=10", "train.min_lr=0",
        "train.optimizer=nag",
    )  # fmt: skip
    assert train(again)["valid_loss"] == pytest.approx(json.loads(
        (source / "checkpoints/best.json").read_text("utf-8"))["valid_loss"], abs=1e-6)  # fmt: skip
    assert valid is not None
    for words, said in (
        (
            ["model.width=64", f"train.init_from={source}"],
            r"train.init_from=.*\] there, \[.*\] here: another model",
        ),
        ([f"train.init_from={tmp_path}"], "neither a complete checkpoint nor a run directory with one"),
    ):
        with pytest.raises(DistlmError, match=said):
            train(tiny_config(tokens, tmp_path / "wrong", *words))
    damaged = tmp_path / "damaged"
    shutil.copytree(newest(source), damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(DistlmError, match=r"model\.safetensors"):
        train(tiny_config(tokens, tmp_path / "wrong", f"train.init_from={damaged}"))


def test_an_lstm_starts_from_another_with_other_dropouts_and_rate(tokens, tmp_path):
    source = tmp_path / "first"
    train(lstm_config(tokens, source, "awd.epochs=2", "awd.finetune_epochs=0"))
    best = json.loads((source / "checkpoints/best.json").read_text("utf-8"))["valid_loss"]
    other = lstm_config(
        tokens, tmp_path / "again", f"train.init_from={source}", "lstm.hidden_dropout=0.5", "lstm.weight_dropout=0",
        "train.lr=0", "awd.epochs=1", "awd.finetune_epochs=0", "train.weight_decay=0",
    )  # fmt: skip
    assert train(other)["valid_loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("extra", [(), ("memory.stale=catch_up",)])
def test_a_memory_goes_along(shards, tmp_path, extra):
    """Three messages used to send users in a circle: continue, start without memory, fine-tune."""
    memory = "memory.kind=pkm", *extra
    source = plm_config(shards, tmp_path / "first", *memory, "train.updates=4")
    last = train(source)["valid_loss"]
    settings = f"train.init_from={tmp_path / 'first'}", "train.updates=1", "train.lr=0", "train.warmup_updates=0"
    again = plm_config(shards, tmp_path / "again", *memory, *settings, "memory.lr=1e-12", "memory.norm_momentum=0")
    assert train(again)["valid_loss"] == pytest.approx(last, abs=1e-6)
    one, two = (memory_of(tmp_path / name, 1)["values"] for name in ("first", "again"))
    assert (one - two).abs().max() < 1e-6 or extra
    with pytest.raises(DistlmError, match=r"has a memory, and memory\.kind=none; set memory\.\* as there"):
        train(plm_config(shards, tmp_path / "dense", "memory.kind=none", *settings))
    with pytest.raises(DistlmError, match=r"train.init_from=.*takes it along"):
        train(plm_config(shards, tmp_path / "dense", *memory, f"plm.init_from={tmp_path / 'first'}"))
    with pytest.raises(UsageError, match=r"a model starts from one place; leave out plm\.init_from"):
        config_of("plm-base", plm_settings(shards, tmp_path / "x", *settings, "plm.init_from=somewhere"))
