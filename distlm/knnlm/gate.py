"""A learned gate: λ of each token from what is known before its search, so that searches can be skipped.

He, Neubig and Berg-Kirkpatrick (2021), "Efficient Nearest Neighbor Language Models", section 4: where the gate's λ is
low the search is not worth its time. Here the gate is a logistic regression, λ = σ(w·x + b), on the hidden state that
would be the query, the language model's log-probability of the tokens before, and how often those occur in the training
text; all of it is known before the target is. (On the states alone it did as well on held-out text as with a hidden
layer of 32, which only fitted valid better.) It minimises the loss of the mixture itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distlm.data.dictionary import Dictionary
from distlm.knnlm.neighbours import Neighbours
from distlm.knnlm.scoring import Floats

BEFORE = 3
"""Tokens before the target whose log-probability and frequency are features."""
SKIPS = tuple(i / 10 for i in range(11))
"""Shares of searches skipped, for the curve."""
MOST = 0.99
"""Largest λ: the target may be among no neighbours."""
ROWS = 4096
"""Tokens of one step."""
EPOCHS, LEAST_STEPS, RATE = 6, 200, 0.005
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

    def rows(self, chosen: npt.NDArray[np.int64] | slice) -> torch.Tensor:
        """x of some tokens: fp32 [n, D + 2 · BEFORE]."""
        return torch.from_numpy(
            np.concatenate([self.queries[chosen].astype(np.float32), self.others[chosen]], axis=1)
        )  # fmt: skip

    def chunks(self) -> Iterator[torch.Tensor]:
        """x of all tokens, in order."""
        for first in range(0, len(self), ROWS):
            yield self.rows(slice(first, first + ROWS))


def features_of(neighbours: Neighbours, dictionary: Dictionary) -> Features:
    """Features of every token of a split. Memory: the queries, Q × D numbers of the keys' dtype."""
    units = list(neighbours.units())
    targets = np.concatenate([np.asarray(unit.targets) for unit in units])
    log_probs = np.concatenate([np.asarray(unit.log_probs) for unit in units])
    counts = np.log1p(np.array(dictionary.counts, np.float64))[targets]
    others = np.zeros((len(targets), 2 * BEFORE), np.float32)
    for back in range(1, BEFORE + 1):
        others[back:, back - 1] = log_probs[:-back]
        others[back:, BEFORE + back - 1] = counts[:-back]
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
        weights = torch.from_numpy(self.weights)
        logits = [chunk @ weights for chunk in features.chunks()]
        return MOST * torch.sigmoid(torch.cat(logits).double() + self.bias).numpy()

    def as_json(self) -> dict[str, Any]:
        """For knn.json."""
        return {"bias": self.bias, "thresholds": self.thresholds.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Gate":
        """The same again, every bit."""
        return cls(np.array(value["weights"], np.float32), value["bias"], np.array(value["thresholds"]))


def fit_gate(
    features: Features, chosen: npt.NDArray[np.int64], log_lm: Floats, log_knn: Floats, default: float
) -> Gate:
    """Fit on the tokens `chosen` [n]; `log_lm`, `log_knn` fp64 [Q] of all tokens. Begins at a constant λ of `default`.

    The same inputs give the same gate on one machine; it is kept in knn.json, not fitted again.
    """
    mean, deviation = _moments(features, chosen)
    ratio = torch.from_numpy(np.expm1(np.minimum(log_knn - log_lm, 700))[chosen])
    weights = torch.zeros(len(mean), requires_grad=True)
    share = min(max(default, 0.01), 0.9) / MOST
    bias = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=RATE)
    steps = max(LEAST_STEPS, EPOCHS * -(-len(chosen) // ROWS)) if len(chosen) else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    for places in _batches(len(chosen), steps):
        x = (features.rows(chosen[places]) - mean) / deviation
        weight = MOST * torch.sigmoid((x @ weights).double() + bias)
        loss = -torch.log1p(weight * ratio[places]).mean() + RIDGE / 2 / len(chosen) * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    plain = weights.detach() / deviation
    gate = Gate(plain.numpy(), float(bias.detach() - plain.double() @ mean.double()), np.zeros(len(SKIPS)))
    own = np.sort(gate.lambdas(Features(features.queries[chosen], features.others[chosen]))) if len(chosen) else []
    return Gate(gate.weights, gate.bias, np.array([_threshold(own, share) for share in SKIPS]))


def skip_curve(
    lambdas: Floats, thresholds: Floats, log_lm: Floats, log_gate: Floats
) -> dict[str, list[float]]:  # fmt: skip
    """Skipped share of the searches and loss in nats at each of SKIPS, with p_LM where nothing is searched.

    `lambdas` fp64 [Q], `thresholds` fp64 [len(SKIPS)] or [len(SKIPS), Q], `log_gate` fp64 [Q] with every search done.
    """
    wanted = [lambdas >= threshold for threshold in thresholds]
    return {
        "skipped": [float(1 - np.mean(searched)) for searched in wanted],
        "loss_nats": [float(-np.mean(np.where(searched, log_gate, log_lm))) for searched in wanted],
    }


def _moments(features: Features, chosen: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature over `chosen`: fp32 [D + 2 · BEFORE]; constants have deviation 1."""
    width = features.queries.shape[1] + features.others.shape[1]
    total, squares = torch.zeros(2, width, dtype=torch.float64)
    for first in range(0, len(chosen), ROWS):
        x = features.rows(chosen[first : first + ROWS]).double()
        total += x.sum(dim=0)
        squares += x.square().sum(dim=0)
    mean = total / max(len(chosen), 1)
    deviation = (squares / max(len(chosen), 1) - mean.square()).clamp(min=0).sqrt()
    deviation[deviation < 1e-6] = 1
    return mean.float(), deviation.float()


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


def _threshold(ordered: Sequence[float] | Floats, share: float) -> float:
    """The λ below which lie `share` of the rising `ordered`: 0 for none of them, above all λ for a share of 1."""
    if share == 0:
        return 0.0
    place = round(share * len(ordered))
    return float(ordered[place]) if place < len(ordered) else 1.0
