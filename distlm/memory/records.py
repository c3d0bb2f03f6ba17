"""How a memory's slots were read, as results and checkpoints record it."""

from collections.abc import Collection
from math import nan
from typing import ClassVar

from distlm.runtime.records import Part


class MemoryUse(Part, kw_only=True):
    """Use of the slots of one memory (Kim & Jung §3.2, XLM); null where there is no number, e.g. of no reads."""

    NAMES: ClassVar = ("mu", "top1_mu", "kl_u", "kl_w")
    """What tables show of it."""
    HEADS: ClassVar = ("MU %", "top-1 MU %", "KL_u", "KL_w")
    """What tables call these."""

    mu: float | None
    """Memory usage: share of the slots that were read."""
    top1_mu: float | None
    """Share of the slots that were the best of a read."""
    kl_u: float | None
    """Divergence of the reads from the uniform distribution, in nats."""
    kl_w: float | None
    """The same of the weights, in nats."""
    gini: float | None
    """Gini coefficient of the weights."""

    @property
    def words(self) -> str:
        """All but the last, for people."""
        mu, top1_mu, kl_u, kl_w = (nan if v is None else v for v in (self.mu, self.top1_mu, self.kl_u, self.kl_w))
        return f"MU {100 * mu:.1f} %, top-1 MU {100 * top1_mu:.1f} %, KL_u {kl_u:.2f}, KL_w {kl_w:.2f}"


def use_cells(uses: Collection[MemoryUse]) -> list[str]:
    """MemoryUse.NAMES of some memories for a table: shares of the slots in %, empty where there is no number."""
    return [" / ".join(_cell(name, getattr(use, name)) for use in uses) for name in MemoryUse.NAMES]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if name in ("mu", "top1_mu") else f"{value:.2f}"
