"""λ, temperature and k: chosen on the first split of knn.splits from its files, then frozen in knn.json.

knn.json: {lambda, temperature, k, loss_nats, perplexity, lm_loss_nats, lm_perplexity, split, tokens, grid: {lambdas,
temperatures, ks, loss_nats [ks][temperatures][lambdas]}, edges (settings that stand at the end of their grid),
neighbours, datastore, index, model (fingerprints)}. Losses are nats per token, perplexities are per word.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.config.schema import KnnConfig
from distlm.errors import DistlmError
from distlm.knnlm.neighbours import Neighbours
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.runtime.collective import rank0_first
from distlm.runtime.files import write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.stage import Stage

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Best:
    """The best point of a grid."""

    weight: float
    temperature: float
    k: int
    loss: float


def run_tune(stage: Stage) -> dict[str, Any]:
    """Choose λ, temperature and k on the first split of knn.splits and write knn.json; no other split is opened.

    Returns lambda, temperature, k, perplexity and lm_perplexity. Rank 0 works alone.
    Raises DistlmError when the split was not searched, or was searched with fewer neighbours than knn.ks asks for.
    """
    return rank0_first(stage.comm, lambda: _tune(stage))


def _tune(stage: Stage) -> dict[str, Any]:
    start = time.monotonic()
    knn = stage.config.knn
    neighbours = Neighbours.open(stage.run.neighbours(knn.splits[0]))
    if max(knn.ks) > neighbours.k:
        raise DistlmError(f"knn.ks={knn.ks}: {neighbours.folder} holds {neighbours.k} neighbours; search with more")
    log_lm = neighbours.log_probs()
    with Progress("knn tune", len(knn.temperatures), "temperatures") as progress:
        losses = grid_losses(neighbours, knn, lambda: progress.advance())
    best = best_of(losses, knn.lambdas, knn.temperatures, knn.ks)
    edges = edge_warnings(best, knn, neighbours.k)
    for warning in edges:
        say(f"knn tune: warning: {warning}")
    lm_loss = mean_loss(log_lm)
    tuned = {
        "lambda": best.weight, "temperature": best.temperature, "k": best.k,
        "loss_nats": best.loss, "perplexity": math.exp(best.loss),
        "lm_loss_nats": lm_loss, "lm_perplexity": math.exp(lm_loss),
        "split": knn.splits[0], "tokens": neighbours.tokens,
        "grid": {
            "lambdas": knn.lambdas, "temperatures": knn.temperatures, "ks": knn.ks, "loss_nats": losses.tolist(),
        },
        "edges": edges, "neighbours": neighbours.fingerprint,
        **{name: neighbours.manifest[name] for name in ("datastore", "index", "model")},
    }  # fmt: skip
    write_json(stage.run.tuned, tuned)
    seconds = time.monotonic() - start
    stage.run.metrics.write("knn tune", {STAGE_SECONDS: round(seconds, 3)})
    return {"seconds": seconds, **{name: tuned[name] for name in ("lambda", "temperature", "k", "perplexity",
            "lm_perplexity")}}  # fmt: skip


def grid_losses(neighbours: Neighbours, knn: KnnConfig, tick: Callable[[], None] = lambda: None) -> Floats:
    """Nats per token at every point of the grid: fp64 [ks, temperatures, lambdas]. `tick` is called per temperature."""
    log_lm = neighbours.log_probs()
    losses = np.empty((len(knn.ks), len(knn.temperatures), len(knn.lambdas)))
    for place, temperature in enumerate(knn.temperatures):
        log_knn = split_knn_log_probs(neighbours, temperature, knn.ks)
        for row, scores in enumerate(log_knn):
            losses[row, place] = [mean_loss(interpolate(log_lm, scores, weight)) for weight in knn.lambdas]
        tick()
    return losses


def split_knn_log_probs(neighbours: Neighbours, temperature: float, ks: Sequence[int]) -> Floats:
    """log p_kNN(target) of every token of a split, in order: fp64 [len(ks), Q]; −inf where never retrieved."""
    units = [knn_log_probs(unit.distances, unit.values, unit.targets, temperature, ks) for unit in neighbours.units()]
    return np.concatenate(units, axis=1)


def best_of(losses: Floats, lambdas: Sequence[float], temperatures: Sequence[float], ks: Sequence[int]) -> Best:
    """The lowest loss of [ks, temperatures, lambdas]; of equal losses the smallest λ, then k, then temperature."""
    candidates = [
        (float(losses[a, b, c]), lambdas[c], ks[a], temperatures[b])
        for a in range(len(ks))
        for b in range(len(temperatures))
        for c in range(len(lambdas))
    ]
    loss, weight, k, temperature = min(candidates)
    return Best(weight, temperature, k, loss)


def edge_warnings(best: Best, knn: KnnConfig, searched: int) -> list[str]:
    """Settings whose best value is the last of its grid, so that a wider grid may hold a better one."""
    warnings = []
    if best.weight == 0:
        return ["the best λ is 0: the neighbours do not help on this split"]
    if len(knn.lambdas) > 1 and best.weight == max(knn.lambdas):
        warnings.append(f"the best λ={best.weight} is the largest of knn.lambdas; add larger ones")
    if len(knn.temperatures) > 1 and best.temperature in (min(knn.temperatures), max(knn.temperatures)):
        end = "smallest" if best.temperature == min(knn.temperatures) else "largest"
        warnings.append(
            f"the best temperature={best.temperature} is the {end} of knn.temperatures; add {end[:-3]}er ones"
        )
    if len(knn.ks) > 1 and best.k == max(knn.ks):
        more = "search with a larger knn.k" if best.k == searched else "add larger ones"
        warnings.append(f"the best k={best.k} is the largest of knn.ks; {more} if there is room")
    return warnings
