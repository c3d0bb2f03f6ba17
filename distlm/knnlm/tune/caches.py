"""λ, θ and window of the neural cache, and the two λ of cache and neighbours together; from files, in seconds.

θ and window are those that are best for the LM with the cache alone; temperature and k those that are best for the
kNN-LM; only the two λ are chosen anew for both together.
"""

from collections.abc import Callable, Sequence

import numpy as np

from distlm.config.schema import CacheConfig
from distlm.knnlm.cache.files import Cache
from distlm.knnlm.cache.scores import add_cache
from distlm.knnlm.scoring import Floats, interpolate, mean_loss
from distlm.knnlm.tune.records import BothGrid, CacheGrid, TunedBoth, TunedCache
from distlm.models.perplexity import perplexity


def tune_cache(log_lm: Floats, cache: Cache, config: CacheConfig, tick: Callable[[], None]) -> TunedCache:
    """The best settings of the cache; where losses are equal, the smallest λ, then window, then θ. `tick` is called
    per window."""
    losses = np.empty((len(cache.windows), len(cache.thetas), len(config.lambdas)))
    grid = cache.grid()
    for row, scores in enumerate(grid):
        for column, log_cache in enumerate(scores.astype(np.float64)):
            losses[row, column] = [mean_loss(add_cache(log_lm, log_cache, weight)) for weight in config.lambdas]
        tick()
    loss, weight, window, theta = min(
        (float(losses[a, b, c]), weight, window, theta)
        for a, window in enumerate(cache.windows)
        for b, theta in enumerate(cache.thetas)
        for c, weight in enumerate(config.lambdas)
    )
    return TunedCache(
        weight=weight, theta=theta, window=window, fill=cache.manifest.fill, tap=cache.manifest.tap, loss_nats=loss,
        perplexity=perplexity(loss), grid=CacheGrid(config.lambdas, cache.thetas, cache.windows, losses.tolist()),
        edges=_edges(weight, theta, window, cache, config.lambdas), cache=cache.fingerprint,
    )  # fmt: skip


def tune_both(
    log_lm: Floats, log_knn: Floats, log_cache: Floats, knn_lambdas: list[float], cache_lambdas: list[float]
) -> TunedBoth:
    """The two best λ; where losses are equal, the smallest λ of the neighbours, then of the cache."""
    losses = np.empty((len(knn_lambdas), len(cache_lambdas)))
    for row, of_knn in enumerate(knn_lambdas):
        mixed = interpolate(log_lm, log_knn, of_knn)
        losses[row] = [mean_loss(add_cache(mixed, log_cache, of_cache)) for of_cache in cache_lambdas]
    loss, of_knn, of_cache = min(
        (float(losses[a, b]), of_knn, of_cache)
        for a, of_knn in enumerate(knn_lambdas)
        for b, of_cache in enumerate(cache_lambdas)
    )
    edges = []
    if len(knn_lambdas) > 1 and of_knn == max(knn_lambdas):
        edges.append(f"together with the cache the best λ={of_knn} is the largest of knn.lambdas; add larger ones")
    if len(cache_lambdas) > 1 and of_cache == max(cache_lambdas):
        edges.append(f"together with kNN the best λ={of_cache} is the largest of cache.lambdas; add larger ones")
    return TunedBoth(
        knn_lambda=of_knn, cache_lambda=of_cache, loss_nats=loss, perplexity=perplexity(loss),
        grid=BothGrid(knn_lambdas, cache_lambdas, losses.tolist()), edges=edges,
    )  # fmt: skip


def _edges(weight: float, theta: float, window: int, cache: Cache, lambdas: Sequence[float]) -> list[str]:
    """Settings whose best value is the last of its grid, so that a wider grid may hold a better one."""
    if weight == 0:
        return ["the best λ of the cache is 0: it does not help on this split"]
    warnings = []
    if len(lambdas) > 1 and weight == max(lambdas):
        warnings.append(f"the best λ={weight} is the largest of cache.lambdas; add larger ones")
    if len(cache.thetas) > 1 and theta in (min(cache.thetas), max(cache.thetas)):
        end = "smallest" if theta == min(cache.thetas) else "largest"
        warnings.append(f"the best θ={theta} is the {end} of cache.thetas; add {end[:-3]}er ones")
    if len(cache.windows) > 1 and window == max(cache.windows):
        warnings.append(f"the best window={window} is the largest of cache.windows; add larger ones")
    return warnings
