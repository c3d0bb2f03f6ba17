"""How the evaluation blocks of a split are cut into forward passes and units of work."""

from dataclasses import dataclass, replace
from pathlib import Path

from distlm.config.schema import KnnConfig
from distlm.data.blocks import Blocks
from distlm.errors import DistlmError
from distlm.runtime.files import read_json

LEAST_UNITS = 512
"""A unit has several passes only where there are so many units anyway."""
MORE_UNITS = "a smaller knn.batch_blocks or knn.block makes more units"
LONG_PASS = 1024
"""Tokens of a pass that fill a processor: blocks as long as that need no company."""


@dataclass(frozen=True)
class Cut:
    """A function of the blocks and the settings, not of the ranks."""

    batch_blocks: int
    """Blocks of one forward pass; the last bits of what it gives depend on it."""
    blocks_per_unit: int
    """Blocks of a unit."""

    def units(self, blocks: int) -> list[range]:
        """Block numbers of each unit."""
        step = self.blocks_per_unit
        return [range(first, min(first + step, blocks)) for first in range(0, blocks, step)]

    def passes(self, unit: range) -> list[range]:
        """Block numbers of each forward pass of a unit."""
        return [unit[first : first + self.batch_blocks] for first in range(0, len(unit), self.batch_blocks)]


def planned_cut(blocks: int, knn: KnnConfig) -> Cut:
    """Units of knn.blocks_per_unit blocks where there are plenty, else of one pass; passes of knn.batch_blocks blocks,
    or of one where blocks are long and few.

    A search that reads each list once for all queries of a unit (knn.scan=lists) has the largest units.
    """
    batch = knn.batch_blocks
    if knn.context_window + knn.block >= LONG_PASS and blocks < LEAST_UNITS * batch:
        batch = 1
    if knn.scan == "lists" and knn.search == "index":
        return Cut(batch, knn.blocks_per_unit)
    return Cut(batch, min(knn.blocks_per_unit, batch * max(1, blocks // (LEAST_UNITS * batch))))


def cut_of(blocks: Blocks, knn: KnnConfig, *kept: Path) -> Cut:
    """As planned; as in the first of the files `kept` (plan.json, manifest.json) that is there and was cut by the same
    settings with another knn.scan, or by an older version, which cut as the settings are: any number of units may be
    left of a search, and their bits depend on the passes."""
    known = {Cut(knn.batch_blocks, knn.blocks_per_unit), *_planned_cuts(len(blocks), knn)}
    for path in kept:
        if path.is_file():
            try:
                tree = read_json(path, "how a split is cut")
                found = Cut(int(tree["batch_blocks"]), int(tree["blocks_per_unit"]))
            except (DistlmError, KeyError, TypeError, ValueError):
                # Whoever reads the whole of it says what is wrong.
                continue
            if found in known:
                return found
    return planned_cut(len(blocks), knn)


def _planned_cuts(blocks: int, knn: KnnConfig) -> list[Cut]:
    """Of all searches that may leave units, and states, of a split: knn.scan may change in between."""
    return [planned_cut(blocks, replace(knn, search="index", scan=scan)) for scan in ("queries", "lists")]
