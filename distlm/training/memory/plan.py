"""What the memories of a model that is trained in blocks will need."""

from dataclasses import replace

from distlm.config.schema import RunConfig
from distlm.config.training import BlocksConfig
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import memory_size
from distlm.memory.of_model import layers_and_values
from distlm.memory.placing import WithMemory
from distlm.memory.plan import Work, chosen_plan, planes
from distlm.models.kind import CausalDescription
from distlm.training.blocks.plan import Further, plan_blocks_cut

_COUNTERS = 40
"""Bytes of a slot's counters in a checkpoint: reads, top-1 reads, weights, and three numbers of updates."""


def plan_memories(config: RunConfig, model: CausalDescription, inner: int, ranks: int) -> Further:
    """Needs of the memories on top of the dense layers' in which they were counted.

    `inner`: width of a feed-forward layer, which memory.kind=pkm takes out. FLOP are 6 for each query weight, half key
    and value read. Raises UsageError for columns that do not divide the ranks or the width.
    """
    if not isinstance(model, WithMemory) or not model.memory:
        return Further()
    train, width = config.section(BlocksConfig), model.width
    # How the columns lie on the ranks is the run's, not the model's.
    memory = replace(MemoryConfig(**model.memory), columns=config.section(MemoryConfig).columns)
    micro = plan_blocks_cut(config, ranks)
    layers, values = layers_and_values(model.memory, width)
    work = Work(
        ranks, micro.micro_blocks * train.tokens_per_sample, micro.accumulation, layers,
        4 if train.precision == "fp32" else 2,
    )  # fmt: skip
    held, note = chosen_plan(memory, width, work)
    size = memory_size(memory, width)
    flops = 6.0 * layers * (size.keys + size.query + size.gate + memory.heads * memory.k * width)
    if memory.kind == "pkm":
        flops -= 6.0 * layers * 2 * width * inner
    counters = _COUNTERS * layers * memory.sub_keys**2
    return Further(memory_bytes=held, disk_bytes=4 * planes(memory) * values + counters, flops=flops, notes=(note,))
