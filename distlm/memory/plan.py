"""What a memory costs on each rank, by the number of ranks that share its columns: bytes sent, bytes held."""

from collections.abc import Iterable
from dataclasses import dataclass

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import SMALL
from distlm.runtime.files import format_bytes


@dataclass(frozen=True)
class Work:
    """One update of the values of all memories, on one rank."""

    ranks: int
    """R."""
    tokens: int
    """Tokens T of a rank in one micro-batch."""
    micro_batches: int = 1
    """Micro-batches of an update."""
    memories: int = 1
    """Layers with a memory."""
    activation_bytes: int = 4
    """Bytes of a number of the model's activations: 4, or 2 in half precision."""


@dataclass(frozen=True)
class MemoryPlan:
    """One strategy: `columns` ranks share the columns of one copy, of which there are `replicas`."""

    columns: int
    replicas: int
    sent: dict[str, int]
    """What → bytes that a rank sends in an update, named as Exchange.bytes names them."""
    resident: int
    """Bytes of values, moments and counters on a rank, all memories."""
    kept: int
    """Bytes that the micro-batches of an update keep for the values' gradient on a rank, at most, all memories."""

    @property
    def bytes(self) -> int:
        """All bytes that a rank sends in an update."""
        return sum(self.sent.values())

    @property
    def name(self) -> str:
        if self.replicas == 1:
            return "column" if self.columns > 1 else "one rank"
        return "replicated" if self.columns == 1 else "column × replica"


def plan_memory(config: MemoryConfig, width: int, work: Work) -> list[MemoryPlan]:
    """All strategies that are possible: each divisor of the ranks that divides the width D, rising."""
    return [
        _plan(config, width, work, columns)
        for columns in range(1, work.ranks + 1)
        if work.ranks % columns == 0 and width % columns == 0
    ]


def planes(config: MemoryConfig) -> int:
    """Numbers of 4 bytes for each value, with Adam's two moments where it is trained."""
    return 1 if config.frozen else 2 if config.moments == "bf16" else 3


def _plan(config: MemoryConfig, width: int, work: Work, columns: int) -> MemoryPlan:
    slots, reads, replicas = config.sub_keys**2, config.heads * config.k, work.ranks // columns
    tables = min(work.memories, 1) if config.shared else work.memories
    part, others = width // columns, columns - 1
    forwards, channels = work.memories * work.micro_batches, config.heads * config.key_width
    per_read, per_value = work.tokens * reads * 4, work.tokens * part * work.activation_bytes
    one_micro_batch = columns * (2 * per_read + per_value)
    sent = {
        "slots": forwards * others * per_read,
        "weights": forwards * others * per_read,
        "outputs": forwards * others * per_value,
        "output gradients": forwards * others * per_value,
        "weight gradients": forwards * others * per_read,
    }
    if config.query_norm:
        # Mean, variance and count; and two sums in the backward.
        sent["norm"] = forwards * (_summed(2 * channels + 1, work.ranks) + _summed(2 * channels, work.ranks))
    kept = 0
    if not config.frozen:
        sent |= {
            "stash": forwards * (replicas - 1) * one_micro_batch,
            "finite": 8 * tables * (work.ranks - 1),
            "norms": 8 * tables * others * (part if config.clip_norm else 1),
        }
        # Summed when all replicas' micro-batches reach the size of a gradient of all slots; see ValueGradient.
        gradient = 4 * slots * part
        until_summed = -(-gradient // (replicas * one_micro_batch))
        kept = one_micro_batch * min(work.micro_batches, until_summed)
        kept += gradient if work.micro_batches > until_summed else 0
    resident = 4 * slots * (part * planes(config) + 1 + config.row_steps)
    return MemoryPlan(columns, replicas, {k: v for k, v in sent.items() if v}, tables * resident, work.memories * kept)


def _summed(numbers: int, ranks: int) -> int:
    """Bytes that a rank sends in Exchange.sum."""
    if numbers <= SMALL:
        return 8 * numbers * (ranks - 1)
    return 2 * 8 * -(-numbers // ranks) * (ranks - 1)


def other_ways(config: MemoryConfig, width: int, work: Work) -> dict[str, int]:
    """Bytes that a rank would send in an update with the values as an ordinary parameter of a data-parallel trainer.

    Way → bytes: a ring all-reduce of the dense fp32 gradient; an all-gather of nn.EmbeddingBag's sparse one, which has
    a row (and an int64 slot) for every read.
    """
    others = work.ranks - 1
    tables = min(work.memories, 1) if config.shared else work.memories
    dense = 2 * others * config.sub_keys**2 * width * 4 // work.ranks
    sparse = others * work.tokens * work.micro_batches * config.heads * config.k * (4 * width + 8)
    return {"dense all-reduce": tables * dense, "sparse all-gather": work.memories * sparse}


def chosen_plan(config: MemoryConfig, width: int, work: Work) -> tuple[int, str]:
    """Bytes that a rank holds and keeps with memory.columns, and what a plan says of it: all strategies as a table.

    Raises UsageError for columns that do not divide the ranks or the width D.
    """
    columns = config.columns or work.ranks
    plans = plan_memory(config, width, work)
    chosen = next((plan for plan in plans if plan.columns == columns), None)
    if chosen is None:
        raise UsageError(
            f"memory.columns={config.columns} (0: all {work.ranks} ranks) must divide {work.ranks} ranks and the "
            f"model's width {width}; set it to one of {', '.join(str(plan.columns) for plan in plans)}"
        )
    tables = 1 if config.shared else work.memories
    table = describe(plans, columns, other_ways(config, width, work))
    note = (
        f"{'a memory' if work.memories == 1 else f'{work.memories} memories'} of {config.sub_keys**2} slots"
        f"{' that they share' if config.shared and work.memories > 1 else ''}: "
        f"{tables * config.sub_keys**2 * width / 1e6:.1f} M values; bytes that a rank sends in an update, holds, and "
        f"keeps for the values' gradient, by memory.columns (*: chosen):\n{table}"
    )
    return chosen.resident + chosen.kept, note


def describe(plans: Iterable[MemoryPlan], chosen: int = 0, other: dict[str, int] | None = None) -> str:
    """The strategies as a table of text, that with `chosen` columns marked, and what `other_ways` would send."""
    lines = [f"  {'strategy':18}{'columns':>8}{'copies':>8}{'sent/update':>13}{'held':>10}{'kept':>10}"]
    for plan in plans:
        mark = "*" if plan.columns == chosen else " "
        lines.append(
            f"{mark} {plan.name:18}{plan.columns:>8}{plan.replicas:>8}{format_bytes(plan.bytes):>13}"
            f"{format_bytes(plan.resident):>10}{format_bytes(plan.kept):>10}"
        )
    lines += [f"  {name:34}{format_bytes(count):>13}" for name, count in (other or {}).items()]
    return "\n".join(lines)
