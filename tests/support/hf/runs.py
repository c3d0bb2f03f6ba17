"""Small models of Hugging Face with tokenizers of their own, a finished run of each, and a KnnLM round them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import distlm
from distlm.config.load import load_config
from distlm.data.prepare import run_prepare
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.hf.config import HfRun
from distlm.models.hf.importer import import_hf
from distlm.runtime.rundir import RunDir
from distlm.training.loop import run_train
from support import write_text
from support.config import run_of
from support.foreign.hf import save_gemma2, save_gpt2, save_llama
from support.knn import in_stage
from support.shared import made_once

SETTINGS = [
    "train.tokens_per_sample=64", "datastore.context_window=32", "datastore.block=32", "datastore.batch_blocks=4",
    "datastore.rows_per_shard=512", "index.factory=IVF16,PQ4", "index.sample=4096", "knn.context_window=32",
    "knn.block=32", "knn.batch_blocks=4", "knn.blocks_per_unit=8", "knn.k=16", "knn.ks=[8]", "knn.nprobe=4",
    "knn.buckets=4", "knn.gate=false", "knn.splits=[valid]", "knn.ladder_sample=0",
    "knn.lambdas=[0,0.2,0.4,0.6]", "launch.threads=0",
]  # fmt: skip
MEMORY = [
    "memory.kind=resm", "memory.positions=[1]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4",
    "memory.key_width=8", "train.updates=1", "train.valid_every=1", "train.warmup_updates=0",
]  # fmt: skip
SAVE: dict[str, Callable[[Path, Path], Path]] = {
    "gpt2": save_gpt2, "llama": save_llama, "llama-begins": partial(save_llama, begins=True), "gemma2": save_gemma2,
}  # fmt: skip
"""The last two have a token in front of each text; Gemma 2 caps its logits."""


@dataclass(frozen=True)
class Made:
    """A saved model, the text it is for, and a finished run of it."""

    folder: Path
    text: Path
    config: HfRun

    @property
    def run(self) -> RunDir:
        return RunDir.of(self.config)

    def split(self, name: str) -> str:
        """Text of a split."""
        return (self.text / f"{name}.txt").read_text("utf-8")

    def model(self) -> Any:
        """The model of transformers, without tokens that end a generation."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder)
        model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    def tokenizer(self) -> Any:
        """Of transformers, padding on the left."""
        from transformers import PreTrainedTokenizerFast

        found = PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"), padding_side="left")
        found.pad_token = found.convert_ids_to_tokens(0)
        return found

    def knn(self, model: Any = None, **words: Any) -> "distlm.KnnLM":
        """Round a model, without a store."""
        return distlm.KnnLM(self.model() if model is None else model, self.tokenizer(), **words)


def made_run(factory: pytest.TempPathFactory, name: str, memory: bool = False) -> Made:
    """A run of one of SAVE, made once in a session: imported as it is, or with a `memory`, and trained for an update;
    stored, searched, tuned and evaluated on valid. Read only."""
    folder = made_once(factory, f"hf-{name}{'-memory' if memory else ''}", lambda new: _make(name, new, memory))
    return Made(folder / "model", folder / "text", _config(name, folder, memory))


def with_gate(made: Made, run: Path) -> Made:
    """The same run in another folder, with a gate fitted on valid, and evaluated on test with it."""
    shutil.copytree(made.run.root, run)
    settings = [f"run_dir={run}", "knn.gate=true", "knn.splits=[valid,test]"]
    config = run_of(HfRun, load_config(str(run), settings))
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    return Made(made.folder, made.text, config)


def _config(name: str, folder: Path, memory: bool) -> HfRun:
    model, tap = folder / "model", "transformer.h.1.mlp:input" if name == "gpt2" else "model.layers.1.mlp:input"
    settings = [f"hf.name={model}", f"data.tokenizer={model}", f"data.text_dir={folder / 'text'}",
                f"run_dir={folder / 'run'}", f"train.tap={tap}", f"datastore.tap={tap}"]  # fmt: skip
    return run_of(HfRun, load_config("hf", [*settings, *SETTINGS, *(MEMORY if memory else [])]))


def _make(name: str, folder: Path, memory: bool) -> None:
    SAVE[name](folder / "model", write_text(folder / "text", train_lines=160))
    config = _config(name, folder, memory)
    in_stage("prepare", config, run_prepare)
    if memory:
        in_stage("train", config, run_train)
    else:
        import_hf(config)
    for stage, function in (
        ("datastore", run_datastore_write), ("index", run_index_build), ("knn", run_search), ("knn", run_tune),
        ("knn", run_evaluate),
    ):  # fmt: skip
        in_stage(stage, config, function)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows of every forward pass of a model in the block."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _module, _given, named: passes.append(len(named["input_ids"])),
                                           with_kwargs=True)  # fmt: skip
    try:
        yield passes
    finally:
        hook.remove()
