"""How the rows of an update are cut into micro-batches of all ranks, and those into pieces."""

from distlm.config.schema import TrainConfig
from distlm.errors import DistlmError
from distlm.training.microbatch import MicroBatchPlan


def plan_rows(train: TrainConfig, ranks: int) -> MicroBatchPlan:
    """Micro-batches of `train.micro_blocks` rows over all ranks, each cut into one piece per rank.

    Number n of the plan is piece n mod R of micro-batch n // R.
    Raises DistlmError, with the nearest valid values, when rows do not divide.
    """
    rows, micro = train.blocks_per_update, train.micro_blocks
    if rows % micro:
        raise DistlmError(
            f"train.micro_blocks={micro} does not divide train.blocks_per_update={rows}; set "
            f"train.blocks_per_update={max(1, round(rows / micro)) * micro}"
        )
    if micro % ranks:
        fitting = max(size for size in range(1, ranks) if micro % size == 0)
        raise DistlmError(
            f"train.micro_blocks={micro}: a masked language model's micro-batch is of all ranks, and {ranks} ranks do "
            f"not divide it; set train.micro_blocks={max(1, round(micro / ranks)) * ranks} or start {fitting} ranks"
        )
    return MicroBatchPlan(micro // ranks, rows // micro * ranks, ranks)
