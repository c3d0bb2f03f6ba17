"""Training a causal language model of Hugging Face on from its weights, in blocks."""

from torch import nn

from distlm.config.training import BlocksConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.models.hf.config import HfConfig
from distlm.models.hf.description import HfModel
from distlm.models.hf.model import hf_model, pretrained
from distlm.runtime.ranks.collective import together
from distlm.runtime.stage import Stage
from distlm.training.blocks.job import BlocksJob


class HfJob(BlocksJob):
    """`train.updates` updates of `train.blocks_per_update` blocks, from the weights of hf.name."""

    model: HfModel

    @staticmethod
    def open(stage: Stage) -> "HfJob":
        """Read the token files and check the settings against them, the model and the rank count. Raises
        DistlmError."""
        tokens, micro, deepspeed = BlocksJob.parts(stage)
        name = stage.config.section(HfConfig).name
        model = model_for(name, tokens, stage.config.section(BlocksConfig))
        return HfJob(stage, tokens, micro, deepspeed, model)

    def fresh_model(self) -> nn.Module:
        name = self.stage.config.section(HfConfig).name
        return together(self.comm, lambda: pretrained(name, self.model, self.text.vocabulary))


def model_for(name: str, tokens: TokenFiles, train: BlocksConfig) -> HfModel:
    """The model of `name` for these token files. Raises DistlmError as hf_model, and when it takes no such blocks."""
    model = hf_model(name, tokens)
    if (length := train.tokens_per_sample) > model.max_positions:
        raise UsageError(
            f"train.tokens_per_sample={length} is longer than the {model.max_positions} tokens that hf.name={name} "
            "takes; lower it"
        )
    return model
