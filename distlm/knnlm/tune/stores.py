"""Several datastores in one mixture, each with a λ of its own: p = (1 − Σ λ_i) p_LM + Σ λ_i p_i.

Store 0 is the run's own; the others are those of knn.extra_runs, run directories in which the neighbours of the same
tokens were searched with the same model: another corpus (a domain store), another hidden state, another split. Each has
the temperature and k that are best for it alone. The λ maximise the likelihood of the first split by expectation
maximisation; it is concave in them, so that there is one best value and nothing to choose (λ_0 alone would be the best
constant λ of the kNN-LM). They are frozen for the other splits.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distlm.config.schema import KnnConfig
from distlm.errors import DistlmError
from distlm.knnlm.scoring import Floats
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.adaptive import figures
from distlm.knnlm.tune.grid import Best, best_of, grid_losses, split_knn_log_probs
from distlm.knnlm.tune.records import Store, Stores, TunedStores
from distlm.runtime.checked import Written
from distlm.runtime.rundir import RunDir

ITERATIONS = 1000
GAIN = 1e-9
"""Nats per token below which another iteration is not worth it."""


def tune_stores(
    own: Neighbours, best: Best, knn: KnnConfig, log_lm: Floats, log_knn: Floats
) -> TunedStores:  # fmt: skip
    """The best λ of each store; `best` holds the own store's temperature and k, `log_knn` fp64 [Q] is with them.

    Raises DistlmError as open_extra, or when an extra run has fewer neighbours than knn.ks asks for.
    """
    stores = [_entry("", own, best.temperature, best.k)]
    scores = [log_knn]
    for run in knn.extra_runs:
        neighbours = open_extra(run, own)
        if max(knn.tried_ks) > neighbours.k:
            raise DistlmError(
                f"knn.ks={knn.tried_ks}: {neighbours.folder} holds {neighbours.k} neighbours; search with more"
            )
        its = best_of(grid_losses(neighbours, knn), knn.lambdas, knn.temperatures, knn.tried_ks)
        stores.append(_entry(run, neighbours, its.temperature, its.k))
        scores.append(split_knn_log_probs(neighbours, its.temperature, [its.k])[0])
    lambdas = fit_lambdas(log_lm, scores)
    found = figures(mix_stores(log_lm, scores, lambdas))
    return TunedStores(lambdas.tolist(), stores, found.loss_nats, found.perplexity)


def stores_mixture(own: Neighbours, tuned: Stores, log_lm: Floats, log_knn: Floats, first: bool) -> Floats:
    """Log-probability of each token of a split under the mixture: fp64 [Q]; `first` on the split that it was tuned on.

    Raises DistlmError as open_extra, or when that split's neighbours are others now.
    """
    scores = [log_knn]
    for store in tuned.stores[1:]:
        neighbours = open_extra(store.run, own)
        now = _entry(store.run, neighbours, store.temperature, store.k)
        key = "neighbours" if first else "datastore"
        if getattr(store, key) != getattr(now, key):
            raise DistlmError(
                f"knn.extra_runs: {neighbours.folder}: {key} {getattr(now, key)}, tuned with {getattr(store, key)}; "
                "run `distlm knn tune` again"
            )
        scores.append(split_knn_log_probs(neighbours, store.temperature, [store.k])[0])
    return mix_stores(log_lm, scores, np.array(tuned.lambdas))


def open_extra(run: str, own: Neighbours) -> Neighbours:
    """The neighbours of the same split in another run directory.

    Raises DistlmError when there are none, or when they are of other tokens or another model.
    """
    neighbours = Neighbours.open(RunDir(Path(run)).kept_neighbours(own.manifest.split))
    for key in ("model", "dictionary", "tokens", "context_rule"):
        theirs, ours = getattr(neighbours.manifest, key), getattr(own.manifest, key)
        if theirs != ours:
            raise DistlmError(
                f"knn.extra_runs: {neighbours.folder}: {key} {theirs}, {own.folder} has {ours}: search there with the "
                "same model and settings, on the same tokens"
            )
    if not np.array_equal(neighbours.targets(), own.targets()):
        raise DistlmError(f"knn.extra_runs: {neighbours.folder}: not the tokens of {own.folder}")
    return neighbours


def written_extra(runs: Sequence[str], own: Neighbours) -> list[tuple[Path, list[Written]]]:
    """Folders of the neighbours in other runs, and their arrays as they were written. Raises DistlmError as
    open_extra."""
    return [(found.folder, found.written()) for found in (open_extra(run, own) for run in runs)]


def mix_stores(log_lm: Floats, scores: Sequence[Floats], lambdas: Floats) -> Floats:
    """log((1 − Σ λ_i) p_LM + Σ λ_i p_i): fp64 [Q]; `scores` log p_i fp64 [Q] of each store, `lambdas` [S] ≥ 0."""
    with np.errstate(divide="ignore"):
        parts = [np.log1p(-lambdas.sum()) + log_lm, *(np.log(w) + s for w, s in zip(lambdas, scores, strict=True))]
    return np.asarray(np.logaddexp.reduce(parts))


def fit_lambdas(log_lm: Floats, scores: Sequence[Floats]) -> Floats:
    """λ of each store, fp64 [S], by expectation maximisation from equal shares; never all of the weight together."""
    parts = np.stack([log_lm, *scores])
    # Relative to each token's best part: nothing underflows.
    p = np.exp(parts - parts.max(axis=0))
    weights, before = np.full(len(parts), 1 / len(parts)), -np.inf
    for _ in range(ITERATIONS):
        total = weights @ p
        now = float(np.log(total).mean())
        if now - before < GAIN:
            break
        weights, before = weights * (p / total).mean(axis=1), now
    return weights[1:] / weights.sum()


def _entry(run: str, neighbours: Neighbours, temperature: float, k: int) -> Store:
    return Store(run, neighbours.fingerprint, neighbours.manifest.datastore, temperature, k)
