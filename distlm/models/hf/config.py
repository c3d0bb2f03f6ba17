"""Settings of a causal language model of Hugging Face."""

from dataclasses import dataclass, field

from distlm.config.schema import ModelConfig, RunConfig
from distlm.config.training import BlocksConfig
from distlm.memory.config import MemoryConfig


@dataclass
class HfConfig:
    """Any causal language model of Hugging Face; its tokenizer is data.tokenizer. Hidden states are named by the
    module's path: transformer.h.11.mlp:input."""

    name: str = ""
    """Folder or name on the hub of the model whose weights training, or `distlm import hf`, starts from."""


@dataclass
class HfRun(RunConfig):
    """A run of a causal language model of Hugging Face."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("hf"))
    """Its kind."""
    hf: HfConfig = field(default_factory=HfConfig)
    """The model to start from."""
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(positions=[]))
    """Its product-key memory, which starts fresh beside the weights of hf.name."""
    train: BlocksConfig = field(default_factory=BlocksConfig)
    """Training."""
