"""How the rows of an update are cut into micro-batches of all ranks, and those into pieces."""

from distlm.config.training import UpdatesConfig
from distlm.errors import DistlmError
from distlm.training.microbatch import MicroBatchPlan


def plan_rows(train: UpdatesConfig, ranks: int) -> MicroBatchPlan:
    """The cut of `train.*`; see cut_rows."""
    rows, micro = ("train.blocks_per_update", train.blocks_per_update), ("train.micro_blocks", train.micro_blocks)
    return cut_rows(rows, micro, ranks, ": a masked language model's", "train.micro_blocks=")


def cut_rows(rows: tuple[str, int], micro: tuple[str, int], ranks: int, whose: str, mend: str) -> MicroBatchPlan:
    """Micro-batches of `micro` rows over all ranks, each cut into one piece per rank; both are (setting, value).

    Number n of the plan is piece n mod R of micro-batch n // R. `whose` and `mend` are words of the message.
    Raises DistlmError, with the nearest valid values, when rows do not divide.
    """
    (rows_name, count), (micro_name, size) = rows, micro
    if count % size:
        raise DistlmError(
            f"{micro_name}={size} does not divide {rows_name}={count}; set "
            f"{rows_name}={max(1, round(count / size)) * size}"
        )
    if size % ranks:
        fitting = max(fewer for fewer in range(1, ranks) if size % fewer == 0)
        raise DistlmError(
            f"{micro_name}={size}{whose} micro-batch is of all ranks, and {ranks} ranks do not divide it; set "
            f"{mend}{max(1, round(size / ranks)) * ranks} or start {fitting} ranks"
        )
    return MicroBatchPlan(size // ranks, count // size * ranks, ranks)
