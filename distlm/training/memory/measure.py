"""How the memories of a model are used by held-out text, and when their slots were last read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from distlm.memory import measures
from distlm.memory.of_model import Memories
from distlm.memory.usage import Usage
from distlm.training.records import LmSplit, Staleness


@contextmanager
def measured(memories: Memories) -> Iterator[dict[int, Usage]]:
    """Layer → what counts the reads of its memory inside the block, in evaluation, too."""
    with ExitStack() as stack:
        yield {layer: stack.enter_context(memory.measure()) for layer, memory in memories.items()}


def staleness_of(memories: Memories, updates: int) -> dict[str, Staleness]:
    """Layer → when its slots were last read first, and last read at all, in a training of so many updates."""
    edges = sorted({round(updates * part / 5) for part in range(6)})
    last = {str(layer): memory.usage.counts() for layer, memory in memories.items()}
    return {
        layer: Staleness(edges, *(measures.staleness(of, edges).tolist() for of in (seen.last_top1, seen.last_read)))
        for layer, seen in last.items()
    }


def use_words(found: LmSplit) -> str:
    """Top-1 use of each memory, for people; empty without memory."""
    parts = [f"layer {layer}: top-1 MU {100 * (use.top1_mu or 0):.1f} %" for layer, use in (found.memory or {}).items()]
    return f" ({', '.join(parts)})" if parts else ""
