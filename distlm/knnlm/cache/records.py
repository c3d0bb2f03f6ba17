"""What lies beside the arrays of the neural cache: plan and manifest."""

from typing import ClassVar, Literal

from distlm.knnlm.search.records import UnitFacts
from distlm.runtime.records import Record


class CachePlan(Record):
    """The text that is scored, and the windows and θ it is scored at. A start with other inputs is refused."""

    FILE = "RUN/cache/SPLIT/plan.json"
    WHAT = "plan of a cache"
    WRITER = "distlm knn cache"
    READERS: ClassVar[tuple[str, ...]] = ("distlm knn cache",)
    MEND = "remove its folder and run `distlm knn cache` again"

    kind: Literal["cache"]
    """What the folder holds."""
    split: str
    """Name of the split."""
    tokens: int
    """Evaluated tokens Q."""
    fill: Literal["full", "partial"]
    """full: no cache until more than a window of tokens is seen; partial: as soon as there are any."""
    windows: list[int]
    """Window sizes, in tokens, rising."""
    thetas: list[float]
    """Flattening θ."""
    tap: str
    """Name of the hidden state."""
    states: str
    """Fingerprint of the states that are scored."""
    context_rule: str
    """Which context each token sees, in words."""
    model: str
    """Fingerprint of the model."""
    token_files: str
    """Fingerprint of the token files."""


class CacheManifest(CachePlan):
    """The finished cache of a split; written last. Its hash is the cache's fingerprint."""

    FILE = "RUN/cache/SPLIT/manifest.json"
    WHAT = "description of a cache"
    READERS = ("distlm knn tune", "distlm knn evaluate", "distlm run")

    units: list[UnitFacts]
    """Units in order of the split's tokens."""
