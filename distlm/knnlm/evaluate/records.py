"""results.json and losses.json: what an evaluation found, and all that is needed to read it."""

from typing import Literal

from msgspec import UNSET, UnsetType

from distlm.knnlm.search.records import SelfTest
from distlm.knnlm.tune.records import BothSettings, CacheSettings, Figures, GateCurve, Stores
from distlm.runtime.records import CodeVersion, Part, Record, all_or_none, given

Interval = tuple[float, float]


class ModelFacts(Part):
    """The language model."""

    parameters: int
    """Its numbers, those of a memory's values left out."""
    fingerprint: str
    """Hash of configuration, dictionary and weights."""
    step: int | None
    """Updates it was trained for; null where its description does not say."""
    checkpoint: str
    """Its folder."""


class DictionaryFacts(Part):
    """The dictionary."""

    hash: str
    """Of its words and counts."""
    words: int
    """Words, specials included."""


class AdaptiveSettings(Part):
    """How a λ of its own for each token was fitted."""

    buckets: int
    """Buckets of the nearest distance; 0: none."""
    gate: bool
    """Whether a gate was fitted."""
    halves_of: Literal["documents", "blocks"]
    """What was dealt into halves: on the tuned split each half is mixed with what was fitted on the other."""


class Settings(Part, rename={"weight": "lambda"}):
    """The frozen settings; of the neighbours, the cache and both as far as there are."""

    weight: float | UnsetType = UNSET
    """λ of p_kNN."""
    temperature: float | UnsetType = UNSET
    """Temperature of p_kNN, in units of squared L2."""
    k: int | UnsetType = UNSET
    """Neighbours of each token."""
    nprobe: int | UnsetType | None = UNSET
    """Lists searched per query; null for brute force."""
    distances: Literal["exact", "quantised"] | UnsetType = UNSET
    """exact: over the true keys; quantised: as the index gives them."""
    search: Literal["index", "brute"] | UnsetType = UNSET
    """index: the faiss index; brute: every key."""
    similarity: Literal["l2", "dot"] | UnsetType = UNSET
    """What a neighbour is weighed by; absent in old files: l2."""
    fast_scan: bool | UnsetType = UNSET
    """Of 4-bit product codes: true where FastScan's tables of 8 bits compared them; absent for other codes and in old
    files."""
    cache: CacheSettings | UnsetType = UNSET
    """The neural cache."""
    both: BothSettings | UnsetType = UNSET
    """Neighbours and cache."""
    stores: Stores | UnsetType = UNSET
    """Several stores."""
    adaptive: AdaptiveSettings | UnsetType = UNSET
    """λ of each token."""

    def __post_init__(self) -> None:
        all_or_none(self, "weight", "temperature", "k", "nprobe", "distances", "search")


class Shuffled(Part, rename={"weight": "lambda"}):
    """The loss with the neighbours' values permuted."""

    weight: float
    """λ of this check: the frozen one, or 0.25 where that is 0."""
    loss_nats: float
    """Nats per token."""
    ceiling_nats: float
    """What it must come near: the language model's loss − ln(1 − λ), in nats per token."""
    alarm: bool
    """The true values are hardly better than the permuted ones: rows may be misaligned."""


class Difference(Part):
    """One mixture less another, below 0 where the first is better."""

    nats: float
    """Of the losses, in nats per token."""
    nats_interval: Interval
    """Interval of that."""
    perplexity: float
    """Of the perplexities per word."""
    interval: Interval
    """Interval of that."""


class Bootstrap(Part):
    """Confidence intervals by resampling groups of tokens; with fewer than two groups there are none."""

    over: Literal["documents", "blocks"]
    """What is resampled."""
    groups: int
    """How many there are."""
    resamples: int | UnsetType = UNSET
    """How often that many were drawn."""
    seed: int | UnsetType = UNSET
    """Of the draws."""
    level: float | UnsetType = UNSET
    """Share of the resamples within an interval."""
    intervals: dict[str, Interval] | UnsetType = UNSET
    """Mixture → interval of its perplexity per word."""
    differences: dict[str, dict[str, Difference]] | UnsetType = UNSET
    """Mixture → another that it is compared with → their difference."""

    def __post_init__(self) -> None:
        all_or_none(self, "resamples", "seed", "level", "intervals", "differences")


class SplitResults(Part, kw_only=True):
    """One split; mixtures that could not be had are absent."""

    tokens: int
    """Evaluated tokens Q."""
    blocks: int
    """Evaluation blocks."""
    words: int | UnsetType = UNSET
    """Words of the text and line ends; there where tokens are sub-words."""
    gate_curve: GateCurve | UnsetType = UNSET
    """Skipped searches."""
    lm: Figures
    """The language model alone."""
    cache: Figures | UnsetType = UNSET
    """With the neural cache."""
    knn: Figures | UnsetType = UNSET
    """With neighbours."""
    knn_buckets: Figures | UnsetType = UNSET
    """With neighbours, λ by distance; on the tuned split cross-fitted."""
    gate: Figures | UnsetType = UNSET
    """With neighbours, λ by the gate; on the tuned split cross-fitted."""
    stores: Figures | UnsetType = UNSET
    """With neighbours of several stores."""
    both: Figures | UnsetType = UNSET
    """With neighbours and cache."""
    both_buckets: Figures | UnsetType = UNSET
    """With neighbours and cache, λ by distance; on the tuned split cross-fitted."""
    retrieved: float | UnsetType = UNSET
    """Share of tokens whose target is among the neighbours."""
    shuffled: Shuffled | UnsetType = UNSET
    """The check for misaligned rows."""
    neighbours: str | UnsetType = UNSET
    """Fingerprint of the neighbours."""
    cached: float | UnsetType = UNSET
    """Share of tokens that have a cache."""
    cache_files: str | UnsetType = UNSET
    """Fingerprint of the cache's files."""
    bootstrap: Bootstrap | UnsetType = UNSET
    """Intervals; absent in old files."""

    def __post_init__(self) -> None:
        all_or_none(self, "knn", "retrieved", "shuffled", "neighbours")

    def of(self, mixture: str) -> Figures | None:
        """The figures of one of NAMES, None where it is absent."""
        found: Figures | UnsetType = getattr(self, mixture)
        return found or None

    def figures(self, mixture: str) -> Figures:
        """The same of one that is there."""
        return given(getattr(self, mixture))


class StoreFacts(Part):
    """The datastore."""

    rows: int
    """Keys."""
    width: int
    """Numbers in a key, D."""
    bytes: int
    """Size on disk, in bytes."""
    dtype: str
    """numpy dtype of the keys."""
    tap: str
    """Name of the hidden state."""
    fingerprint: str
    """Hash of its manifest."""


class IndexFacts(Part):
    """The index."""

    factory: str
    """faiss factory string."""
    nlist: int
    """Inverted lists."""
    bytes: int
    """Size on disk, in bytes."""
    fingerprint: str
    """Hash of its description."""


class Rung(Part):
    """One kind of distances in the exactness ladder."""

    loss_nats: float
    """Nats per token of the sample."""
    perplexity: float
    """exp of it."""
    recall: float
    """Share of the true k nearest among the k that were used."""


class CandidatesRung(Part):
    """What exact distances find among so many candidates of the index."""

    candidates: int
    """Neighbours that the index was asked for."""
    loss_nats: float
    """Nats per token of the sample."""
    perplexity: float
    """exp of it."""
    recall: float
    """Share of the true k nearest among the k that exact distances chose."""


class Ladder(Part):
    """What approximation costs on a sample of tokens, λ, temperature and k as frozen (evaluate/ladder.py)."""

    split: str
    """The split of the sample."""
    queries: int
    """Tokens of the sample."""
    k: int
    """Neighbours used."""
    searched: int
    """Neighbours that the index was asked for."""
    nprobe: int
    """Lists searched per query."""
    lm: Figures
    """The language model alone on the sample."""
    exact: Rung
    """Every key of the store compared."""
    rescored: Rung
    """The index's neighbours, squared L2 over the true keys."""
    quantised: Rung
    """The index's neighbours and distances as they are."""
    key: str
    """Hash of all that this depends on."""
    candidates: list[CandidatesRung] | UnsetType = UNSET
    """k, 2k and 4k candidates, and as many as were searched; absent in old files."""


class Results(Record, kw_only=True):
    """Perplexities of every split with the frozen settings, and everything needed to read them.

    Without neighbours (language model and cache only) datastore, index, exactness, ladder and self_test are null.
    """

    FILE = "RUN/results/LABEL.json, RUN/results.json"
    WHAT = "evaluation results"
    WRITER = "distlm knn evaluate"
    READERS = ("distlm knn evaluate", "distlm report", "distlm reproduce", "distlm run", "distlm submit")
    MEND = "run `distlm knn evaluate` again"

    name: str
    """Of the run."""
    model: ModelFacts
    """The language model."""
    dictionary: DictionaryFacts
    """The dictionary."""
    tokens: str
    """Fingerprint of the token files."""
    context_rule: str
    """Which context each token sees, in words."""
    settings: Settings
    """The frozen settings."""
    tuned_on: str
    """The split they were chosen on; every other split is evaluated with them as they are."""
    splits: dict[str, SplitResults]
    """Split → what was found."""
    datastore: StoreFacts | None
    """The datastore."""
    index: IndexFacts | None
    """The index; null for brute force, too."""
    exactness: str | None
    """What the distances are, in words."""
    ladder: Ladder | UnsetType | None = UNSET
    """What approximation costs; null for brute force, too; absent in old files."""
    self_test: SelfTest | None
    """How many of the store's own keys the search finds."""
    seconds: dict[str, float] | UnsetType = UNSET
    """Stage → seconds of wall time over all its starts, this evaluation included."""
    hashes: dict[str, str]
    """What it was made from → fingerprint; settings: hash of knn.json without its format."""
    code: CodeVersion
    """The code of the evaluation."""
    verified: bool | UnsetType = UNSET
    """false: files were read without comparing them with their checksums (--no-verify)."""

    def __post_init__(self) -> None:
        there = {name for split in self.splits.values() for name in NAMES if split.of(name)}
        for name, setting in (("knn", "weight"), ("cache", "cache"), ("both", "both"), ("stores", "stores")):
            if name in there and getattr(self.settings, setting) is UNSET:
                raise ValueError(f"`settings` has none of `{name}`, which a split was evaluated with")
        if "knn" in there and None in (self.datastore, self.exactness, self.self_test):
            raise ValueError("`datastore`, `exactness` or `self_test` is null, and a split was evaluated with `knn`")

    def mixtures(self) -> list[str]:
        """Those of the language model and its mixtures that every split has, in order."""
        return [name for name in NAMES if all(split.of(name) for split in self.splits.values())]


NAMES = ("lm", "cache", "knn", "knn_buckets", "gate", "stores", "both", "both_buckets")
"""The language model alone and what it can be mixed with: fields of SplitResults."""


class LossesFile(Record):
    """What the losses beside it are of: fp64 nats of every token under each mixture; written last."""

    FILE = "RUN/losses/LABEL/SPLIT/losses.json"
    WHAT = "description of losses"
    WRITER = "distlm knn evaluate"
    READERS = ("distlm report",)
    MEND = "run `distlm knn evaluate` again"

    kind: Literal["losses"]
    """What the folder holds."""
    split: str
    """Name of the split."""
    tokens: int
    """Evaluated tokens Q."""
    dictionary: str
    """Hash of the dictionary, which lies beside the splits."""
    context_rule: str
    """Which context each token sees, in words."""
    model: str
    """Fingerprint of the model."""
    token_files: str
    """Fingerprint of the token files."""
    hashes: dict[str, str]
    """Array → xxh3-128 of its .npy file: targets, and the mixtures there are."""
    dictionary_file: str | UnsetType = UNSET
    """xxh3-128 of the dictionary's file."""
