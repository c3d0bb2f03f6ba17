"""A kind of model from a package outside distlm: a unigram language model. Its keys are vectors of the word before."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from distlm.config.schema import ModelConfig, RunConfig
from distlm.config.training import BlocksConfig
from distlm.models.kind import CausalDescription, Kind
from distlm.runtime.plan import StagePlan
from distlm.training.kinds import BlocksKind


@dataclass
class UnigramConfig(CausalDescription):
    """The unigram language model."""

    KIND: ClassVar[str] = "unigram"

    width: int = 16
    """Width D of the vectors of words."""
    max_positions: int = 1024
    """Longest sequence, in tokens."""


@dataclass
class UnigramRun(RunConfig):
    """A run of it."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("unigram"))
    """Its kind."""
    unigram: UnigramConfig = field(default_factory=UnigramConfig)
    """The model."""
    train: BlocksConfig = field(default_factory=BlocksConfig)
    """Training."""


class Unigram(BlocksKind):
    """p(w), whatever came before."""

    name = "unigram"
    description = UnigramConfig
    config = UnigramRun
    model_sections = ("data", "model", "unigram", "train")

    def describe(self, config: UnigramRun) -> UnigramConfig:
        return config.unigram

    def build(self, description: UnigramConfig, vocabulary: int) -> Any:
        from unigram_model import UnigramLM

        return UnigramLM(description, vocabulary)

    def require_tap(self, description: UnigramConfig, tap: str, key: str) -> None:
        if tap != "word":
            raise ValueError(f"{key}={tap!r}: the unigram model has one state, 'word'")

    def inner_floats(self, description: UnigramConfig) -> int:
        return description.width

    def forward_flops(self, description: UnigramConfig, tap: str, length: int) -> float:
        return float(description.width)

    def plan(self, config: UnigramRun, ranks: int) -> StagePlan:
        self.require_ranks(config, ranks)
        return StagePlan("train", f"{config.train.updates} updates", 0, 100_000_000, None, [])

    def job(self, stage: Any) -> Any:
        from distlm.training.blocks import BlocksJob

        tokens, micro, deepspeed = BlocksJob.parts(stage)
        return BlocksJob(stage, tokens, micro, deepspeed, stage.config.unigram)


KIND: Kind = Unigram()
