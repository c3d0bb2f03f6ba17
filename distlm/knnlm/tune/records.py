"""knn.json: what was tuned on the first split and is frozen for the others."""

from typing import Literal

from msgspec import UNSET, UnsetType

from distlm.runtime.files import json_hash
from distlm.runtime.records import Part, Record, all_or_none


class Figures(Part):
    """A loss and its perplexity."""

    loss_nats: float
    """Mean loss in nats per token."""
    perplexity: float
    """Per word, which is per token unless tokens are sub-words."""
    token_perplexity: float | UnsetType = UNSET
    """Per token; there where tokens are sub-words."""


class Grid(Part):
    """What was tried of the neighbours' settings."""

    lambdas: list[float]
    """Weights λ of p_kNN."""
    temperatures: list[float]
    """Temperatures, in units of squared L2."""
    ks: list[int]
    """Numbers of neighbours."""
    loss_nats: list[list[list[float]]]
    """Nats per token of the split: [ks][temperatures][lambdas]."""
    buckets: int | UnsetType = UNSET
    """Buckets that were asked for (knn.buckets); absent in old files: 0."""


class BucketValues(Part):
    """λ by the squared L2 of the nearest neighbour: B buckets."""

    edges: list[float]
    """B − 1 squared distances, rising: bucket i is from edge i − 1 on, below edge i."""
    lambdas: list[float]
    """λ of each of the B buckets."""


class TunedBuckets(BucketValues):
    """Buckets fitted on the whole split."""

    halves: list[BucketValues]
    """The same fitted on half 0 and on half 1 alone."""
    loss_nats: float
    """Nats per token, each half with what was fitted on the other."""
    perplexity: float
    """exp of it."""


class GateValues(Part):
    """λ = σ(weights · x + bias) of what is known before the search."""

    bias: float
    """b."""
    thresholds: list[float]
    """λ from which on a token is searched for, for each skipped share of 0, 0.1, …, 1."""
    weights: list[float]
    """w: of the D numbers of the hidden state, then of the tokens before."""


class TunedGate(GateValues):
    """The gate fitted on the whole split."""

    halves: list[GateValues]
    """The same fitted on half 0 and on half 1 alone."""
    loss_nats: float
    """Nats per token, each half with what was fitted on the other."""
    perplexity: float
    """exp of it."""


class GateCurve(Part):
    """What skipping searches costs: one entry for each of 0, 0.1, …, 1."""

    wanted: list[float]
    """Share of searches to skip."""
    skipped: list[float]
    """Share that was."""
    loss_nats: list[float]
    """Nats per token, the language model's where nothing is searched."""
    perplexity: list[float]
    """exp of it."""


class TunedBothBuckets(Part):
    """Buckets beside the neural cache."""

    cache_lambda: float
    """λ of the cache."""
    edges: list[float]
    """B − 1 squared distances, rising: bucket i is from edge i − 1 on, below edge i."""
    lambdas: list[float]
    """λ of the neighbours in each of the B buckets."""
    halves: list[BucketValues]
    """The same fitted on half 0 and on half 1 alone."""
    loss_nats: float
    """Nats per token, each half with what was fitted on the other."""
    perplexity: float
    """exp of it."""


class Store(Part):
    """One store of a mixture of several."""

    run: str
    """Run directory as in knn.extra_runs; empty: the run's own."""
    neighbours: str
    """Fingerprint of its neighbours of the tuned split."""
    datastore: str
    """Fingerprint of the store."""
    temperature: float
    """The best for it alone, in units of squared L2."""
    k: int
    """The best number of neighbours for it alone."""


class Stores(Part):
    """Several stores in one mixture."""

    lambdas: list[float]
    """λ of each store."""
    stores: list[Store]
    """The run's own first."""


class TunedStores(Stores):
    """The λ that are best on the split."""

    loss_nats: float
    """Nats per token."""
    perplexity: float
    """exp of it."""


class CacheGrid(Part):
    """What was tried of the cache's settings."""

    lambdas: list[float]
    """Weights λ of p_cache."""
    thetas: list[float]
    """Flattening θ."""
    windows: list[int]
    """Window sizes, in tokens."""
    loss_nats: list[list[list[float]]]
    """Nats per token of the split: [windows][thetas][lambdas]."""


class CacheSettings(Part, rename={"weight": "lambda"}):
    """The neural cache beside the language model alone."""

    weight: float
    """λ of p_cache."""
    theta: float
    """Flattening θ."""
    window: int
    """Window size, in tokens."""
    fill: Literal["full", "partial"]
    """full: no cache until more than a window of tokens is seen; partial: as soon as there are any."""
    tap: str
    """Name of the hidden state."""


class TunedCache(CacheSettings):
    """The settings that are best on the split."""

    loss_nats: float
    """Nats per token."""
    perplexity: float
    """exp of it."""
    grid: CacheGrid
    """What was tried."""
    edges: list[str]
    """Settings that stand at the end of their grid, in words."""
    cache: str
    """Fingerprint of the cache's files."""


class BothGrid(Part):
    """What was tried of the two λ."""

    knn_lambdas: list[float]
    """λ of the neighbours."""
    cache_lambdas: list[float]
    """λ of the cache."""
    loss_nats: list[list[float]]
    """Nats per token of the split: [knn_lambdas][cache_lambdas]."""


class BothSettings(Part):
    """Neighbours and cache together, their other settings as for each alone."""

    knn_lambda: float
    """λ of the neighbours."""
    cache_lambda: float
    """λ of the cache."""


class TunedBoth(BothSettings):
    """The two λ that are best on the split."""

    loss_nats: float
    """Nats per token."""
    perplexity: float
    """exp of it."""
    grid: BothGrid
    """What was tried."""
    edges: list[str]
    """Settings that stand at the end of their grid, in words."""


class Tuned(Record, kw_only=True, rename={"weight": "lambda"}):
    """Settings chosen on the first split and frozen for the others.

    Without neighbours only what belongs to the language model and the cache is there.
    """

    FILE = "RUN/tuned/LABEL.json, RUN/knn.json"
    WHAT = "frozen kNN settings"
    WRITER = "distlm knn tune"
    READERS = ("distlm knn evaluate", "distlm generate", "distlm report", "distlm reproduce", "distlm run")
    MEND = "run `distlm knn tune` again"

    weight: float | UnsetType = UNSET
    """λ of p_kNN."""
    temperature: float | UnsetType = UNSET
    """Temperature of p_kNN, in units of squared L2."""
    k: int | UnsetType = UNSET
    """Neighbours of each token."""
    grid: Grid | UnsetType = UNSET
    """What was tried."""
    edges: list[str] | UnsetType = UNSET
    """Settings that stand at the end of their grid, in words."""
    neighbours: str | UnsetType = UNSET
    """Fingerprint of the neighbours of the split."""
    datastore: str | UnsetType = UNSET
    """Fingerprint of the datastore."""
    index: str | UnsetType = UNSET
    """Fingerprint of the index, or brute."""
    loss_nats: float | UnsetType = UNSET
    """Nats per token with λ, temperature and k."""
    perplexity: float | UnsetType = UNSET
    """exp of it: per token."""
    halves_of: Literal["documents", "blocks"] | UnsetType = UNSET
    """What was dealt into the two halves of the split."""
    halves: str | UnsetType = UNSET
    """Fingerprint of the two halves; absent in old files."""
    buckets: TunedBuckets | UnsetType = UNSET
    """λ by distance."""
    gate: TunedGate | UnsetType = UNSET
    """λ of each token before its search."""
    stores: TunedStores | UnsetType = UNSET
    """Several stores."""
    lm_loss_nats: float
    """Nats per token of the language model alone."""
    lm_perplexity: float
    """exp of it: per token."""
    split: str
    """The split that all this was chosen on."""
    tokens: int
    """Its tokens."""
    model: str
    """Fingerprint of the model."""
    cache: TunedCache | UnsetType = UNSET
    """The neural cache."""
    both: TunedBoth | UnsetType = UNSET
    """Neighbours and cache."""
    both_buckets: TunedBothBuckets | UnsetType = UNSET
    """Neighbours with λ by distance, and cache."""

    def __post_init__(self) -> None:
        all_or_none(self, "weight", "temperature", "k", "grid", "edges", "neighbours", "datastore", "index",
                    "loss_nats", "perplexity")  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Hash of all settings; the number of the format, which older files lack, left out."""
        return json_hash({name: value for name, value in self.tree().items() if name != "format"})
