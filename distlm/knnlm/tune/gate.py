"""A learned gate: λ of each token from what is known before its search, so that searches can be skipped.

He, Neubig and Berg-Kirkpatrick (2021), "Efficient Nearest Neighbor Language Models", section 4: where the gate's λ is
low the search is not worth its time. Here the gate is a logistic regression, λ = σ(w·x + b), on the hidden state that
would be the query, the language model's log-probability of the tokens before, and how often those occur in the training
text; all of it is known before the target is. (On the states alone it did as well on held-out text as with a hidden
layer of 32, which only fitted valid better.) It minimises the loss of the mixture itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.knnlm.scoring import Floats
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.records import GateValues

Rows = npt.NDArray[np.float32]

BEFORE = 3
"""Tokens before the target whose log-probability and frequency are features."""
SKIPS = tuple(i / 10 for i in range(11))
"""Shares of searches skipped, for the curve."""
MOST = 0.99
"""Largest λ: the target may be among no neighbours."""
ROWS = 4096
"""Tokens of one step."""
EPOCHS, LEAST_STEPS, RATE, BETAS = 6, 200, 0.005, (0.9, 0.999)
RIDGE = 10.0
"""Weight of |w|²/2 beside the summed loss of all tokens, in nats: holds small corpora back."""


@dataclass(frozen=True)
class Features:
    """What is known of each token before its search."""

    queries: npt.NDArray[np.floating]
    """[Q, D] in the keys' dtype."""
    others: npt.NDArray[np.float32]
    """fp32 [Q, 2 · BEFORE]: log-probability of each of the tokens before, and log(1 + its count in train)."""

    def __len__(self) -> int:
        return len(self.others)

    def rows(self, chosen: npt.NDArray[np.int64] | slice) -> Rows:
        """x of some tokens: fp32 [n, D + 2 · BEFORE]."""
        return np.concatenate([self.queries[chosen].astype(np.float32), self.others[chosen]], axis=1)

    def chunks(self) -> Iterator[Rows]:
        """x of all tokens, in order."""
        for first in range(0, len(self), ROWS):
            yield self.rows(slice(first, first + ROWS))


def log_counts(dictionary: Dictionary) -> Floats:
    """log(1 + count in the training text) of each id of the dictionary: fp64 [V]."""
    return np.log1p(np.array(dictionary.counts, np.float64))


def of_tokens_before(log_probs: npt.NDArray[np.floating], counts: Floats) -> npt.NDArray[np.float32]:
    """Features.others of n tokens that follow each other, from ln p and log(1 + count) [n] of each: fp32
    [n, 2 · BEFORE]; 0 where there is no token before."""
    others = np.zeros((len(log_probs), 2 * BEFORE), np.float32)
    for back in range(1, BEFORE + 1):
        others[back:, back - 1] = log_probs[:-back]
        others[back:, BEFORE + back - 1] = counts[:-back]
    return others


def features_of(neighbours: Neighbours, dictionary: Dictionary) -> Features:
    """Features of every token of a split. Memory: the queries, Q × D numbers of the keys' dtype."""
    units = list(neighbours.units())
    targets = np.concatenate([np.asarray(unit.targets) for unit in units])
    log_probs = np.concatenate([np.asarray(unit.log_probs) for unit in units])
    others = of_tokens_before(log_probs, log_counts(dictionary)[targets])
    return Features(np.concatenate([np.asarray(unit.queries) for unit in units]), others)


@dataclass(frozen=True)
class Gate:
    """A fitted gate."""

    weights: npt.NDArray[np.float32]
    """fp32 [D + 2 · BEFORE]."""
    bias: float
    thresholds: Floats
    """fp64 [len(SKIPS)]: at this λ and above a token is searched for, when the share of SKIPS is skipped."""

    def lambdas(self, features: Features) -> Floats:
        """λ of each token: fp64 [Q], in [0, MOST]."""
        logits = [chunk @ self.weights for chunk in features.chunks()]
        return _weights(np.concatenate([np.empty(0, np.float32), *logits]) + self.bias)

    def record(self) -> GateValues:
        """For knn.json."""
        return GateValues(self.bias, self.thresholds.tolist(), self.weights.tolist())

    @classmethod
    def of(cls, record: GateValues) -> "Gate":
        """The same again, every bit."""
        return cls(np.array(record.weights, np.float32), record.bias, np.array(record.thresholds))


def fit_gate(
    features: Features, chosen: npt.NDArray[np.int64], log_lm: Floats, log_knn: Floats, default: float
) -> Gate:
    """Fit on the tokens `chosen` [n]; `log_lm`, `log_knn` fp64 [Q] of all tokens. Begins at a constant λ of `default`.

    The same inputs give the same gate on one machine; it is kept in knn.json, not fitted again.
    """
    mean, deviation = _moments(features, chosen)
    ratio = np.expm1(np.minimum(log_knn - log_lm, 700))[chosen]
    share = min(max(default, 0.01), 0.9) / MOST
    theta = np.append(np.zeros(len(mean)), math.log(share / (1 - share)))
    momentum, squares = np.zeros((2, len(theta)))
    steps = max(LEAST_STEPS, EPOCHS * -(-len(chosen) // ROWS)) if len(chosen) else 0
    for step, places in enumerate(_batches(len(chosen), steps)):
        x = (features.rows(chosen[places]) - mean) / deviation
        weight = _weights(x @ theta[:-1].astype(np.float32) + theta[-1])
        # d/dz of −log((1 − λ) + λ r), divided by p_LM, at λ = MOST σ(z).
        slope = -ratio[places] / (1 + weight * ratio[places]) * weight * (1 - weight / MOST) / len(places)
        gradient = np.append(x.T @ slope.astype(np.float32) + RIDGE / len(chosen) * theta[:-1], slope.sum())
        # Adam (Kingma and Ba 2015), its rate falling to 0.
        momentum = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
        squares = BETAS[1] * squares + (1 - BETAS[1]) * gradient**2
        unbiased = momentum / (1 - BETAS[0] ** (step + 1)), squares / (1 - BETAS[1] ** (step + 1))
        theta -= RATE * (1 - step / steps) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    plain = theta[:-1] / deviation
    gate = Gate(plain.astype(np.float32), float(theta[-1] - plain @ mean), np.zeros(len(SKIPS)))
    own = np.sort(gate.lambdas(Features(features.queries[chosen], features.others[chosen])))
    return Gate(gate.weights, gate.bias, np.array([_threshold(own, share) for share in SKIPS]))


def skip_curve(
    lambdas: Floats, thresholds: Floats, log_lm: Floats, log_gate: Floats
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Skipped share of the searches, and loss in nats, at each of SKIPS, with p_LM where nothing is searched.

    `lambdas` fp64 [Q], `thresholds` fp64 [len(SKIPS)] or [len(SKIPS), Q], `log_gate` fp64 [Q] with every search done.
    """
    wanted = [lambdas >= threshold for threshold in thresholds]
    skipped = [float(1 - np.mean(searched)) for searched in wanted]
    return skipped, [float(-np.mean(np.where(searched, log_gate, log_lm))) for searched in wanted]


def _weights(logits: Floats) -> Floats:
    """MOST σ(z): fp64 [n]."""
    return MOST * 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))


def _moments(features: Features, chosen: npt.NDArray[np.int64]) -> tuple[Rows, Rows]:
    """Mean and standard deviation of each feature over `chosen`: fp32 [D + 2 · BEFORE]; constants have deviation 1."""
    width = features.queries.shape[1] + features.others.shape[1]
    total, squares = np.zeros((2, width))
    for first in range(0, len(chosen), ROWS):
        x = features.rows(chosen[first : first + ROWS]).astype(np.float64)
        total += x.sum(axis=0)
        squares += np.square(x).sum(axis=0)
    mean = total / max(len(chosen), 1)
    deviation = np.sqrt(np.maximum(squares / max(len(chosen), 1) - mean**2, 0))
    return mean.astype(np.float32), np.where(deviation < 1e-6, 1, deviation).astype(np.float32)


def _batches(count: int, steps: int) -> Iterator[npt.NDArray[np.int64]]:
    """`steps` batches of about ROWS of `count` places, a new order every time around."""
    random = np.random.Generator(np.random.Philox(key=[2, count]))
    made = 0
    while made < steps:
        order = random.permutation(count)
        for first in range(0, count, ROWS):
            if made == steps:
                return
            yield order[first : first + ROWS]
            made += 1


def _threshold(ordered: Floats, share: float) -> float:
    """The λ below which lie `share` of the rising `ordered`: 0 for none of them, above all λ for a share of 1."""
    if share == 0:
        return 0.0
    place = round(share * len(ordered))
    return float(ordered[place]) if place < len(ordered) else 1.0
