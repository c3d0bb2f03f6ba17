"""Perplexities of every split with the frozen settings, and everything needed to read them: results.json.

Perplexity is per word: exp of −Σ log p / words over every token of the split, </s> and <unk> included, fp64 sums in
token order. A word is a token, unless the tokens are sub-words; then words are those of the text and line ends, and
token_perplexity stands beside perplexity.
What results.json holds is said in records.py; the loss of every token is in RUN/losses (losses.py).
"""

import time
from pathlib import Path

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import open_index
from distlm.index.state import written_index
from distlm.knnlm.evaluate.belonging import check_tuned, open_rest
from distlm.knnlm.evaluate.bootstrap import bootstrap
from distlm.knnlm.evaluate.documents import group_tokens
from distlm.knnlm.evaluate.ladder import exactness_ladder, ladder_key
from distlm.knnlm.evaluate.losses import write_losses
from distlm.knnlm.evaluate.parts import (
    Frozen,
    FrozenCache,
    Parts,
    mixtures,
    open_parts,
    read_frozen,
    read_frozen_cache,
    share_cached,
)
from distlm.knnlm.evaluate.records import (
    NAMES,
    AdaptiveSettings,
    DictionaryFacts,
    Ladder,
    ModelFacts,
    Results,
    Settings,
    SplitResults,
    StoreFacts,
)
from distlm.knnlm.evaluate.seconds import stage_seconds
from distlm.knnlm.evaluate.shuffled import shuffled_check
from distlm.knnlm.scoring import Floats, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.records import NeighboursManifest
from distlm.knnlm.search.selftest import check_kept
from distlm.knnlm.tune.adaptive import Fitted, SplitFacts, adaptive_mixtures
from distlm.knnlm.tune.grid import split_knn_log_probs
from distlm.knnlm.tune.records import BothSettings, CacheSettings, Figures, Stores, Tuned
from distlm.knnlm.tune.stores import stores_mixture, written_extra
from distlm.models.card import read_model_card
from distlm.models.io import card_parameters
from distlm.models.perplexity import perplexity
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage


def run_evaluate(stage: Stage) -> dict[str, float]:
    """Evaluate every split of knn.splits with the settings frozen in knn.json and write results/LABEL.json and
    results.json.

    Returns SPLIT/lm/perplexity_per_word, and the same of cache, knn, both, … as far as there are. Rank 0 works alone.
    Raises DistlmError when nothing was tuned, when knn.json was tuned on other files, when a split's neighbours
    or cache are of another store, index or model, or when the self-test of the neighbours fails.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage))


def _evaluate(stage: Stage) -> dict[str, float]:
    start = time.monotonic()
    run, knn = stage.run, stage.config.knn
    if not run.tuned.exists():
        raise DistlmError(f"{run.tuned}: nothing is tuned yet; run `distlm knn tune` first")
    tuned = Tuned.read(run.tuned)
    if tuned.split != knn.splits[0]:
        raise DistlmError(
            f"{run.tuned}: tuned on {tuned.split!r}, knn.splits={knn.splits} names {knn.splits[0]!r} first; "
            "run `distlm knn tune` again"
        )
    frozen, frozen_cache, fitted = read_frozen(tuned), read_frozen_cache(tuned), Fitted.of(tuned)
    opened = {split: open_parts(run, split, knn) for split in knn.splits}
    tokens = TokenFiles.open(run.tokens(stage.config))
    kept = [parts.neighbours for parts in opened.values() if parts.neighbours]
    extra = [store.run for store in tuned.stores.stores[1:]] if tuned.stores else []
    read = [
        (tokens.folder, tokens.written(*knn.splits)),
        *(found for parts in opened.values() for found in parts.written()),
        *(found for neighbours in kept for found in written_extra(extra, neighbours)),
    ]
    for root, files in read:
        stage.require_whole(root, files, alone=True)
    check_tuned(run.tuned, opened, frozen, frozen_cache)
    store, index = open_rest(stage, tokens, opened)
    if store and knn.self_test:
        stage.require_whole(store.folder, store.written(keys=False), alone=True)
    checked = sum(check_kept(neighbours, store) for neighbours in kept) if store and knn.self_test else 0
    ladder = _ladder(stage, store, opened[knn.splits[-1]].neighbours, frozen)
    checkpoint = run.model_checkpoint(stage.config)
    card = read_model_card(checkpoint)
    first = opened[knn.splits[0]].source
    splits = {}
    for split, parts in opened.items():
        words = tokens.words(split) if tokens.tokenizer else 0
        facts = SplitFacts.read(parts.neighbours, tokens.dictionary) if parts.neighbours else None
        log_probs, splits[split] = evaluate_parts(
            parts, frozen, frozen_cache, fitted, facts, tuned.stores or None, words
        )  # fmt: skip
        groups = group_tokens(tokens.split(split), tokens.dictionary, parts.source)
        splits[split].bootstrap = bootstrap(log_probs, groups, parts.tokens / words if words else 1.0)
        write_losses(
            run.losses, split, tokens.split(split), log_probs, tokens.dictionary, first.context_rule, first.model,
            first.token_files,
        )  # fmt: skip
    searched = kept[0].manifest if kept else None
    results = Results(
        name=stage.config.name,
        model=ModelFacts(card_parameters(card), first.model, card.step, str(checkpoint)),
        dictionary=DictionaryFacts(tokens.dictionary.hash, len(tokens.dictionary)),
        tokens=tokens.fingerprint,
        context_rule=first.context_rule,
        settings=_settings(tuned, searched),
        tuned_on=tuned.split,
        splits=splits,
        datastore=None if store is None else StoreFacts(
            store.rows, store.width, store.bytes, store.key_dtype.name, store.tap, store.fingerprint
        ),
        index=index,
        exactness=None if searched is None else exactness(searched) + _first_of(kept[0]),
        ladder=ladder,
        self_test=None if searched is None else replace(searched.self_test, checked=checked),
        hashes={
            "model": first.model, "dictionary": tokens.dictionary.hash, "tokens": tokens.fingerprint,
            **({} if store is None or searched is None else {"datastore": store.fingerprint, "index": searched.index}),
            "settings": tuned.fingerprint,
            **{f"neighbours/{split}": parts.neighbours.fingerprint for split, parts in opened.items()
               if parts.neighbours},
            **{f"cache/{split}": parts.cache.fingerprint for split, parts in opened.items() if parts.cache},
        },
        code=code_version(),
    )  # fmt: skip
    if not stage.config.launch.verify:
        results.verified = False
    for split, result in splits.items():
        if result.shuffled and result.shuffled.alarm:
            say(
                f"knn evaluate: ALARM: on {split} the neighbours' values are no better than permuted ones; rows of "
                "values and keys may be misaligned: run `distlm datastore verify` and look at the self-test"
            )
    seconds = time.monotonic() - start
    run.metrics.write("knn evaluate", {STAGE_SECONDS: round(seconds, 3)})
    results.seconds = stage_seconds(run.metrics.path)
    run.write_results(results)
    summary = {"seconds": seconds}
    for split, result in splits.items():
        summary |= {
            f"{split}/{name}/perplexity_per_word": found.perplexity for name in NAMES if (found := result.of(name))
        }
    return summary


def _settings(tuned: Tuned, searched: NeighboursManifest | None) -> Settings:
    """What was frozen, for results.json."""
    settings = Settings()
    if searched is not None:
        settings = Settings(
            weight=tuned.weight, temperature=tuned.temperature, k=tuned.k, nprobe=searched.nprobe,
            distances=searched.distances, search=searched.search, similarity=searched.similarity or "l2",
            fast_scan=searched.fast_scan,
        )  # fmt: skip
    if own := tuned.cache:
        settings.cache = CacheSettings(own.weight, own.theta, own.window, own.fill, own.tap)
    if tuned.both:
        settings.both = BothSettings(tuned.both.knn_lambda, tuned.both.cache_lambda)
    if tuned.stores:
        settings.stores = Stores(tuned.stores.lambdas, tuned.stores.stores)
    if tuned.halves_of and tuned.grid:
        buckets = (tuned.grid.buckets or 0) if tuned.buckets else 0
        settings.adaptive = AdaptiveSettings(buckets, bool(tuned.gate), tuned.halves_of)
    return settings


def _ladder(
    stage: Stage, store: Datastore | None, neighbours: Neighbours | None, frozen: Frozen | None
) -> Ladder | None:
    """The exactness ladder, from the last evaluation where nothing has changed; None without an index or a sample."""
    run, sample = stage.run, stage.config.knn.ladder_sample
    knn = stage.config.knn
    if store is None or neighbours is None or frozen is None or knn.search != "index" or sample == 0:
        return None
    if knn.similarity == "dot":
        # Its rungs are distances.
        return None
    before = _ladder_before(run.results)
    if before and before.key == ladder_key(neighbours, frozen, sample):
        return before
    # Before an index is opened: faiss may fall over damaged bytes.
    for root, files in ((store.folder, store.written()), (run.index, written_index(run.index))):
        stage.require_whole(root, files, alone=True)
    # As the search compared 4-bit codes. This stage is given no GPU, and a sample needs none.
    lists = knn.scan == "lists" if neighbours.manifest.fast_scan is UNSET else not neighbours.manifest.fast_scan
    scan = "lists" if lists else "queries"
    return exactness_ladder(store, open_index(run.index, store, scan), neighbours, frozen, sample)


def _ladder_before(path: Path) -> Ladder | None:
    """That of the last evaluation; None without one, or where its file cannot be read, which is written anew."""
    try:
        return Results.read(path).ladder or None
    except DistlmError:
        return None


def evaluate_parts(
    parts: Parts,
    frozen: Frozen | None,
    frozen_cache: FrozenCache | None,
    fitted: Fitted | None = None,
    facts: SplitFacts | None = None,
    stores: Stores | None = None,
    words: int = 0,
) -> tuple[dict[str, Floats], SplitResults]:
    """Log-probability of every token under each mixture (fp64 [Q]), and one split's entry of results.json.

    `words` of the text, where tokens are sub-words; 0: its tokens.
    """
    log_lm, log_knn, weight = parts.log_lm(), None, 0.0
    if parts.neighbours is not None and frozen is not None:
        weight = frozen.weight
        log_knn = split_knn_log_probs(parts.neighbours, frozen.temperature, [frozen.k])[0]
    log_probs, curve = mixtures(log_lm, log_knn, weight, parts.cache, frozen_cache), None
    if fitted is not None and facts is not None and log_knn is not None:
        log_cache = None
        if parts.cache is not None and frozen_cache is not None:
            log_cache = parts.cache.log_probs(frozen_cache.window, frozen_cache.theta)
        adaptive, curve = adaptive_mixtures(facts, fitted, log_lm, log_knn, log_cache)
        log_probs |= adaptive
        if stores is not None:
            own = facts.neighbours
            log_probs["stores"] = stores_mixture(own, stores, log_lm, log_knn, own.manifest.split == fitted.split)
    log_probs = {name: log_probs[name] for name in NAMES if name in log_probs}
    result = SplitResults(
        tokens=parts.tokens, blocks=parts.source.blocks, words=words or UNSET, gate_curve=curve or UNSET,
        lm=_figures(log_lm, words),
    )  # fmt: skip
    for name, scores in log_probs.items():
        setattr(result, name, _figures(scores, words))
    if parts.neighbours is not None and frozen is not None and log_knn is not None:
        result.retrieved = float(np.mean(np.isfinite(log_knn)))
        result.shuffled = shuffled_check(parts.neighbours, frozen, log_lm, log_knn)
        result.neighbours = parts.neighbours.fingerprint
    if parts.cache is not None and frozen_cache is not None:
        result.cached, result.cache_files = share_cached(parts.cache, frozen_cache), parts.cache.fingerprint
    return log_probs, result


def _first_of(neighbours: Neighbours) -> str:
    return f"; the first {neighbours.k} of {neighbours.searched} that were searched" if neighbours.searched else ""


def exactness(manifest: NeighboursManifest) -> str:
    """What the distances are, in words."""
    if manifest.similarity == "dot":
        found = "every stored key was compared" if manifest.search == "brute" else "found by the index (approximate)"
        return f"neighbours by squared L2, {found}; weighed by the dot product with the true keys (exact)"
    if manifest.search == "brute":
        return "exact: every stored key was compared, squared L2 over the true keys"
    if manifest.distances == "exact":
        return "neighbours found by the index (approximate), their squared L2 recomputed over the true keys (exact)"
    return "neighbours and distances as the index gives them (approximate): squared L2 to the encoded keys"


def _figures(scores: Floats, words: int) -> Figures:
    """Of log-probabilities [Q]; perplexity per word where tokens are sub-words."""
    loss = mean_loss(scores)
    if not words:
        return Figures(loss, perplexity(loss))
    return Figures(loss, perplexity(loss * len(scores) / words), perplexity(loss))
