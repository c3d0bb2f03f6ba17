"""Settings of a causal language model of Hugging Face."""

from dataclasses import dataclass, field

from distlm.config.schema import ModelConfig, RunConfig
from distlm.config.training import BlocksConfig


@dataclass
class HfConfig:
    """Any causal language model of Hugging Face. Hidden states are named by the
    module's path: transformer.h.11.mlp:input."""

    name: str = ""
    """Folder or name on the hub of the model whose weights training starts from; with train.updates=0 it is taken as it
    is. data.tokenizer is its own unless it is set."""


@dataclass
class HfRun(RunConfig):
    """A run of a causal language model of Hugging Face."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("hf"))
    """Its kind."""
    hf: HfConfig = field(default_factory=HfConfig)
    """The model to start from."""
    train: BlocksConfig = field(default_factory=BlocksConfig)
    """Training."""
