"""Training a causal language model of Hugging Face on from its weights, in blocks."""

from dataclasses import replace

from distlm.config.training import BlocksConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import Exchange
from distlm.models.card import read_model_card
from distlm.models.hf.config import HfConfig
from distlm.models.hf.description import HfModel
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import HfLM, hf_model, pretrained
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
        train, memory = stage.config.section(BlocksConfig), stage.config.section(MemoryConfig)
        model = with_memory(model_for(stage.config.section(HfConfig), tokens, train), memory, train.seed)
        if before := stage.run.complete_checkpoints():
            # Training goes on as it began, also where it did before there were these fields.
            began = read_model_card(before[-1]).config
            model.begin, model.generation = int(began.get("begin", -1)), dict(began.get("generation", {}))
        return HfJob(stage, tokens, micro, deepspeed, model)

    def build(self) -> HfLM:
        return HfLM(self.model, self.text.vocabulary, exchange=self._exchange())

    def fresh_model(self) -> HfLM:
        name, dense = self.stage.config.section(HfConfig).name, replace(self.model, memory={})
        self.net = net = together(self.comm, lambda: pretrained(name, dense, self.text.vocabulary))
        if self.settings is not None:
            exchange = self._exchange()
            together(self.comm, lambda: net.add_memories(self.model, exchange))
        return net

    def _exchange(self) -> Exchange | None:
        return None if self.settings is None else Exchange(self.settings.columns)


def model_for(hf: HfConfig, tokens: TokenFiles, train: BlocksConfig) -> HfModel:
    """The model of hf.name for these token files. Raises DistlmError as hf_model, and when it takes no such blocks."""
    name = hf.name
    model = hf_model(name, tokens, hf.begin)
    if (length := train.tokens_per_sample) > model.max_positions:
        raise UsageError(
            f"train.tokens_per_sample={length} is longer than the {model.max_positions} tokens that hf.name={name} "
            "takes; lower it"
        )
    return model
