"""How a memory's slots were read, as results and checkpoints record it."""

from distlm.runtime.records import Part


class MemoryUse(Part, kw_only=True):
    """Use of the slots of one memory (Kim & Jung §3.2, XLM); null where there is no number, e.g. of no reads."""

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
