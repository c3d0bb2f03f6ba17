"""What a training run is about: the data, how it is cut, and DeepSpeed's configuration."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from distlm.config.schema import TrainConfig
from distlm.data.blocks import Blocks, training_blocks
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.transformer_lm import TAPS
from distlm.runtime.stage import Stage
from distlm.training.dsconfig import merge_ds_config
from distlm.training.microbatch import MicroBatchPlan, plan_micro_batches


@dataclass(frozen=True)
class Job:
    """Everything an update needs besides the engine."""

    train: TrainConfig
    tokens: TokenFiles
    ids: np.memmap
    blocks: Blocks
    micro: MicroBatchPlan
    deepspeed: dict[str, Any]

    @staticmethod
    def open(stage: Stage) -> "Job":
        """Read the token files and check the settings against them and the rank count. Raises DistlmError."""
        train = stage.config.train
        micro = plan_micro_batches(train, stage.comm.size)
        deepspeed = merge_ds_config(train.deepspeed, train, micro.accumulation)
        if train.tap not in TAPS:
            raise DistlmError(f"train.tap={train.tap!r}: no such hidden state; choose one of {', '.join(TAPS)}")
        if train.tokens_per_sample > stage.config.model.max_positions:
            raise DistlmError(
                f"train.tokens_per_sample={train.tokens_per_sample} is longer than "
                f"model.max_positions={stage.config.model.max_positions}; raise the latter"
            )
        tokens = TokenFiles.open(stage.run.tokens(stage.config))
        ids = tokens.split("train")
        return Job(train, tokens, ids, training_blocks(len(ids), train.tokens_per_sample), micro, deepspeed)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run: then its update number says which data comes next."""
        return {
            "data": self.tokens.fingerprint,
            "dictionary": self.tokens.dictionary.hash,
            "blocks_per_update": self.train.blocks_per_update,
            "seed": self.train.seed,
        }
