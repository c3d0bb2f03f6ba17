"""How well so many units of work keep so many ranks busy."""

from collections.abc import Sequence
from math import ceil


def efficiency(phases: Sequence[int], ranks: int) -> float:
    """Share of the ranks' time that is work. `phases` has the units of each phase; all take equally long, and a phase
    begins when the one before has ended."""
    turns = sum(ceil(units / ranks) for units in phases)
    return sum(phases) / (ranks * turns) if turns else 1.0


def speedup(phases: Sequence[int], ranks: int) -> float:
    """Times that so many ranks are faster than one."""
    return ranks * efficiency(phases, ranks)


def idle_note(units: int, ranks: int, mend: str) -> list[str]:
    """That some ranks will have nothing to do, where there are more of them than units; `mend`: what changes that."""
    if not 0 < units < ranks:
        return []
    count = f"{units} unit{'s' * (units > 1)} of work"
    return [f"{count}: {ranks - units} of {ranks} ranks will have nothing to do; {mend}"]
