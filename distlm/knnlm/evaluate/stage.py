"""Perplexities of every split with the frozen settings, and everything needed to read them: results.json.

Perplexity is per word: exp of −Σ log p / words over every token of the split, </s> and <unk> included, fp64 sums in
token order. A word is a token, unless the tokens are sub-words; then words are those of the text and line ends, and
token_perplexity stands beside perplexity. Schema of results.json (losses in nats per token, sizes in bytes):

  format          1
  name            of the run
  model           {parameters, fingerprint, step, checkpoint}
  dictionary      {hash, words}
  tokens          fingerprint of the token files
  context_rule    in words; which context each evaluated token sees
  settings        {lambda, temperature, k, nprobe, distances: exact|quantised, search: index|brute, similarity: l2|dot,
                  cache: {lambda, theta, window, fill, tap}, both: {knn_lambda, cache_lambda},
                  adaptive: {buckets, gate, halves_of: documents|blocks}, stores (as in knn.json)}
  tuned_on        the split the settings were chosen on; every other split is evaluated with them as they are
  splits          NAME → {tokens, words (of sub-words), blocks, lm: {loss_nats, perplexity}, knn: {loss_nats,
                  perplexity}, neighbours, retrieved: share of tokens whose target is among the neighbours,
                  shuffled: {lambda, loss_nats, ceiling_nats, alarm},
                  cache: {loss_nats, perplexity}, cached: share of tokens that have a cache, cache_files,
                  both: {loss_nats, perplexity}, knn_buckets, gate, both_buckets, stores: the same; on
                  the tuned split cross-fitted (adaptive.py), gate_curve: {wanted, skipped, loss_nats, perplexity}
                  over shares of skipped searches, bootstrap: intervals and differences (bootstrap.py)}
  datastore       {rows, width, bytes, dtype, tap, fingerprint}
  index           {factory, nlist, bytes, fingerprint}, or null for a brute-force search
  exactness       in words; what the distances are
  ladder          exact, rescored and quantised distances on a sample (ladder.py); null for a brute-force search
  self_test       {run, keys, k, nprobe, expected, found, first, checked}: stored keys that find their own row, and the
                  evaluated tokens whose kept neighbours were checked (selftest.py); run is false without the test
  seconds         stage → seconds over all its starts, from metrics.jsonl, and this evaluation
  hashes          fingerprints of all of the above by name
  code            versions

What belongs to the cache is there when `distlm knn cache` was run. Without neighbours (LM and cache only) there are no
knn, knn_buckets, gate, neighbours, retrieved and shuffled, and datastore, index, exactness, ladder and self_test are
null.
The loss of every token is in RUN/losses (losses.py).
"""

import math
import time
from typing import Any

import numpy as np
from msgspec import to_builtins

from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import open_index
from distlm.knnlm.evaluate.belonging import check_tuned, open_rest
from distlm.knnlm.evaluate.bootstrap import bootstrap
from distlm.knnlm.evaluate.documents import group_tokens
from distlm.knnlm.evaluate.ladder import exactness_ladder, ladder_key
from distlm.knnlm.evaluate.losses import write_losses
from distlm.knnlm.evaluate.parts import (
    NAMES,
    Frozen,
    FrozenCache,
    Parts,
    mixtures,
    open_parts,
    read_frozen,
    read_frozen_cache,
    share_cached,
)
from distlm.knnlm.evaluate.seconds import stage_seconds
from distlm.knnlm.evaluate.shuffled import shuffled_check
from distlm.knnlm.scoring import Floats, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.selftest import check_kept
from distlm.knnlm.tune.adaptive import Fitted, SplitFacts, adaptive_mixtures
from distlm.knnlm.tune.grid import split_knn_log_probs
from distlm.knnlm.tune.stores import stores_mixture
from distlm.models.card import read_model_card
from distlm.models.io import card_parameters
from distlm.runtime.files import json_hash, read_json, write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage

FORMAT = 1


def run_evaluate(stage: Stage) -> dict[str, Any]:
    """Evaluate every split of knn.splits with the settings frozen in knn.json and write results.json.

    Returns the perplexities SPLIT/lm, and SPLIT/cache, SPLIT/knn and SPLIT/both as far as there are. Rank 0 works
    alone. Raises DistlmError when nothing was tuned, when knn.json was tuned on other files, when a split's neighbours
    or cache are of another store, index or model, or when the self-test of the neighbours fails.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage))


def _evaluate(stage: Stage) -> dict[str, Any]:
    start = time.monotonic()
    run, knn = stage.run, stage.config.knn
    if not run.tuned.exists():
        raise DistlmError(f"{run.tuned}: nothing is tuned yet; run `distlm knn tune` first")
    tuned = read_json(run.tuned, "frozen kNN settings")
    if tuned["split"] != knn.splits[0]:
        raise DistlmError(
            f"{run.tuned}: tuned on {tuned['split']!r}, knn.splits={knn.splits} names {knn.splits[0]!r} first; "
            "run `distlm knn tune` again"
        )
    frozen = read_frozen(tuned)
    frozen_cache, fitted = read_frozen_cache(tuned), Fitted.from_json(tuned)
    opened = {split: open_parts(run, split) for split in knn.splits}
    tokens = TokenFiles.open(run.tokens(stage.config))
    check_tuned(run.tuned, opened, frozen, frozen_cache)
    store, index = open_rest(stage, tokens, opened)
    kept = [parts.neighbours for parts in opened.values() if parts.neighbours]
    checked = sum(check_kept(neighbours, store) for neighbours in kept) if store and knn.self_test else 0
    checkpoint = run.model_checkpoint(stage.config)
    card = read_model_card(checkpoint)
    first = opened[knn.splits[0]].source
    splits = {}
    for split, parts in opened.items():
        words = tokens.words(split) if tokens.tokenizer else 0
        facts = SplitFacts.read(parts.neighbours, tokens.dictionary) if parts.neighbours else None
        stores = tuned.get("stores")
        log_probs, splits[split] = evaluate_parts(parts, frozen, frozen_cache, fitted, facts, stores, words)
        groups = group_tokens(tokens.split(split), tokens.dictionary, parts.source)
        splits[split]["bootstrap"] = bootstrap(log_probs, groups, parts.tokens / words if words else 1.0)
        about = {key: first[key] for key in ("context_rule", "model", "token_files")}
        write_losses(run.losses, split, tokens.split(split), log_probs, tokens.dictionary, about)
    ladder = _ladder(stage, store, opened[knn.splits[-1]].neighbours, frozen)
    settings: dict[str, Any] = {}
    if frozen is not None:
        settings |= {"lambda": frozen.weight, "temperature": frozen.temperature, "k": frozen.k}
        settings |= {name: first[name] for name in ("nprobe", "distances", "search")}
        settings["similarity"] = first.get("similarity", "l2")
    if frozen_cache is not None:
        settings["cache"] = {name: tuned["cache"][name] for name in ("lambda", "theta", "window", "fill", "tap")}
    if "both" in tuned:
        settings["both"] = {name: tuned["both"][name] for name in ("knn_lambda", "cache_lambda")}
    if "stores" in tuned:
        settings["stores"] = {name: tuned["stores"][name] for name in ("lambdas", "stores")}
    if "halves_of" in tuned:
        parts_of = {"buckets": tuned["grid"]["buckets"], "gate": "gate" in tuned, "halves_of": tuned["halves_of"]}
        settings["adaptive"] = parts_of
    results = {
        "format": FORMAT,
        "name": stage.config.name,
        "model": {
            "parameters": card_parameters(card),
            "fingerprint": first["model"], "step": card.step, "checkpoint": str(checkpoint),
        },
        "dictionary": {"hash": tokens.dictionary.hash, "words": len(tokens.dictionary)},
        "tokens": tokens.fingerprint,
        "context_rule": first["context_rule"],
        "settings": settings,
        "tuned_on": tuned["split"],
        "splits": splits,
        "datastore": None if store is None else {
            "rows": store.rows, "width": store.width, "bytes": store.bytes, "dtype": store.key_dtype.name,
            "tap": store.tap, "fingerprint": store.fingerprint,
        },
        "index": index,
        "exactness": None if store is None else exactness(first),
        "ladder": ladder,
        "self_test": None if store is None else first["self_test"] | {"checked": checked},
        "seconds": {},
        "hashes": {
            "model": first["model"], "dictionary": tokens.dictionary.hash, "tokens": tokens.fingerprint,
            **({} if store is None else {"datastore": store.fingerprint, "index": first["index"]}),
            "settings": json_hash(tuned),
            **{f"neighbours/{split}": parts.neighbours.fingerprint for split, parts in opened.items()
               if parts.neighbours},
            **{f"cache/{split}": parts.cache.fingerprint for split, parts in opened.items() if parts.cache},
        },
        "code": to_builtins(code_version()),
    }  # fmt: skip
    for split, result in splits.items():
        if "shuffled" in result and result["shuffled"]["alarm"]:
            say(
                f"knn evaluate: ALARM: on {split} the neighbours' values are no better than permuted ones; rows of "
                "values and keys may be misaligned: run `distlm datastore verify` and look at the self-test"
            )
    seconds = time.monotonic() - start
    run.metrics.write("knn evaluate", {STAGE_SECONDS: round(seconds, 3)})
    results["seconds"] = stage_seconds(run.metrics.path)
    write_json(run.results, results)
    summary: dict[str, Any] = {"seconds": seconds}
    for split, result in splits.items():
        summary |= {f"{split}/{name}": result[name]["perplexity"] for name in NAMES if name in result}
    return summary


def _ladder(
    stage: Stage, store: Datastore | None, neighbours: Neighbours | None, frozen: Frozen | None
) -> dict[str, Any] | None:
    """The exactness ladder, from the last evaluation where nothing has changed; None without an index or a sample."""
    run, sample = stage.run, stage.config.knn.ladder_sample
    knn = stage.config.knn
    if store is None or neighbours is None or frozen is None or knn.search != "index" or sample == 0:
        return None
    if knn.similarity == "dot":
        # Its rungs are distances.
        return None
    if run.results.exists():
        before: dict[str, Any] | None = read_json(run.results, "evaluation results").get("ladder")
        if before is not None and before["key"] == ladder_key(neighbours, frozen, sample):
            return before
    # This stage is given no GPU, and a sample needs none.
    scan = "queries" if knn.scan == "gpu" else knn.scan
    return exactness_ladder(store, open_index(run.index, store, scan), neighbours, frozen, sample)


def evaluate_parts(
    parts: Parts,
    frozen: Frozen | None,
    frozen_cache: FrozenCache | None,
    fitted: Fitted | None = None,
    facts: SplitFacts | None = None,
    stores: dict[str, Any] | None = None,
    words: int = 0,
) -> tuple[dict[str, Floats], dict[str, Any]]:
    """Log-probability of every token under each mixture (fp64 [Q]), and one split's entry of results.json.

    `words` of the text, where tokens are sub-words; 0: its tokens.
    """
    log_lm, log_knn, weight = parts.log_lm(), None, 0.0
    result: dict[str, Any] = {"tokens": parts.tokens, "blocks": parts.source["blocks"]}
    if words:
        result["words"] = words
    if parts.neighbours is not None and frozen is not None:
        weight = frozen.weight
        log_knn = split_knn_log_probs(parts.neighbours, frozen.temperature, [frozen.k])[0]
    log_probs = mixtures(log_lm, log_knn, weight, parts.cache, frozen_cache)
    if fitted is not None and facts is not None and log_knn is not None:
        log_cache = None
        if parts.cache is not None and frozen_cache is not None:
            log_cache = parts.cache.log_probs(frozen_cache.window, frozen_cache.theta)
        adaptive, more = adaptive_mixtures(facts, fitted, log_lm, log_knn, log_cache)
        log_probs |= adaptive
        if stores is not None:
            own = facts.neighbours
            log_probs["stores"] = stores_mixture(own, stores, log_lm, log_knn, own.manifest["split"] == fitted.split)
        result |= more
    log_probs = {name: log_probs[name] for name in NAMES if name in log_probs}
    result |= {name: _figures(mean_loss(scores), parts.tokens, words) for name, scores in log_probs.items()}
    if parts.neighbours is not None and frozen is not None and log_knn is not None:
        result |= {
            "retrieved": float(np.mean(np.isfinite(log_knn))),
            "shuffled": shuffled_check(parts.neighbours, frozen, log_lm, log_knn),
            "neighbours": parts.neighbours.fingerprint,
        }
    if parts.cache is not None and frozen_cache is not None:
        result |= {"cached": share_cached(parts.cache, frozen_cache), "cache_files": parts.cache.fingerprint}
    return log_probs, result


def evaluate_split(neighbours: Neighbours, frozen: Frozen) -> dict[str, Any]:
    """One split's entry of results.json, from its neighbours alone."""
    return evaluate_parts(Parts(str(neighbours.manifest["split"]), neighbours, None, None), frozen, None)[1]


def exactness(manifest: dict[str, Any]) -> str:
    """What the distances are, in words."""
    if manifest.get("similarity") == "dot":
        found = "every stored key was compared" if manifest["search"] == "brute" else "found by the index (approximate)"
        return f"neighbours by squared L2, {found}; weighed by the dot product with the true keys (exact)"
    if manifest["search"] == "brute":
        return "exact: every stored key was compared, squared L2 over the true keys"
    if manifest["distances"] == "exact":
        return "neighbours found by the index (approximate), their squared L2 recomputed over the true keys (exact)"
    return "neighbours and distances as the index gives them (approximate): squared L2 to the encoded keys"


def _figures(loss: float, tokens: int, words: int) -> dict[str, float]:
    if not words:
        return {"loss_nats": loss, "perplexity": math.exp(loss)}
    # A model that cannot predict a text at all may need hundreds of nats for a word.
    per_word = math.exp(min(loss * tokens / words, 700.0))
    return {"loss_nats": loss, "perplexity": per_word, "token_perplexity": math.exp(loss)}
