"""What there is of a split to be mixed with the language model: neighbours, a neural cache, or both.

Mixtures, in log space and fp64; each λ is tuned for its mixture:
  knn    (1 − λ) p_LM + λ p_kNN                                      (Khandelwal et al., eq. 3)
  cache  (1 − λ) p_LM + λ p_cache, p_LM where there is no cache yet  (Grave et al., eq. 5)
  both   (1 − λ_c) [(1 − λ_k) p_LM + λ_k p_kNN] + λ_c p_cache, the first part where there is no cache yet
  stores  (1 − Σ λ_i) p_LM + Σ λ_i p_i over several datastores (stores.py)
  knn_buckets, gate, both_buckets    knn or both with a λ_k of its own for each token (adaptive.py)
With a λ of 0 its part drops out bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import UnsetType

from distlm.config.schema import KnnConfig
from distlm.errors import DistlmError
from distlm.knnlm.cache.files import Cache
from distlm.knnlm.cache.scores import add_cache
from distlm.knnlm.scoring import Floats, interpolate
from distlm.knnlm.search.neighbours import MANIFEST, PLAN, Neighbours, written_units
from distlm.knnlm.search.records import NeighboursManifest, StatesManifest
from distlm.knnlm.search.states import COMMAND, States
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.checked import Written
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


@dataclass(frozen=True)
class Frozen:
    """The settings of the neighbours in knn.json."""

    weight: float
    temperature: float
    k: int
    split: str
    neighbours: str


@dataclass(frozen=True)
class FrozenCache:
    """The settings of the cache in knn.json, and of both together where there are neighbours too."""

    weight: float
    theta: float
    window: int
    cache: str
    """Fingerprint of the files it was tuned on."""
    both: tuple[float, float] | None = None
    """λ of the neighbours and λ of the cache in the mixture of both."""


@dataclass(frozen=True)
class Parts:
    """One split's finished files."""

    split: str
    neighbours: Neighbours | None
    cache: Cache | None
    states: States | None
    """Where the language model's log-probabilities are when there are no neighbours."""

    @property
    def source(self) -> StatesManifest | NeighboursManifest:
        """Manifest of the files that hold the language model's log-probabilities."""
        holder = self.neighbours or self.states
        assert holder is not None
        return holder.manifest

    @property
    def tokens(self) -> int:
        """Evaluated tokens Q."""
        return self.source.tokens

    def written(self) -> list[tuple[Path, list[Written]]]:
        """Folders and their arrays as they were written."""
        found = [] if self.neighbours is None else [(self.neighbours.folder, self.neighbours.written())]
        for part in (self.cache, self.states):
            if part is not None:
                found.append((part.folder, written_units(part.folder, part.manifest.units, COMMAND)))
        return found

    def log_lm(self) -> Floats:
        """The language model's log-probability of every token: fp64 [Q]."""
        holder = self.neighbours or self.states
        assert holder is not None
        return holder.log_probs()


def open_parts(run: RunDir, split: str, knn: KnnConfig) -> Parts:
    """Open what a split has for the question of the run directory.

    Raises DistlmError when it has nothing, when something is unfinished, or when cache and neighbours are not of the
    same model and tokens.
    """
    folder = run.kept_neighbours(split)
    searched = any((folder / name).is_file() for name in (PLAN, MANIFEST))
    cache = Cache.open(run.cache(split)) if Cache.is_started(run.cache(split)) else None
    if cache is None and not searched:
        raise DistlmError(
            f"{folder}: no search results (no {MANIFEST}); run `distlm knn search`, or `distlm knn cache` to evaluate "
            "the language model with a neural cache alone"
        )
    if searched:
        neighbours = Neighbours.asked(run, split, knn)
        if cache is not None:
            same = ("model", "token_files", "context_rule", "tokens")
            cache.require(str(folder), **{key: getattr(neighbours.manifest, key) for key in same})
        return Parts(split, neighbours, cache, None)
    assert cache is not None
    states = States.open(run.states(split))
    cache.require(str(states.folder), states=states.fingerprint)
    return Parts(split, None, cache, states)


def read_frozen(tuned: Tuned) -> Frozen | None:
    """The neighbours' part of knn.json."""
    if isinstance(tuned.weight, UnsetType):
        return None
    return Frozen(tuned.weight, given(tuned.temperature), given(tuned.k), tuned.split, given(tuned.neighbours))


def read_frozen_cache(tuned: Tuned) -> FrozenCache | None:
    """The cache's part of knn.json."""
    own, both = tuned.cache, tuned.both
    if not own:
        return None
    return FrozenCache(
        own.weight, own.theta, own.window, own.cache, (both.knn_lambda, both.cache_lambda) if both else None
    )


def mixtures(
    log_lm: Floats, log_knn: Floats | None, knn_weight: float, cache: Cache | None, frozen: FrozenCache | None
) -> dict[str, Floats]:
    """Name → log-probability of every token, fp64 [Q], for each of lm, cache, knn and both that can be had."""
    result = {"lm": log_lm}
    log_cache = None
    if cache is not None and frozen is not None:
        log_cache = cache.log_probs(frozen.window, frozen.theta)
        result["cache"] = add_cache(log_lm, log_cache, frozen.weight)
    if log_knn is not None:
        result["knn"] = interpolate(log_lm, log_knn, knn_weight)
    if log_knn is not None and log_cache is not None and frozen is not None and frozen.both is not None:
        of_knn, of_cache = frozen.both
        result["both"] = add_cache(interpolate(log_lm, log_knn, of_knn), log_cache, of_cache)
    return result


def share_cached(cache: Cache, frozen: FrozenCache) -> float:
    """Share of the tokens that have a cache."""
    return float(np.mean(~np.isnan(cache.log_probs(frozen.window, frozen.theta))))
