"""λ of each token, by distance (buckets.py) or by the gate (gate.py): fitted on the first split, frozen for the others.

The first split's own figures are cross-fitted: its documents are dealt into two halves, and each half is mixed with
what was fitted on the other, so that no figure is of tokens that it was fitted on. (Temperature and k are still those
chosen on the whole split, as for the constant λ.)

knn.json: {buckets: {edges, lambdas, halves: [the same twice], loss_nats, perplexity (both cross-fitted)}, gate: {bias,
thresholds, weights, halves, loss_nats, perplexity}, halves_of: documents or blocks}.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from distlm.config.schema import KnnConfig
from distlm.data.dictionary import Dictionary
from distlm.knnlm.buckets import Buckets, fit_buckets
from distlm.knnlm.documents import Groups, group_tokens
from distlm.knnlm.gate import SKIPS, Features, Gate, features_of, fit_gate, skip_curve
from distlm.knnlm.neighbours import Neighbours
from distlm.knnlm.scoring import Floats, mean_loss, mix

T = TypeVar("T", Buckets, Gate)


@dataclass(frozen=True)
class Fitted:
    """The adaptive part of knn.json; `*_halves` are fitted on half 0 and half 1 of the tuned split alone."""

    split: str
    buckets: Buckets | None
    bucket_halves: tuple[Buckets, ...]
    gate: Gate | None
    gate_halves: tuple[Gate, ...]

    @classmethod
    def from_json(cls, tuned: Mapping[str, Any]) -> "Fitted":
        """From knn.json."""
        buckets, gate = tuned.get("buckets"), tuned.get("gate")
        return cls(
            tuned["split"],
            Buckets.from_json(buckets) if buckets else None,
            tuple(Buckets.from_json(half) for half in buckets["halves"]) if buckets else (),
            Gate.from_json(gate) if gate else None,
            tuple(Gate.from_json(half) for half in gate["halves"]) if gate else (),
        )


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


def tune_adaptive(
    facts: SplitFacts, knn: KnnConfig, log_lm: Floats, log_knn: Floats, default: float
) -> dict[str, Any]:  # fmt: skip
    """The adaptive part of knn.json; `log_knn` fp64 [Q] at the frozen temperature and k, `default` the constant λ."""
    halves = facts.groups.halves
    places = [np.arange(len(halves)), *(np.flatnonzero(halves == half) for half in (0, 1))]
    tuned: dict[str, Any] = {"halves_of": facts.groups.kind}
    if knn.buckets:
        buckets = [
            fit_buckets(facts.nearest[some], log_lm[some], log_knn[some], knn.buckets, default) for some in places
        ]
        weights = swapped(buckets[1:], halves, lambda fit: fit.weights(facts.nearest))
        tuned["buckets"] = _entry(buckets, mix(log_lm, log_knn, weights))
    if knn.gate:
        features = features_of(facts.neighbours, facts.dictionary)
        gates = [fit_gate(features, some, log_lm, log_knn, default) for some in places]
        weights = swapped(gates[1:], halves, lambda fit: fit.lambdas(features))
        tuned["gate"] = _entry(gates, mix(log_lm, log_knn, weights))
    return tuned


def bucket_weights(facts: SplitFacts, fitted: Fitted) -> Floats:
    """λ of each token by its nearest distance: fp64 [Q]; cross-fitted on the tuned split."""
    assert fitted.buckets is not None
    if facts.neighbours.manifest["split"] != fitted.split:
        return fitted.buckets.weights(facts.nearest)
    return swapped(fitted.bucket_halves, facts.groups.halves, lambda fit: fit.weights(facts.nearest))


def gate_mixture(
    facts: SplitFacts, fitted: Fitted, log_lm: Floats, log_knn: Floats
) -> tuple[Floats, dict[str, Any]]:  # fmt: skip
    """Log-probability of each token with the gate's λ, fp64 [Q], and the curve over skipped searches for results.json:
    {wanted, skipped, loss_nats, perplexity}, one number for each of SKIPS."""
    assert fitted.gate is not None
    features: Features = features_of(facts.neighbours, facts.dictionary)
    thresholds: Floats = fitted.gate.thresholds
    if facts.neighbours.manifest["split"] != fitted.split:
        lambdas = fitted.gate.lambdas(features)
    else:
        halves = facts.groups.halves
        lambdas = swapped(fitted.gate_halves, halves, lambda fit: fit.lambdas(features))
        thresholds = np.stack([fit.thresholds for fit in fitted.gate_halves], axis=1)[:, 1 - halves]
    scores = mix(log_lm, log_knn, lambdas)
    curve = skip_curve(lambdas, thresholds, log_lm, scores)
    perplexities = [math.exp(loss) for loss in curve["loss_nats"]]
    return scores, {"wanted": list(SKIPS), **curve, "perplexity": perplexities}


def swapped(fits: "list[T] | tuple[T, ...]", halves: npt.NDArray[np.int64], weights: Callable[[T], Floats]) -> Floats:
    """λ of each token by what was fitted on the half that it is not in: fp64 [Q]."""
    return np.where(halves == 0, weights(fits[1]), weights(fits[0]))


def _entry(fits: "list[T]", scores: Floats) -> dict[str, Any]:
    whole, *halves = fits
    loss = mean_loss(scores)
    return {**whole.as_json(), "halves": [half.as_json() for half in halves], "loss_nats": loss,
            "perplexity": math.exp(loss)}  # fmt: skip
