"""The transformer as a Hugging Face folder (distlm.models.export.word_model)."""

import argparse

from distlm.models.export.word_model import WordModel, export_words
from distlm.models.transformer.config import TransformerRun

_HERE = "distlm.models.transformer"
_CONFIG = f"{_HERE}.modeling:DistlmTransformerConfig"
WORD_MODEL = WordModel(
    f"{_HERE}.modeling:DistlmTransformerForCausalLM",
    _CONFIG,
    {
        f"{_HERE}.config:TransformerConfig": _CONFIG,
        # Memories are read and not trained, and dropout need not belong to rows.
        f"{_HERE}.model:rows_for": f"{_HERE}.modeling:no_rows",
        f"{_HERE}.model:equip": f"{_HERE}.modeling:equip_readers",
        "distlm.memory.layer:ProductKeyMemory": "distlm.memory.inference:MemoryReader",
        "distlm.memory.values.exchange:Exchange": "object",
        "distlm.models.row_dropout:Noise": "distlm.models.dropout:PlainNoise",
    },
    {f"{_HERE}.model:TransformerLM": ["log_probs"], f"{_HERE}.adaptive:AdaptiveSoftmax": ["forward"]},
)


def export_run(config: TransformerRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf`: the best checkpoint of a run. Raises DistlmError as export_words."""
    return export_words(
        config, options, WORD_MODEL,
        "A transformer language model over words with adaptive input and softmax (Baevski & Auli 2019){memory}.",
    )  # fmt: skip
