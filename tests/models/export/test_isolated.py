"""Exported folders of every kind, loaded in a process that has no distlm: the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import distlm, write_text
from support.export.isolated import without_distlm
from support.finetune import hugging_face, pretrained
from support.foreign.hf import save_gpt2, save_llama
from support.knn import in_stage
from support.store import tiny_config
from torch import Tensor

from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.finished.export import save_task_model
from distlm.finetune.model import TaskModel
from distlm.finetune.source import open_source
from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import save_memories
from distlm.models.described import build_model, model_of
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import hf_model
from distlm.models.io import load_model, save_model
from distlm.models.plm.config import FinetuneConfig
from distlm.models.plm.io import load_plm
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir
from distlm.training.checkpoint import seal

LOAD = """
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for line in sys.stdin if len(sys.argv) < 2 else Path(sys.argv[1]).read_text().splitlines():
    auto, folder, rows, out = line.split("\\t")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(**load_file(rows))
    names = [name for name in ("logits", "start_logits", "end_logits") if name in found]
    save_file({name: found[name].contiguous() for name in names}, out)
assert "distlm" not in sys.modules
"""


class Case(NamedTuple):
    auto: str
    folder: Path
    given: dict[str, Tensor]
    """What the model is called with."""
    wanted: dict[str, Tensor]
    """Output → what it is by our own model; NaN where it does not count."""


def padded_rows(vocabulary: int, first: int = 5) -> tuple[Tensor, Tensor]:
    mask = torch.arange(9) < torch.tensor([9, 6, 2])[:, None]
    tokens = torch.randint(first, vocabulary, (3, 9), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(~mask, 0), mask


def export(run_dir: Path, out: Path, *more: str) -> str:
    return distlm("export", "hf", str(run_dir), "--out", str(out), *more).stdout


def masked(folder: Path, kind: str, **changes: Any) -> Case:
    run = pretrained(folder / "run", kind, **changes)
    distlm("export", "hf", "plm-base", f"run_dir={run}", "--out", str(folder / "hf"))
    model = load_plm(run / "checkpoints" / "step-00000007")[0]
    tokens, mask = padded_rows(model.vocabulary)
    with torch.no_grad(), model.rows.set(None, mask):
        logits = model.hf(input_ids=tokens, attention_mask=mask).logits
    wanted = logits.masked_fill(~mask[:, :, None], torch.nan)
    return Case(
        "AutoModelForMaskedLM", folder / "hf", {"input_ids": tokens, "attention_mask": mask.long()}, {"logits": wanted}
    )


def finetuned(folder: Path, family: str, head: Any, labels: int, task: str) -> Case:
    source = open_source(
        FinetuneConfig(checkpoint=str(hugging_face(folder / "from", family, initializer_range=0.2))), folder, folder
    )
    memory = MemoryConfig(
        kind="resm" if head == "span" else "pkm", sub_keys=8, heads=2, k=4, key_width=8, positions=[2]
    )
    torch.manual_seed(7)
    model = TaskModel(TaskModelConfig(source.backbone, vars(memory), 1, head, labels, task), source.vocabulary).eval()
    for found in model.memories.values():
        found.table.values.normal_()
        assert found.retrieval.norm is not None
        found.retrieval.norm.running_mean.uniform_(-1, 1)
    save_task_model(model, source.tokenizer, folder / "hf")
    tokens, mask = padded_rows(source.vocabulary)
    types = torch.zeros_like(tokens)
    with torch.no_grad(), model.rows.set(None, mask):
        scores = model(tokens, types)
    given = {"input_ids": tokens, "attention_mask": mask.long()}
    if head == "span":
        start, end = scores.masked_fill(~mask[:, :, None], torch.nan).unbind(-1)
        return Case("AutoModelForQuestionAnswering", folder / "hf", given, {"start_logits": start, "end_logits": end})
    return Case("AutoModelForSequenceClassification", folder / "hf", given, {"logits": scores})


def causal(folder: Path, config: Any) -> Case:
    run = RunDir.of(config)
    export(run.root, folder / "hf")
    model, _ = load_model(run.model_checkpoint(config))
    tokens = TokenFiles.open(run.tokens(config))
    ids = torch.from_numpy(tokens.split("test")[:40].astype("int64")).view(2, 20)
    hf = config.model.kind == "hf"
    with torch.no_grad():
        hidden = model(ids).hidden
        logits = model.full_log_probs(hidden.flatten(0, 1)).unflatten(0, (2, 20))
        if hf:
            # Its own logits are not normalised, and its ids are the pieces'.
            ids = model._rows(ids)  # type: ignore[operator]
            logits = model.hf(input_ids=ids).logits  # type: ignore[operator]
    return Case("AutoModelForCausalLM", folder / "hf", {"input_ids": ids}, {"logits": logits})


def words(folder: Path, *settings: str) -> Case:
    """A model over words."""
    config: Any = tiny_config(folder / "run", write_text(folder / "text"), settings)
    in_stage("prepare", config, run_prepare)
    return causal(folder, with_checkpoint(config, model_of(config)))


def pieces(folder: Path, save: Callable[[Path, Path], Path], *settings: str) -> Case:
    """A model of Hugging Face."""
    text = write_text(folder / "text")
    name = save(folder / "from", text)
    given = ["model.kind=hf", f"hf.name={name}", f"data.tokenizer={name}", "train.tap=output", *settings]
    config: Any = tiny_config(folder / "run", text, given)
    in_stage("prepare", config, run_prepare)
    tokens = TokenFiles.open(RunDir.of(config).tokens(config))
    return causal(folder, with_checkpoint(config, with_memory(hf_model(str(name), tokens), config.memory, 3)))


def with_checkpoint(config: Any, description: Any) -> Any:
    """A checkpoint of random weights, the memory's statistics not those of a fresh one."""
    run = RunDir.of(config)
    dictionary = TokenFiles.open(run.tokens(config)).dictionary
    torch.manual_seed(0)
    model = build_model(description, len(dictionary))
    folder = run.checkpoints / ".new"
    save_model(model, folder, {"dictionary": dictionary.hash, "step": 1})
    memories = getattr(model, "memories", {})
    for memory in memories.values():
        memory.table.values.normal_()
        memory.retrieval.norm.running_mean.uniform_(-1, 1)
    save_memories(memories, folder, {layer: memory.extra_state_tensors() for layer, memory in memories.items()})
    seal(folder, run.checkpoint(1), 1)
    write_json(run.checkpoints / "best.json", {"checkpoint": run.checkpoint(1).name, "valid_loss": 1.0})
    return config


MEMORY = ["memory.positions=[1,2]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4", "memory.key_width=8"]
LSTM = ["model.kind=awd_lstm", "train.optimizer=nt_asgd", "lstm.width=16", "lstm.hidden_width=24", "lstm.layers=2"]
CASES: dict[str, Callable[[Path], Case]] = {
    "bert": lambda folder: masked(folder, "none"),
    "bert-pkm": lambda folder: masked(folder, "pkm"),
    "bert-resm": lambda folder: masked(folder, "resm", stale="catch_up", query_norm=False),
    "distilbert-pkm-labels": lambda folder: finetuned(folder, "distilbert", "labels", 3, "MNLI"),
    "roberta-pkm-number": lambda folder: finetuned(folder, "roberta", "number", 1, "STS-B"),
    "bert-resm-span": lambda folder: finetuned(folder, "bert", "span", 2, "SQuAD"),
    "bert-shared-gated": lambda folder: masked(folder, "resm", shared=True, gated=True),
    "transformer_lm": lambda folder: words(folder),
    "transformer_lm-pkm": lambda folder: words(folder, "memory.kind=pkm", *MEMORY),
    "transformer_lm-shared-gated": lambda folder: words(
        folder, "memory.kind=resm", "memory.shared=true", "memory.gated=true", "memory.beta=0.5", *MEMORY
    ),
    "awd_lstm": lambda folder: words(folder, *LSTM),
    "hf": lambda folder: pieces(folder, save_gpt2),
    "hf-gpt2-resm": lambda folder: pieces(folder, save_gpt2, "memory.kind=resm", "memory.gated=true", *MEMORY),
    "hf-llama-pkm": lambda folder: pieces(folder, save_llama, "memory.kind=pkm", "memory.shared=true", *MEMORY),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, dict[str, Tensor]]]:
    """Each case, and what one process without distlm computes from its folder."""
    base = tmp_path_factory.mktemp("exported")
    cases, lines = {}, []
    for name, make in CASES.items():
        (base / name).mkdir()
        case = cases[name] = make(base / name)
        save_file(case.given, base / name / "rows")
        lines.append("\t".join([case.auto, str(case.folder), str(base / name / "rows"), str(base / name / "out")]))
    (base / "work").write_text("\n".join(lines))
    (base / "home").mkdir()
    without_distlm(LOAD, base / "work", home=base / "home")
    return {name: (case, load_file(base / name / "out")) for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_same_without_distlm(found: Any, name: str) -> None:
    case, there = found[name]
    assert there.keys() == case.wanted.keys()
    for output, wanted in case.wanted.items():
        counts = ~wanted.isnan()
        assert counts.any() and wanted.nan_to_num(0, 0, 0).abs().max() > 0.01
        torch.testing.assert_close(there[output][counts], wanted[counts], rtol=0, atol=1e-5)
