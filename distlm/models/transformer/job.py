"""Training a transformer: updates over shuffled blocks of the corpus, with the regularisers of Ton et al."""

from typing import Any

from distlm.errors import UsageError
from distlm.memory.values.exchange import Exchange
from distlm.models.transformer.config import TransformerConfig, TransformerTraining
from distlm.models.transformer.model import TransformerLM
from distlm.models.transformer.regularisers.tables import uses_queues
from distlm.models.transformer.regularisers.word_pull import WordPull
from distlm.runtime.ranks.device import default_device
from distlm.runtime.stage import Stage
from distlm.training.blocks.job import BlocksJob
from distlm.training.dsconfig import zero_stage
from distlm.training.objective import TrainModule


class TransformerJob(BlocksJob):
    """`train.updates` updates of `train.blocks_per_update` blocks."""

    train: TransformerTraining

    @staticmethod
    def open(stage: Stage) -> "TransformerJob":
        """Read the token files and check the settings against them and the rank count. Raises DistlmError."""
        tokens, micro, deepspeed = BlocksJob.parts(stage)
        train = stage.config.section(TransformerTraining)
        if uses_queues(train) and zero_stage(deepspeed) == 3:
            raise UsageError(
                f"train.deepspeed={train.deepspeed}: ZeRO stage 3 shards the weights, and the momentum encoder of "
                f"train.regulariser={train.regulariser} is a whole copy that follows them; set train.deepspeed=zero2, "
                "or train.regulariser=l2"
            )
        return TransformerJob(stage, tokens, micro, deepspeed)

    @property
    def highest_stage(self) -> int:
        return 2 if uses_queues(self.train) else 3

    def build(self) -> TransformerLM:
        assert isinstance(self.model, TransformerConfig)
        exchange = None if self.settings is None else Exchange(self.settings.columns)
        return TransformerLM(self.model, self.text.vocabulary, exchange)

    def objective(self, model: Any) -> TrainModule:
        if uses_queues(self.train):
            self.regulariser = WordPull(self.train, model, self.comm.rank, self.comm.size, default_device())
        return super().objective(model)
