"""λ of each token, by distance (buckets.py) or by the gate (gate.py): fitted on the first split, frozen for the others.

The first split's own figures are cross-fitted: its documents are dealt into two halves, and each half is mixed with
what was fitted on the other, so that no figure is of tokens that it was fitted on. (Temperature and k are still those
chosen on the whole split, as for the constant λ.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import UnsetType

from distlm.config.schema import KnnConfig
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.knnlm.cache.scores import add_cache
from distlm.knnlm.evaluate.documents import Groups, group_tokens
from distlm.knnlm.scoring import Floats, mean_loss, mix
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.buckets import Buckets, fit_buckets
from distlm.knnlm.tune.gate import SKIPS, Gate, features_of, fit_gate, skip_curve
from distlm.knnlm.tune.records import (
    BothSettings,
    BucketValues,
    Figures,
    GateCurve,
    Tuned,
    TunedBothBuckets,
    TunedBuckets,
    TunedGate,
)
from distlm.models.perplexity import perplexity

T = TypeVar("T", Buckets, Gate)


@dataclass(frozen=True)
class Fit(Generic[T]):
    """What was fitted on the whole tuned split, and on each of its halves alone."""

    whole: T
    halves: tuple[T, ...]

    def weights(self, weigh: Callable[[T], Floats], halves: npt.NDArray[np.int64] | None) -> Floats:
        """λ of each token, fp64 [Q]: `weigh` of the whole fit, or with `halves` [Q], on the tuned split, of the one
        from the half that the token is not in."""
        return weigh(self.whole) if halves is None else swapped(self.halves, halves, weigh)


@dataclass(frozen=True)
class Fitted:
    """The adaptive part of knn.json."""

    split: str
    buckets: Fit[Buckets] | None
    gate: Fit[Gate] | None
    both: Fit[Buckets] | None
    """Buckets beside a cache of weight `both_cache`."""
    both_cache: float
    halves: str
    """Fingerprint of the groups whose halves were fitted on; empty where nothing was fitted."""

    @classmethod
    def of(cls, tuned: Tuned) -> "Fitted":
        """From knn.json."""
        gate, both = tuned.gate, tuned.both_buckets
        return cls(
            tuned.split, _buckets_of(tuned.buckets),
            Fit(Gate.of(gate), tuple(map(Gate.of, gate.halves))) if gate else None,
            _buckets_of(both), both.cache_lambda if both else 0.0, tuned.halves or "",
        )  # fmt: skip


@dataclass(frozen=True)
class SplitFacts:
    """What the adaptive weights of a split are made from."""

    neighbours: Neighbours
    groups: Groups
    nearest: npt.NDArray[np.float32]
    """fp32 [Q]: squared L2 of the nearest neighbour, inf without any."""
    dictionary: Dictionary

    @classmethod
    def read(cls, neighbours: Neighbours, dictionary: Dictionary) -> "SplitFacts":
        """From the neighbours of a split."""
        groups = group_tokens(neighbours.targets(), dictionary, neighbours.manifest)
        nearest = np.concatenate([np.asarray(unit.distances[:, 0]) for unit in neighbours.units()])
        return cls(neighbours, groups, nearest, dictionary)


def has_distances(neighbours: Neighbours) -> bool:
    """Whether a nearest neighbour has a distance that λ can depend on: of dot products it is always 0."""
    return neighbours.manifest.similarity != "dot"


def tune_adaptive(
    tuned: Tuned, facts: SplitFacts, knn: KnnConfig, log_lm: Floats, log_knn: Floats, default: float
) -> None:  # fmt: skip
    """The adaptive part of `tuned`; `log_knn` fp64 [Q] at the frozen temperature and k, `default` the constant λ."""
    halves = facts.groups.halves
    tuned.halves_of, tuned.halves = facts.groups.kind, facts.groups.fingerprint
    if knn.buckets and has_distances(facts.neighbours):
        fit = fit_bucket_halves(facts, log_lm, log_knn, knn.buckets, default)
        weights = fit.weights(lambda part: part.weights(facts.nearest), halves)
        found, whole = figures(mix(log_lm, log_knn, weights)), fit.whole.record()
        tuned.buckets = TunedBuckets(
            whole.edges, whole.lambdas, _halves(fit), found.loss_nats, found.perplexity
        )  # fmt: skip
    if knn.gate:
        features = features_of(facts.neighbours, facts.dictionary)
        gates = [fit_gate(features, some, log_lm, log_knn, default) for some in whole_and_halves(halves)]
        gate = Fit(gates[0], tuple(gates[1:]))
        weights = gate.weights(lambda part: part.lambdas(features), halves)
        found, values = figures(mix(log_lm, log_knn, weights)), gate.whole.record()
        tuned.gate = TunedGate(
            values.bias, values.thresholds, values.weights, [half.record() for half in gate.halves], found.loss_nats,
            found.perplexity,
        )  # fmt: skip


def tune_both_buckets(
    facts: SplitFacts, count: int, log_lm: Floats, log_knn: Floats, log_cache: Floats, both: BothSettings,
    cache_lambdas: Sequence[float],
) -> TunedBothBuckets:  # fmt: skip
    """Buckets beside the cache, and its λ.

    Begins at the two constant λ of `both`; the buckets are fitted beside the cache, its λ is chosen anew beside them
    (on the whole split, of equal losses the smallest), and they are fitted once more.
    """
    fit, of_cache = None, both.cache_lambda
    for _ in range(2):
        if fit is not None:
            mixed = mix(log_lm, log_knn, fit.whole.weights(facts.nearest))
            of_cache = min((mean_loss(add_cache(mixed, log_cache, weight)), weight) for weight in cache_lambdas)[1]
        without, with_knn = add_cache(log_lm, log_cache, of_cache), add_cache(log_knn, log_cache, of_cache)
        fit = fit_bucket_halves(facts, without, with_knn, count, both.knn_lambda)
    assert fit is not None
    scores = _both(fit, of_cache, facts, facts.groups.halves, log_lm, log_knn, log_cache)
    found, whole = figures(scores), fit.whole.record()
    return TunedBothBuckets(of_cache, whole.edges, whole.lambdas, _halves(fit), found.loss_nats, found.perplexity)


def adaptive_mixtures(
    facts: SplitFacts, fitted: Fitted, log_lm: Floats, log_knn: Floats, log_cache: Floats | None
) -> tuple[dict[str, Floats], GateCurve | None]:
    """Log-probability of each token, fp64 [Q], under knn_buckets, gate and both_buckets as far as they were fitted,
    and with a gate what skipped searches cost at every one of SKIPS. Cross-fitted on the tuned split; DistlmError when
    its halves are not those that were fitted on. `log_cache` as of Cache.log_probs.
    """
    own = facts.neighbours.manifest.split == fitted.split
    halves = facts.groups.halves if own else None
    now = facts.groups.fingerprint
    if own and fitted.halves and fitted.halves != now:
        # With other halves a token would be mixed with a λ that was fitted on that token.
        raise DistlmError(
            f"knn.json: fitted on other halves of {fitted.split} ({fitted.halves}; now they are {now}); run "
            "`distlm knn tune` again"
        )
    scores: dict[str, Floats] = {}
    curve = None
    if fitted.buckets is not None:
        weights = fitted.buckets.weights(lambda part: part.weights(facts.nearest), halves)
        scores["knn_buckets"] = mix(log_lm, log_knn, weights)
    if fitted.gate is not None:
        features = features_of(facts.neighbours, facts.dictionary)
        lambdas = fitted.gate.weights(lambda part: part.lambdas(features), halves)
        scores["gate"] = mix(log_lm, log_knn, lambdas)
        thresholds = fitted.gate.whole.thresholds
        if halves is not None:
            thresholds = np.stack([part.thresholds for part in fitted.gate.halves], axis=1)[:, 1 - halves]
        skipped, losses = skip_curve(lambdas, thresholds, log_lm, scores["gate"])
        curve = GateCurve(list(SKIPS), skipped, losses, [perplexity(loss) for loss in losses])
    if fitted.both is not None and log_cache is not None:
        both = _both(fitted.both, fitted.both_cache, facts, halves, log_lm, log_knn, log_cache)
        scores["both_buckets"] = both
    return scores, curve


def fit_bucket_halves(
    facts: SplitFacts, without: Floats, with_knn: Floats, count: int, default: float
) -> Fit[Buckets]:  # fmt: skip
    """fit_buckets on the whole split and on each half."""
    fits = [
        fit_buckets(facts.nearest[some], without[some], with_knn[some], count, default)
        for some in whole_and_halves(facts.groups.halves)
    ]
    return Fit(fits[0], tuple(fits[1:]))


def whole_and_halves(halves: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Places of all tokens, of half 0 and of half 1."""
    return [np.arange(len(halves)), *(np.flatnonzero(halves == half) for half in (0, 1))]


def swapped(fits: Sequence[T], halves: npt.NDArray[np.int64], weigh: Callable[[T], Floats]) -> Floats:
    """λ of each token, fitted on the half that the token is not in: fp64 [Q]."""
    return np.where(halves == 0, weigh(fits[1]), weigh(fits[0]))


def figures(scores: Floats) -> Figures:
    """Loss and perplexity of log-probabilities [Q]."""
    loss = mean_loss(scores)
    return Figures(loss, perplexity(loss))


def _buckets_of(record: TunedBuckets | TunedBothBuckets | UnsetType) -> Fit[Buckets] | None:
    return Fit(Buckets.of(record), tuple(map(Buckets.of, record.halves))) if record else None


def _halves(fit: Fit[Buckets]) -> list[BucketValues]:
    return [half.record() for half in fit.halves]


def _both(
    fit: Fit[Buckets], of_cache: float, facts: SplitFacts, halves: npt.NDArray[np.int64] | None,
    log_lm: Floats, log_knn: Floats, log_cache: Floats,
) -> Floats:  # fmt: skip
    weights = fit.weights(lambda part: part.weights(facts.nearest), halves)
    return add_cache(mix(log_lm, log_knn, weights), log_cache, of_cache)
