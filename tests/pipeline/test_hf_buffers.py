"""A model with persistent buffers through the stages: imported as it is, trained, stopped, resumed, exported."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_text
from support.config import run_of
from support.foreign.hf import save_gemma4
from support.knn import in_stage
from support.train import newest, same_end

from distlm.config.load import load_config
from distlm.data.prepare import run_prepare
from distlm.errors import DistlmError, Stopped
from distlm.models.buffers import kept_buffers
from distlm.models.hf.config import HfRun
from distlm.models.hf.export import export_run
from distlm.models.hf.job import HfJob
from distlm.models.io import load_model
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.rundir import RunDir
from distlm.training.checkpoint import _buffers
from distlm.training.loop import run_train

SETTINGS = [
    "train.tap=output", "train.tokens_per_sample=64", "train.blocks_per_update=2", "train.warmup_updates=0",
    "train.valid_every=0", "train.save_every=0", "train.log_every=1", "launch.threads=1",
]  # fmt: skip
SCALES = [0.3, 1.3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, gemma4/, and tokens/ of both."""
    folder = tmp_path_factory.mktemp("hf_buffers")
    save_gemma4(folder / "gemma4", write_text(folder / "text", train_lines=60))
    in_stage("prepare", config_of(folder, folder / "prepare"), run_prepare)
    return folder


def config_of(folder: Path, run: Path, *extra: str) -> HfRun:
    words = [f"data.text_dir={folder / 'text'}", f"data.tokens_dir={folder / 'tokens'}", f"run_dir={run}"]
    model = folder / "gemma4"
    return run_of(HfRun, load_config("hf", [f"hf.name={model}", f"data.tokenizer={model}", *words, *SETTINGS, *extra]))


def scales(model: Any) -> list[float]:
    return [float(buffer) for buffer in kept_buffers(model).values()]


def log_probs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """ln p of each next piece under a model of transformers: [n, V]."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    return found


def test_imported_and_exported_it_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(folder, tmp_path / "run", "train.updates=0")
    made: dict[str, Any] = in_stage("train", config, run_train)
    run = RunDir.of(config)
    original = AutoModelForCausalLM.from_pretrained(folder / "gemma4").eval()
    model: Any = load_model(run.checkpoint(0))[0]
    ids = [1, 5, 9, 17, 3, 8, 2, 2, 4]
    expected = log_probs(original, ids)
    assert scales(model) == pytest.approx(SCALES) and torch.equal(log_probs(model.hf, ids), expected)
    options = argparse.Namespace(out=str(tmp_path / "out"), push=None, public=False)
    export_run(config, options)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(log_probs(exported, ids), expected)
    again = config_of(folder, tmp_path / "again", "train.updates=0", f"hf.name={tmp_path / 'out'}")
    found: dict[str, Any] = in_stage("train", again, run_train)
    assert found["valid_loss"] == made["valid_loss"] and math.isfinite(made["valid_loss"])
    weights = [(RunDir.of(one).checkpoint(0) / "model.safetensors").read_bytes() for one in (config, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("extra", [
    ("train.deepspeed=zero1",),
    ("train.deepspeed=zero2", "train.precision=bf16", "memory.kind=resm", "memory.positions=[1]", "memory.sub_keys=8",
     "memory.heads=2", "memory.k=4", "memory.key_width=8"),
], ids=["fp32", "bf16-memory"])  # fmt: skip
def test_resumed_it_ends_as_undisturbed(
    folder: Path, tmp_path: Path, extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they change in training: a checkpoint has those of its update."""
    begin = HfJob.begin_update

    def moved(job: HfJob, update: int) -> None:
        begin(job, update)
        for buffer in kept_buffers(job.net).values():
            assert buffer.dtype == torch.float32
            buffer.add_(0.01)

    monkeypatch.setattr(HfJob, "begin_update", moved)
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    in_stage("train", config_of(folder, whole, "train.updates=4", *extra), run_train)
    with pytest.raises(Stopped):
        stopping = config_of(folder, halves, "train.updates=4", "train.max_updates_this_run=2", *extra)
        in_stage("train", stopping, run_train)
    assert scales(load_model(newest(halves))[0]) == pytest.approx([scale + 0.02 for scale in SCALES])
    in_stage("train", config_of(folder, halves, "train.updates=4", *extra), run_train)
    assert scales(load_model(newest(halves))[0]) == pytest.approx([scale + 0.04 for scale in SCALES])
    assert same_end(whole, halves)


class OfTwo(SingleComm):
    """Another rank beside this one, with a buffer of its own."""

    size = 2

    def allgather(self, value: Any) -> list[Any]:
        return [value, dict.fromkeys(value, "other")]


class Holder:
    """As much of an engine as is asked for buffers."""

    def buffers(self) -> dict[str, torch.Tensor]:
        return {"hf.scale": torch.ones(())}


def test_ranks_that_differ_are_refused() -> None:
    assert _buffers(SingleComm(), Holder()).keys() == {"hf.scale"}  # type: ignore[arg-type]
    with pytest.raises(
        DistlmError, match=r"buffer hf.scale is not the same on the 2 ranks: .* train this model on one"
    ):
        _buffers(OfTwo(), Holder())  # type: ignore[arg-type]
