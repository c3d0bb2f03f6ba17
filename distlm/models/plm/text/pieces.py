"""How the rows of an update are cut into micro-batches of all ranks, and those into pieces."""

from distlm.config.training import UpdatesConfig
from distlm.training.microbatch import MicroBatchPlan, plan_pieces


def plan_rows(train: UpdatesConfig, ranks: int) -> MicroBatchPlan:
    """The cut of `train.*`; see cut_rows."""
    return plan_pieces(train, ranks, "a masked language model's")
