"""`distlm import hf`: a causal language model of Hugging Face becomes the first checkpoint of a run, as it is."""

import argparse

from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.models.described import require_tap
from distlm.models.hf.config import HfRun
from distlm.models.hf.job import model_for
from distlm.models.hf.model import pretrained
from distlm.runtime.rundir import RunDir
from distlm.training.start.imported import of_blocks, refuse_trained, write_first_checkpoint


def import_hf(config: HfRun, _options: argparse.Namespace | None = None) -> dict[str, object]:
    """Write the weights of hf.name, as they are, as checkpoint step-00000000 and the best one, with its loss on valid.

    The later stages then work with that model, and `distlm train` fine-tunes it. Raises DistlmError for what
    distlm.models.hf.model refuses, and when the run has checkpoints.
    """
    run, name = RunDir.of(config), config.hf.name
    if config.memory.kind != "none":
        raise UsageError(
            f"memory.kind={config.memory.kind}: a model is imported as it is; leave memory.* out, or begin with "
            "`distlm train`, which starts a fresh memory beside the weights of hf.name"
        )
    refuse_trained(run)
    tokens = TokenFiles.open(run.tokens(config))
    model = model_for(name, tokens, config.train)
    require_tap(model, config.train.tap, "train.tap")
    weights = dict(pretrained(name, model, len(tokens.dictionary)).named_parameters())
    return write_first_checkpoint(config, tokens, model, weights, name, *of_blocks(config, tokens))
