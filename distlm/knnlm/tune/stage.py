"""λ, temperature and k: chosen on the first split of knn.splits from its files, then frozen in knn.json."""

import time

from distlm.config.schema import KnnConfig
from distlm.data.dictionary import Dictionary
from distlm.data.records import TokensMeta
from distlm.data.tokens import DICTIONARY, META
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.parts import open_parts
from distlm.knnlm.scoring import interpolate, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.adaptive import SplitFacts, has_distances, tune_adaptive, tune_both_buckets
from distlm.knnlm.tune.caches import tune_both, tune_cache
from distlm.knnlm.tune.grid import Best, best_of, grid_losses, split_knn_log_probs
from distlm.knnlm.tune.records import Grid, Tuned
from distlm.knnlm.tune.stores import tune_stores, written_extra
from distlm.models.perplexity import perplexity
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.stage import Stage


def run_tune(stage: Stage) -> dict[str, float]:
    """Choose λ, temperature and k on the first split of knn.splits, and λ, θ and window of a neural cache where there
    is one, and write tuned/LABEL.json and knn.json; no other split is opened.

    Returns lambda, temperature, k, perplexity_per_word and lm_perplexity_per_word, the same of other mixtures, as in
    cache_perplexity_per_word, and …_per_token beside them where tokens are sub-words. Rank 0 works alone.
    Raises DistlmError when the split was neither searched nor given a cache, or was searched with fewer neighbours
    than knn.k asks for.
    """
    return rank0_first(stage.comm, lambda: _tune(stage))


def _tune(stage: Stage) -> dict[str, float]:
    start = time.monotonic()
    config, knn = stage.config, stage.config.knn
    parts = open_parts(stage.run, knn.splits[0], knn)
    neighbours, cache = parts.neighbours, parts.cache
    others = written_extra(knn.extra_runs, neighbours) if neighbours is not None else []
    for root, files in [*parts.written(), *others]:
        stage.require_whole(root, files, alone=True)
    if config.cache.use and cache is None:
        raise DistlmError(
            f"cache.use=true, and {stage.run.cache(parts.split)} is not there; run `distlm knn cache`, or leave the "
            "cache out with cache.use=false"
        )
    log_lm, log_knn, facts = parts.log_lm(), None, None
    lm_loss = mean_loss(log_lm)
    tuned = Tuned(
        lm_loss_nats=lm_loss, lm_perplexity=perplexity(lm_loss), split=parts.split, tokens=parts.tokens,
        model=parts.source.model,
    )  # fmt: skip
    steps = (len(neighbours.manifest.units) if neighbours else 0) + (len(cache.windows) if cache else 0)
    with Progress("knn tune", steps, "units and windows" if cache else "units") as progress:
        if neighbours is not None:
            best = _tune_knn(tuned, neighbours, knn, progress)
            log_knn = split_knn_log_probs(neighbours, best.temperature, [best.k])[0]
            # The grid is in fp32: what is frozen has the loss that an evaluation will find.
            tuned.loss_nats = mean_loss(interpolate(log_lm, log_knn, best.weight))
            tuned.perplexity = perplexity(tuned.loss_nats)
            facts = SplitFacts.read(neighbours, _dictionary(stage, neighbours))
            tune_adaptive(tuned, facts, knn, log_lm, log_knn, best.weight)
            if knn.extra_runs:
                tuned.stores = tune_stores(neighbours, best, knn, log_lm, log_knn)
        if cache is not None:
            tuned.cache = tune_cache(log_lm, cache, config.cache, progress.advance)
    if log_knn is not None and facts is not None and cache is not None and tuned.cache:
        log_cache = cache.log_probs(tuned.cache.window, tuned.cache.theta)
        tuned.both = tune_both(log_lm, log_knn, log_cache, knn.lambdas, config.cache.lambdas)
        if knn.buckets and has_distances(facts.neighbours):
            tuned.both_buckets = tune_both_buckets(
                facts, knn.buckets, log_lm, log_knn, log_cache, tuned.both, config.cache.lambdas
            )
    for part in (tuned, tuned.cache, tuned.both):
        for warning in (part and part.edges) or ():
            say(f"knn tune: warning: {warning}")
    stage.run.write_tuned(tuned)
    seconds = time.monotonic() - start
    stage.run.metrics.write("knn tune", {STAGE_SECONDS: round(seconds, 3)})
    return {"seconds": seconds, **_summary(tuned, _tokens_per_word(stage, parts.split))}


def _dictionary(stage: Stage, neighbours: Neighbours) -> Dictionary:
    """The dictionary alone: no token file of another split is opened."""
    path = stage.run.tokens(stage.config) / DICTIONARY
    dictionary = Dictionary.load(path)
    neighbours.require(str(path), dictionary=dictionary.hash)
    return dictionary


def _tune_knn(tuned: Tuned, neighbours: Neighbours, knn: KnnConfig, progress: Progress) -> Best:
    if left_out := [k for k in knn.ks if k > knn.k]:
        say(f"knn tune: knn.ks={left_out} is above knn.k={knn.k} and left out")
    losses = grid_losses(neighbours, knn, progress.advance)
    best = best_of(losses, knn.lambdas, knn.temperatures, knn.tried_ks)
    tuned.weight, tuned.temperature, tuned.k = best.weight, best.temperature, best.k
    tuned.grid = Grid(knn.lambdas, knn.temperatures, knn.tried_ks, losses.tolist(), knn.buckets)
    tuned.edges = edge_warnings(best, knn, neighbours.k)
    tuned.neighbours = neighbours.fingerprint
    tuned.datastore, tuned.index = neighbours.manifest.datastore, neighbours.manifest.index
    return best


def _summary(tuned: Tuned, tokens_per_word: float) -> dict[str, float]:
    """The settings and perplexities; those per token beside those per word where they differ."""
    tree = tuned.tree()
    parts = {"": tree, "lm_": {"loss_nats": tuned.lm_loss_nats}}
    parts |= {
        f"{name}_": tree[name]
        for name in ("buckets", "gate", "both_buckets", "stores", "cache", "both")
        if name in tree
    }
    found: dict[str, float] = {}
    for prefix, part in parts.items():
        settings = ("lambda", "temperature", "k", "theta", "window", "knn_lambda", "cache_lambda")
        found |= {prefix + name: part[name] for name in settings if isinstance(part.get(name), int | float)}
        if "loss_nats" in part:
            found[f"{prefix}perplexity_per_word"] = perplexity(part["loss_nats"] * tokens_per_word)
            if tokens_per_word != 1:
                found[f"{prefix}perplexity_per_token"] = perplexity(part["loss_nats"])
    return found


def _tokens_per_word(stage: Stage, split: str) -> float:
    """Of the split, from the description of the token files alone; 1 unless tokens are sub-words."""
    path = stage.run.tokens(stage.config) / META
    facts = TokensMeta.read(path).splits[split] if path.is_file() else None
    return facts.tokens / facts.words if facts and facts.words else 1.0


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
    if len(knn.tried_ks) > 1 and best.k == max(knn.tried_ks):
        more = "search with a larger knn.k" if best.k == searched else "add larger ones"
        warnings.append(f"the best k={best.k} is the largest of knn.ks; {more} if there is room")
    return warnings
