"""The AWD-LSTM as a Hugging Face folder (distlm.models.export.word_model)."""

import argparse

from distlm.models.awd_lstm.config import LstmRun
from distlm.models.export.word_model import WordModel, export_words

_HERE = "distlm.models.awd_lstm"
WORD_MODEL = WordModel(
    f"{_HERE}.modeling:DistlmAwdLstmForCausalLM",
    f"{_HERE}.modeling:DistlmAwdLstmConfig",
    {f"{_HERE}.config:LstmConfig": f"{_HERE}.modeling:DistlmAwdLstmConfig"},
    {f"{_HERE}.model:AwdLstm": ["log_probs", "cross_entropy"]},
)


def export_run(config: LstmRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf`: the best checkpoint of a run. Raises DistlmError as export_words."""
    return export_words(config, options, WORD_MODEL, "An AWD-LSTM language model over words (Merity et al. 2017).")
