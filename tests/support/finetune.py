"""Helpers of the fine-tuning tests: a tiny vocabulary, tiny models of Hugging Face, tiny tasks that can be learnt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlm.config.schema import RunConfig
from distlm.data.shards.wordpiece import SPECIALS, WordPiece
from distlm.models.plm.config import PlmRun
from support.config import config_of, run_of

GOOD, BAD = [f"good{i}" for i in range(6)], [f"bad{i}" for i in range(6)]
FILLER = [f"word{i}" for i in range(40)]
PIECES = (*SPECIALS, *GOOD, *BAD, *FILLER, *"abcdefghijklmnopqrstuvwxyz0123456789?.", "a1", "b2")


def vocabulary(folder: Path) -> WordPiece:
    """A vocabulary of whole words, saved with its tokenizer files."""
    wordpiece = WordPiece(tuple(dict.fromkeys(PIECES)), True)
    folder.mkdir(parents=True, exist_ok=True)
    wordpiece.save(folder, 64)
    return wordpiece


def hugging_face(folder: Path, model_type: str = "bert", **changes: Any) -> Path:
    """A tiny encoder without a head, with its tokenizer, as a Hugging Face folder."""
    import transformers

    size = len(vocabulary(folder).pieces)
    given: dict[str, Any] = {
        "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    }[model_type]
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=size, max_position_embeddings=66, pad_token_id=0, **given | changes
    )
    torch.manual_seed(5)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def pretrained(run: Path, memory: str = "resm", **changes: Any) -> Path:
    """A run directory with a checkpoint of a tiny BERT of distlm, as pretraining leaves it, and its shards' tokenizer.

    The query norm's statistics, the values' moments and when they were updated are not those of a fresh model.
    """
    from distlm.memory.config import MemoryConfig
    from distlm.memory.of_model import save_memories
    from distlm.memory.values.exchange import Exchange
    from distlm.models.io import save_weights
    from distlm.models.plm.config import PlmConfig
    from distlm.models.plm.model import Plm, plm_model
    from distlm.training.checkpoint import seal

    wordpiece = vocabulary(run / "shards" / "tokenizer")
    given = {"sub_keys": 8, "heads": 2, "k": 4, "key_width": 8, "positions": [1, 2]} | changes
    plm = PlmConfig(layers=2, width=32, heads=2, ffn_width=64, max_positions=64)
    config = plm_model(plm, MemoryConfig(kind=memory, **given), seed=3)  # type: ignore[arg-type]
    config.backbone["initializer_range"] = 0.2
    torch.manual_seed(5)
    model = Plm(config, len(wordpiece.pieces), Exchange.alone())
    folder = run / "checkpoints" / ".step-00000007.tmp"
    folder.mkdir(parents=True)
    extra = {"dictionary": wordpiece.hash, "step": 7, "tap": ""}
    save_weights(dict(model.named_parameters()), config, len(wordpiece.pieces), folder, extra)
    generator = torch.Generator().manual_seed(11)
    for found in model.memories.values():
        for moment in found.table.make_moments():
            moment.uniform_(generator=generator)
        found.table.updates = 7
        found.table.last_step.random_(0, 8, generator=generator)
        if found.retrieval.norm is not None:
            found.retrieval.norm.running_mean.uniform_(-1, 1, generator=generator)
    save_memories(model.memories, folder, {n: memory.extra_state_tensors() for n, memory in model.memories.items()})
    seal(folder, run / "checkpoints" / "step-00000007", 7)
    return run


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences with the label that most of their good and bad words have."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(random.random() < 0.6)
        words = [*random.choice(GOOD if label else BAD, 3), *random.choice(FILLER, int(random.integers(2, 12)))]
        random.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write_sst2(folder: Path, train: int = 96, dev: int = 40) -> Path:
    """A folder like GLUE's with SST-2 of such sentences."""
    (folder / "SST-2").mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("dev", dev, 2)):
        lines = ["sentence\tlabel", *(f"{text} \t{label}" for text, label in sentences(count, seed))]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def write_test(folder: Path, count: int = 13) -> None:
    """SST-2's test set beside the others: such sentences, without labels, under ids of their own."""
    rows = [f"{100 + number}\t{text} " for number, (text, _) in enumerate(sentences(count, 3))]
    (folder / "SST-2" / "test.tsv").write_text("\n".join(["index\tsentence", *rows]) + "\n", "utf-8")


def settings(run: Path, data: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny fine-tuning over the recipe plm-base."""
    return [
        f"run_dir={run}", f"finetune.data_dir={data}", "finetune.task=SST-2", "finetune.seeds=[1]", "finetune.epochs=2",
        "finetune.rows_per_update=16", "finetune.length=32", "finetune.lr=0.003", "launch.threads=1", *overrides,
    ]  # fmt: skip


def finetune_config(run: Path, data: Path, *overrides: str) -> PlmRun:
    """The same as a configuration."""
    return run_of(PlmRun, config_of("plm-base", settings(run, data, *overrides)))


def run(config: RunConfig) -> dict[str, Any]:
    """`distlm finetune` in this process."""
    from distlm.finetune.stage import run_finetune
    from distlm.runtime.stage import open_stage

    with open_stage("finetune", config) as stage:
        return run_finetune(stage)


def evaluate(config: RunConfig) -> dict[str, Any]:
    """`distlm finetune --evaluate-only` in this process."""
    from distlm.finetune.finished.evaluate import run_evaluate_finetuned
    from distlm.runtime.stage import open_stage

    with open_stage("finetune", config) as stage:
        return run_evaluate_finetuned(stage)


def lines(path: Path) -> Sequence[dict[str, Any]]:
    """Lines of a metrics file."""
    import json

    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
