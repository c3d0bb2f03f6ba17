"""Pretraining a masked language model on one rank: what is learned, resumed, started from, and refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, write_text
from support.kinds import readable
from support.plm import PLM, memory_of, plm_config, tiny_shards
from support.train import curve, newest, same_end
from torch import Tensor

from distlm.config import load_config
from distlm.data.shards.stage import run_shard
from distlm.errors import DistlmError, Stopped, UsageError
from distlm.models.plm.export import save_pretrained
from distlm.models.plm.io import load_plm
from distlm.models.plm.measure.evaluate import run_evaluate_plm
from distlm.models.plm.objective import MaskedModule
from distlm.models.plm.plan import plm_of
from distlm.models.plm.sizes import backbone_sizes
from distlm.models.plm.text.pieces import plan_rows
from distlm.runtime.files import read_json
from distlm.runtime.plan import StagePlan
from distlm.runtime.stage import open_stage
from distlm.training.loop import plan_train, run_train

RESM = ["memory.kind=resm"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("plm"))


def run(shards: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    with open_stage("train", plm_config(shards, folder, *overrides)) as stage:
        return run_train(stage)


def evaluate(shards: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    with open_stage("train", plm_config(shards, folder, *overrides)) as stage:
        return run_evaluate_plm(stage)


@pytest.fixture(scope="module")
def dense(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    run(shards, folder, "train.updates=30", "train.lr=0.01")
    return folder


@pytest.fixture(scope="module")
def resm(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resm") / "run"
    run(shards, folder, *RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true")
    return folder


def test_it_learns(dense: Path) -> None:
    losses = curve(dense)
    assert losses[30] < losses[1] - 0.3 and curve(dense, "perf/data_wait_s")[30] >= 0


def test_short_rows_first(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and masks as without, in pieces of 8, then of 12, then whole; and again after a stop."""
    seen: list[tuple[Tensor, ...]] = []
    forward = MaskedModule.forward

    def spy(self: MaskedModule, *tensors: Tensor | None) -> Tensor:
        if self.training:
            seen.append(tuple(tensor.clone() for tensor in tensors if tensor is not None))
        return forward(self, *tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(MaskedModule, "forward", spy)
    words = ["train.updates=5", "plm.short_rows=[8,12,64]", "plm.short_updates=[1,2,1]"]
    run(shards, tmp_path / "long", "train.updates=5")
    long, seen = seen, []
    run(shards, tmp_path / "short", *words)
    short, seen = seen, []
    with pytest.raises(Stopped):
        run(shards, tmp_path / "parts", *words, "train.max_updates_this_run=2")
    run(shards, tmp_path / "parts", *words)
    # Two micro-batches of 8 rows of 24 tokens in each update.
    assert [piece[0].shape for piece in short] == [(24, 8)] * 2 + [(16, 12)] * 4 + [(8, 24)] * 4
    for one, other, again in zip(long, short, seen, strict=True):
        *tensors, keys = other
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(one, tensors, strict=False))
        assert len(keys) == len(set(keys.tolist())) == len(tensors[0])
        assert all(torch.equal(a, b) for a, b in zip(other, again, strict=True))
    assert curve(tmp_path / "short") == curve(tmp_path / "parts")
    seen = []
    run(shards, tmp_path / "from", *words, f"plm.init_from={tmp_path / 'long'}")
    assert {piece[0].shape for piece in seen} == {(8, 24)}


def test_short_rows_must_divide_the_shards(shards: Path, tmp_path: Path) -> None:
    said = r"plm.short_rows=\[8, 10, 64\]: 10 does not divide the shards' rows of 24 tokens"
    with pytest.raises(DistlmError, match=said):
        run(shards, tmp_path / "run", "plm.short_rows=[8,10,64]", "plm.short_updates=[1,1,1]")


@pytest.mark.parametrize("extra", [["memory.row_steps=true"], ["memory.stale=catch_up", "memory.optimizer=adam"]])
def test_stopped_and_resumed_in_the_same_bytes(shards: Path, tmp_path: Path, extra: list[str]) -> None:
    words = [*RESM, "train.updates=12", "train.lr=0.01", *extra]
    run(shards, tmp_path / "whole", *words)
    for _ in range(2):
        with pytest.raises(Stopped, match="run the same command again"):
            run(shards, tmp_path / "parts", *words, "train.max_updates_this_run=5")
    run(shards, tmp_path / "parts", *words, "train.max_updates_this_run=5")
    assert same_end(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    for layer in (1, 3):
        one, other = memory_of(tmp_path / "whole", layer), memory_of(tmp_path / "parts", layer)
        assert one.keys() == other.keys() and len(one) > 6
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_checkpoint_holds_the_model_that_was_validated(shards: Path, resm: Path) -> None:
    """Loaded anew, with its memory, it gives the validation loss that training logged."""
    words = [*RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true"]
    evaluate(shards, resm, *words)
    found = read_json(resm / "lm.json", "")["splits"]["valid"]
    assert found["loss_nats"] == pytest.approx(curve(resm, "valid/loss")[12], rel=1e-6)
    assert 0 < found["memory"]["1"]["top1_mu"] <= found["memory"]["1"]["mu"] <= 1


@pytest.mark.parametrize("kind", ["pkm", "resm"])
def test_memory_from_a_dense_model(shards: Path, dense: Path, tmp_path: Path, kind: str) -> None:
    """Kim & Jung section 3.3: the dense weights are taken over; a ResM memory of zeros begins at the dense loss."""
    still = ["train.lr=0", "memory.lr=0", "train.warmup_updates=0", "train.updates=1", "memory.values=zero"]
    run(shards, tmp_path / "run", f"memory.kind={kind}", f"plm.init_from={dense}", *still)
    loss, before = curve(tmp_path / "run", "valid/loss")[1], curve(dense, "valid/loss")[30]
    assert (loss == pytest.approx(before, abs=1e-7)) == (kind == "resm")
    model, _ = load_plm(newest(tmp_path / "run"))
    source, _ = load_plm(newest(dense))
    weights = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert ".memory." in name or torch.equal(parameter, weights[name]), name


def test_fresh_ffn_beside_the_memory(shards: Path, dense: Path, tmp_path: Path) -> None:
    """ResM′: the feed-forward networks of the memory's layers start anew, the others do not."""
    still = ["train.lr=0", "train.warmup_updates=0", "train.updates=1"]
    run(shards, tmp_path / "run", *RESM, "memory.fresh_ffn=true", f"plm.init_from={dense}", *still)
    model, weights = load_plm(newest(tmp_path / "run"))[0], dict(load_plm(newest(dense))[0].named_parameters())
    changed = {name for name, p in model.named_parameters() if name in weights and not torch.equal(p, weights[name])}
    assert changed and all((".layer.0." in n or ".layer.2." in n) and "attention" not in n for n in changed)


def test_frozen_values_stay(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", *RESM, "memory.frozen=true", "train.updates=4", "train.save_every=1")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first, last = (load_plm(folder)[0] for folder in (checkpoints[0], checkpoints[-1]))
    assert torch.equal(first.memories[1].table.values, last.memories[1].table.values)


def another_vocabulary(tmp_path: Path, shards: Path) -> Path:
    words = [*TINY, *PLM, f"shards.text_dir={write_text(tmp_path / 'text', words=30)}", f"run_dir={tmp_path / 'p'}"]
    with open_stage(
        "shard", load_config("plm-base", readable([*words, f"shards.folder={tmp_path / 'shards'}"]))
    ) as stage:
        run_shard(stage)
    return tmp_path / "shards"


def test_another_vocabulary_is_refused(shards: Path, dense: Path, resm: Path, tmp_path: Path) -> None:
    others = another_vocabulary(tmp_path, shards)
    with pytest.raises(DistlmError, match=r"plm.init_from=.*another tokenizer .*make shards with its vocabulary"):
        run(others, tmp_path / "a", *RESM, f"plm.init_from={dense}")
    words = [*RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true"]
    shutil.copytree(resm, tmp_path / "b")
    with pytest.raises(DistlmError, match=r"vocabulary mismatch|shards of another tokenizer"):
        evaluate(shards, tmp_path / "b", *words, f"plm.texts=[other={others}]")


def test_a_checkpoint_without_its_memory_is_refused(shards: Path, resm: Path, tmp_path: Path) -> None:
    words = [*RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true"]
    shutil.copytree(resm, tmp_path / "run")
    (file,) = newest(tmp_path / "run").glob("memory-03-*.safetensors")
    file.unlink()
    with pytest.raises(DistlmError, match=r"memory.*3"):
        evaluate(shards, tmp_path / "run", *words)
    with pytest.raises(DistlmError, match=r"memory-03-.*damaged \(missing"):
        run(shards, tmp_path / "run", *words)


def test_a_cut_memory_is_refused(shards: Path, resm: Path, tmp_path: Path) -> None:
    shutil.copytree(resm, tmp_path / "run")
    (file,) = newest(tmp_path / "run").glob("memory-03-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DistlmError, match="memory-03-"):
        load_plm(newest(tmp_path / "run"))


def test_a_changed_value_is_refused(shards: Path, resm: Path, tmp_path: Path) -> None:
    """One bit of one value: the file is whole to look at."""
    shutil.copytree(resm, tmp_path / "run")
    (file,) = newest(tmp_path / "run").glob("memory-03-*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)
    with pytest.raises(DistlmError, match=r"memory-03-.*damaged \(other content.*copy the whole checkpoint folder"):
        load_plm(newest(tmp_path / "run"))
    with pytest.raises(DistlmError, match=r"memory-03-.*damaged \(other content.*continue from the checkpoint before"):
        run(shards, tmp_path / "run", *RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("memory.kind=pkm", "memory.kind: 'resm' there, 'pkm' now"),
        ("memory.lr=0.1", "memory.lr: 0.001 there, 0.1 now"),
        ("plm.dropout=0.3", "plm.dropout: 0.1 there, 0.3 now"),
        ("plm.mask_share=0.2", "plm.mask_share: 0.15 there, 0.2 now"),
    ],
)
def test_another_model_in_the_same_folder_is_refused(
    shards: Path, resm: Path, tmp_path: Path, changed: str, said: str
) -> None:
    shutil.copytree(resm, tmp_path / "run")
    words = [*RESM, "train.updates=12", "train.lr=0.01", "memory.row_steps=true"]
    with pytest.raises(DistlmError, match=f"other settings \\({said}\\)"):
        run(shards, tmp_path / "run", *words, changed)
    # How many ranks share the columns decides about speed only.
    assert run(shards, tmp_path / "run", *words, "memory.columns=1")["step"] == 12


REFUSED = [
    (["memory.kind=resm", "memory.k=9"], "memory.k=9"),
    (["memory.kind=resm", "memory.positions=[3,1]"], "memory.positions"),
    (["memory.kind=pkm", "memory.fresh_ffn=true"], "memory.fresh_ffn"),
    (["memory.kind=resm", "memory.columns=3"], "memory.columns=3"),
    (["plm.width=30", "plm.heads=4"], "plm.width=30"),
    (["plm.init_std=0"], "plm.init_std=0"),
    (["plm.short_rows=[4]", "plm.short_updates=[9]"], "plm.short_rows"),
    (["plm.short_rows=[8,12]", "plm.short_updates=[9]"], "plm.short_updates"),
    (["train.optimizer=nt_asgd"], "train.optimizer='nt_asgd'"),
    (["train.l2_weight=1"], "train.l2_weight"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_that_cannot_work(shards: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plm_config(shards, tmp_path / "run", *overrides)


def test_rows_longer_than_the_model_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"rows of 24 tokens are longer than plm.max_positions=16"):
        run(shards, tmp_path / "run", "plm.max_positions=16")


def test_a_checkpoint_brings_its_own_sizes(shards: Path, dense: Path, tmp_path: Path) -> None:
    """The plan counts a memory of the checkpoint's width, and rows are refused that it has no positions for."""
    model, card = load_plm(newest(dense))
    save_pretrained(model, tmp_path / "hf", shards / "tokenizer")
    given = f"plm.checkpoint={tmp_path / 'hf'}"
    config = plm_config(shards, tmp_path / "run", *RESM, given, "plm.width=512")
    sizes = backbone_sizes(plm_of(config).backbone)
    other = dataclasses.replace(config.plm, width=model.width, checkpoint="")
    assert (sizes.width, sizes.layers) == (model.width, card.config["backbone"]["num_hidden_layers"])
    same = plan_train(dataclasses.replace(config, plm=other), 1)
    assert plan_train(config, 1).disk_bytes == same.disk_bytes
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 16}))
    with pytest.raises(DistlmError, match=r"rows of 24 tokens are longer than the 16 positions of plm.checkpoint="):
        run(shards, tmp_path / "run", *RESM, given)


def test_rows_over_ranks(shards: Path, tmp_path: Path) -> None:
    train = plm_config(shards, tmp_path).train
    plan = plan_rows(train, 4)
    assert (plan.micro_blocks, plan.micro_batches, plan.accumulation) == (2, 8, 2)
    rows = [list(range(16))[plan.blocks_of(number)] for rank in range(4) for number in plan.of_rank(rank)]
    assert rows[:2] == [[0, 1], [8, 9]] and sorted(row for piece in rows for row in piece) == list(range(16))
    with pytest.raises(DistlmError, match=r"train.micro_blocks=8.* 3 ranks do not divide it; set .*=15 and .*=3; or"):
        plan_rows(train, 3)
    with pytest.raises(DistlmError, match=r"does not divide train.blocks_per_update=12; set train.micro_blocks=6"):
        plan_rows(dataclasses.replace(train, blocks_per_update=12), 1)


@pytest.mark.parametrize("recipe", ["plm-base", "plm-base-pkm", "plm-base-resm", "plm-base", "plm-small-resm"])
def test_plan_of_the_recipes(recipe: str, tmp_path: Path) -> None:
    plan = plan_train(load_config(recipe, [f"run_dir={tmp_path}"]), 2)
    assert plan.disk_bytes > 0 and plan.seconds and "no shards yet" in plan.line()
    assert ("dense all-reduce" in plan.line()) == ("pkm" in recipe or "resm" in recipe)


def test_the_plan_has_a_saves_memory_where_activations_are_fewer(tmp_path: Path) -> None:
    def planned(micro: int) -> StagePlan:
        settings = [
            f"run_dir={tmp_path}",
            f"train.micro_blocks={micro}",
            "train.blocks_per_update=256",
            "shards.row_tokens=128",
        ]
        return plan_train(load_config("plm-base", settings), 1)

    few, many = planned(1), planned(256)
    assert few.host_bytes == many.host_bytes > few.device_bytes / 10
    assert few.memory_bytes > few.device_bytes and many.memory_bytes == many.device_bytes


def test_columns_that_do_not_divide_are_refused_by_the_plan(shards: Path, tmp_path: Path) -> None:
    config = plm_config(shards, tmp_path / "run", *RESM, "memory.columns=8")
    with pytest.raises(UsageError, match=r"memory.columns=8 .*must divide 4 ranks .* one of 1, 2, 4"):
        plan_train(config, 4)
