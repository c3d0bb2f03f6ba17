"""The transformer as a Hugging Face folder (distlm.models.export.word_model)."""

import argparse

from distlm.models.export.word_model import WordModel, export_words
from distlm.models.transformer.config import TransformerRun

_HERE = "distlm.models.transformer"
WORD_MODEL = WordModel(
    f"{_HERE}.modeling:DistlmTransformerForCausalLM",
    f"{_HERE}.modeling:DistlmTransformerConfig",
    f"{_HERE}.config:TransformerConfig",
    {f"{_HERE}.model:TransformerLM": ["log_probs"], f"{_HERE}.adaptive:AdaptiveSoftmax": ["forward"]},
)


def export_run(config: TransformerRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf`: the best checkpoint of a run. Raises DistlmError as export_words."""
    return export_words(
        config, options, WORD_MODEL,
        "A transformer language model over words with adaptive input and softmax (Baevski & Auli 2019).",
    )  # fmt: skip
