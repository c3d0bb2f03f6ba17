"""λ, temperature and k: chosen on the first split of knn.splits from its files, then frozen in knn.json.

knn.json: {lambda, temperature, k, loss_nats, perplexity, lm_loss_nats, lm_perplexity, split, tokens, grid: {lambdas,
temperatures, ks, loss_nats [ks][temperatures][lambdas], buckets}, edges (settings that stand at the end of their grid),
neighbours, datastore, index, model (fingerprints)}. Losses are nats per token, and perplexities per token too: that is
per word, unless tokens are sub-words.
Also buckets, gate and halves_of (adaptive.py) and stores (stores.py). With a neural cache there are also cache, both
(tune_cache.py) and both_buckets; without neighbours only split, tokens, lm_loss_nats, lm_perplexity, model and cache.
"""

import math
import time
from typing import Any

from distlm.config.schema import KnnConfig
from distlm.data.dictionary import Dictionary
from distlm.data.tokens import DICTIONARY
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.parts import open_parts
from distlm.knnlm.scoring import interpolate, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.adaptive import SplitFacts, tune_adaptive, tune_both_buckets
from distlm.knnlm.tune.caches import tune_both, tune_cache
from distlm.knnlm.tune.grid import Best, best_of, grid_losses, split_knn_log_probs
from distlm.knnlm.tune.stores import tune_stores
from distlm.runtime.files import write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.stage import Stage


def run_tune(stage: Stage) -> dict[str, Any]:
    """Choose λ, temperature and k on the first split of knn.splits, and λ, θ and window of a neural cache where there
    is one, and write knn.json; no other split is opened.

    Returns lambda, temperature, k, perplexity and lm_perplexity, and cache_* and both_* of a cache. Rank 0 works alone.
    Raises DistlmError when the split was neither searched nor given a cache, or was searched with fewer neighbours
    than knn.ks asks for.
    """
    return rank0_first(stage.comm, lambda: _tune(stage))


def _tune(stage: Stage) -> dict[str, Any]:
    start = time.monotonic()
    config, knn = stage.config, stage.config.knn
    parts = open_parts(stage.run, knn.splits[0])
    neighbours, cache = parts.neighbours, parts.cache
    if config.cache.use and cache is None:
        raise DistlmError(
            f"cache.use=true, and {stage.run.cache(parts.split)} is not there; run `distlm knn cache`, or leave the "
            "cache out with cache.use=false"
        )
    log_lm, log_knn, facts = parts.log_lm(), None, None
    lm_loss = mean_loss(log_lm)
    tuned: dict[str, Any] = {}
    steps = (len(neighbours.manifest["units"]) if neighbours else 0) + (len(cache.windows) if cache else 0)
    with Progress("knn tune", steps, "units and windows" if cache else "units") as progress:
        if neighbours is not None:
            tuned |= _tune_knn(neighbours, knn, progress)
            log_knn = split_knn_log_probs(neighbours, tuned["temperature"], [tuned["k"]])[0]
            # The grid is in fp32: what is frozen has the loss that an evaluation will find.
            loss = mean_loss(interpolate(log_lm, log_knn, tuned["lambda"]))
            tuned |= {"loss_nats": loss, "perplexity": math.exp(loss)}
            facts = SplitFacts.read(neighbours, _dictionary(stage, neighbours))
            tuned |= tune_adaptive(facts, knn, log_lm, log_knn, tuned["lambda"])
            if knn.extra_runs:
                tuned["stores"] = tune_stores(neighbours, tuned, knn, log_lm, log_knn)
        tuned |= {
            "lm_loss_nats": lm_loss, "lm_perplexity": math.exp(lm_loss), "split": parts.split, "tokens": parts.tokens,
            "model": parts.source["model"],
        }  # fmt: skip
        if cache is not None:
            tuned["cache"] = tune_cache(log_lm, cache, config.cache, progress.advance)
    if neighbours is not None and cache is not None:
        assert log_knn is not None
        log_cache = cache.log_probs(tuned["cache"]["window"], tuned["cache"]["theta"])
        tuned["both"] = tune_both(log_lm, log_knn, log_cache, knn.lambdas, config.cache.lambdas)
        if knn.buckets:
            assert facts is not None
            tuned["both_buckets"] = tune_both_buckets(
                facts, knn.buckets, log_lm, log_knn, log_cache, tuned["both"], config.cache.lambdas
            )
    for part in (tuned, tuned.get("cache", {}), tuned.get("both", {})):
        for warning in part.get("edges", []):
            say(f"knn tune: warning: {warning}")
    write_json(stage.run.tuned, tuned)
    seconds = time.monotonic() - start
    stage.run.metrics.write("knn tune", {STAGE_SECONDS: round(seconds, 3)})
    return {"seconds": seconds, **_summary(tuned)}


def _dictionary(stage: Stage, neighbours: Neighbours) -> Dictionary:
    """The dictionary alone: no token file of another split is opened."""
    path = stage.run.tokens(stage.config) / DICTIONARY
    dictionary = Dictionary.load(path)
    neighbours.require({"dictionary": dictionary.hash}, str(path))
    return dictionary


def _tune_knn(neighbours: Neighbours, knn: KnnConfig, progress: Progress) -> dict[str, Any]:
    if max(knn.ks) > neighbours.k:
        raise DistlmError(f"knn.ks={knn.ks}: {neighbours.folder} holds {neighbours.k} neighbours; search with more")
    losses = grid_losses(neighbours, knn, progress.advance)
    best = best_of(losses, knn.lambdas, knn.temperatures, knn.ks)
    return {
        "lambda": best.weight, "temperature": best.temperature, "k": best.k,
        "grid": {
            "lambdas": knn.lambdas, "temperatures": knn.temperatures, "ks": knn.ks, "loss_nats": losses.tolist(),
            "buckets": knn.buckets,
        },
        "edges": edge_warnings(best, knn, neighbours.k), "neighbours": neighbours.fingerprint,
        **{name: neighbours.manifest[name] for name in ("datastore", "index")},
    }  # fmt: skip


def _summary(tuned: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {name: tuned[name] for name in ("lambda", "temperature", "k", "perplexity") if name in tuned}
    own["lm_perplexity"] = tuned["lm_perplexity"]
    own |= {
        f"{name}_perplexity": tuned[name]["perplexity"]
        for name in ("buckets", "gate", "both_buckets", "stores")
        if name in tuned
    }
    if "cache" in tuned:
        own |= {f"cache_{name}": tuned["cache"][name] for name in ("lambda", "theta", "window", "perplexity")}
    if "both" in tuned:
        own |= {f"both_{name}": tuned["both"][name] for name in ("knn_lambda", "cache_lambda", "perplexity")}
    return own


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
