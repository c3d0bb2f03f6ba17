"""Training a causal language model of Hugging Face on from its weights, as the transformer is trained."""

from pathlib import Path
from typing import Any

from torch import nn

from distlm.config.schema import RunConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.hf.model import HfModel, hf_model, pretrained
from distlm.models.kinds import require_tap
from distlm.models.transformer.job import TransformerJob
from distlm.runtime.ranks.collective import together
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.training.dsconfig import merge_ds_config
from distlm.training.imported import of_blocks, refuse_trained, write_first_checkpoint
from distlm.training.microbatch import plan_micro_batches


class HfJob(TransformerJob):
    """`train.updates` updates of `train.blocks_per_update` blocks, from the weights of hf.name."""

    model: HfModel

    @staticmethod
    def open(stage: Stage) -> "HfJob":
        """Read the token files and check the settings against them, the model and the rank count. Raises
        DistlmError."""
        train = stage.config.train
        micro = plan_micro_batches(train, stage.comm.size)
        deepspeed = merge_ds_config(train.deepspeed, train, micro.accumulation)
        tokens = TokenFiles.open(stage.run.tokens(stage.config))
        model = hf_model(stage.config.hf.name, tokens)
        _require_length(stage.config, model)
        return HfJob(stage, tokens, micro, deepspeed, model)

    def fresh_model(self) -> nn.Module:
        name = self.stage.config.hf.name
        return together(self.comm, lambda: pretrained(name, self.model, self.text.vocabulary))


def import_hf(config: RunConfig) -> dict[str, Any]:
    """Write the weights of hf.name, as they are, as checkpoint step-00000000 and the best one, with its loss on valid.

    The later stages then work with that model, and `distlm train` fine-tunes it. Raises DistlmError for what
    distlm.models.hf.model refuses, and when the run has checkpoints.
    """
    run, name = RunDir(Path(config.run_dir)), config.hf.name
    if config.model.kind != "hf":
        raise DistlmError(f"model.kind={config.model.kind}: models of Hugging Face are imported with model.kind=hf")
    refuse_trained(run)
    tokens = TokenFiles.open(run.tokens(config))
    model = hf_model(name, tokens)
    _require_length(config, model)
    require_tap(model, config.train.tap, "train.tap")
    weights = dict(pretrained(name, model, len(tokens.dictionary)).named_parameters())
    return write_first_checkpoint(config, tokens, model, weights, name, *of_blocks(config, tokens))


def _require_length(config: RunConfig, model: HfModel) -> None:
    if (length := config.train.tokens_per_sample) > model.max_positions:
        raise DistlmError(
            f"train.tokens_per_sample={length} is longer than the {model.max_positions} tokens that "
            f"hf.name={config.hf.name} takes; lower it"
        )
