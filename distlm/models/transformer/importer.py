"""`distlm import fairseq`: a transformer language model that fairseq trained becomes the first checkpoint of a run."""

import argparse
from pathlib import Path

from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.transformer.config import TransformerRun
from distlm.models.transformer.fairseq import check_order, check_sizes, our_names, read_checkpoint, vocabulary_size
from distlm.runtime.rundir import RunDir
from distlm.training.start.imported import of_blocks, refuse_trained, write_first_checkpoint


def import_options(config: TransformerRun, options: argparse.Namespace) -> dict[str, object]:
    """As the command line gives them: --weights, --dictionary."""
    return import_fairseq(config, Path(options.weights), Path(options.dictionary))


def import_fairseq(config: TransformerRun, path: Path, words: Path) -> dict[str, object]:
    """Write fairseq's checkpoint `path` as checkpoint step-00000000 and the best one, with its loss on the valid split.

    `words`: the dict.txt of the data the model was trained on (data-bin/…/dict.txt). The optimizer's state is not
    taken over. Raises DistlmError for what distlm.models.transformer.fairseq refuses, and when the run has checkpoints.
    """
    run = RunDir.of(config)
    refuse_trained(run)
    if not words.is_file():
        raise DistlmError(f"{words}: no such file; give the dict.txt of the data that the model was trained on")
    tokens = TokenFiles.open(run.tokens(config))
    tensors, args = read_checkpoint(path)
    weights = our_names(tensors, path)
    check_sizes(weights, args, config.model, path)
    check_order(Dictionary.load(words).words, tokens.dictionary, vocabulary_size(weights), str(words), path)
    return write_first_checkpoint(config, tokens, config.model, weights, str(path), *of_blocks(config, tokens))
