"""The results as a plain text table."""

from collections.abc import Sequence

from msgspec import UNSET

from distlm.knnlm.evaluate.records import Ladder, Results, SplitResults
from distlm.knnlm.search.records import SelfTest
from distlm.knnlm.tune.records import CacheSettings
from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds

PART_WORDS = {
    "lm": "LM", "cache": "+ cache", "knn": "+ kNN", "knn_buckets": "+ kNN, λ by distance", "gate": "+ kNN, gated",
    "stores": "+ kNN, several stores", "both": "+ kNN + cache", "both_buckets": "+ kNN + cache, λ by distance",
}  # fmt: skip
"""The parts of a split's entry in results.json, in words."""


def results_table(results: Results) -> str:
    """Perplexities, then what they were measured with. No line is wider than its content needs."""
    splits, there = results.splits, results.mixtures()
    rows = [["perplexity per word", *splits]]
    for name in there:
        rows.append([PART_WORDS[name], *(_figure(split, name) for split in splits.values())])
    rows.append(["tokens", *(f"{split.tokens:,}" for split in splits.values())])
    if all(split.words for split in splits.values()):
        rows.append(["words", *(f"{split.words:,}" for split in splits.values())])
        rows += [
            [
                f"{PART_WORDS[name]}, per token",
                *(f"{split.figures(name).token_perplexity:.2f}" for split in splits.values()),
            ]
            for name in there
        ]
    facts = [
        *_setting_facts(results, there),
        ["context", results.context_rule],
        ["model", f"{results.model.parameters:,} parameters, step {results.model.step}"],
    ]
    if boot := next(iter(splits.values())).bootstrap:
        facts.append(["intervals", f"{boot.level:.0%}, bootstrap over {boot.over}" if boot.level else "none"])
    if adaptive := results.settings.adaptive:
        facts.append(["cross-fitted", f"λ by distance and gate on {results.tuned_on}, over halves of its "
                                      f"{adaptive.halves_of}"])  # fmt: skip
    facts += _store_facts(results)
    seconds = results.seconds or {}
    facts.append(["time", ", ".join(f"{stage} {format_seconds(s)}" for stage, s in seconds.items())])
    alarms = [name for name, split in splits.items() if split.shuffled and split.shuffled.alarm]
    if results.verified is False:
        facts.append(["files", "not compared with their checksums (--no-verify)"])
    if alarms:
        facts.append(["ALARM", f"on {', '.join(alarms)} the neighbours' values are no better than permuted ones"])
    return f"{_grid(rows)}\n\n{_pairs(facts)}"


def _setting_facts(results: Results, there: Sequence[str]) -> list[list[str]]:
    """The frozen settings of the mixtures that are there."""
    settings, facts = results.settings, []
    if "knn" in there:
        probes = f", nprobe={settings.nprobe}" if settings.nprobe else ""
        facts.append(["settings", f"λ={settings.weight:g}, T={settings.temperature:g}, k={settings.k}{probes}, "
                                  f"tuned on {results.tuned_on}"])  # fmt: skip
    if "cache" in there and settings.cache:
        facts.append(["cache", cache_words(settings.cache) + f", tuned on {results.tuned_on}"])
    if "stores" in there and (own := settings.stores):
        shares = (f"{s.run or 'own'} λ={w:.3f}" for s, w in zip(own.stores, own.lambdas, strict=True))
        facts.append(["stores", ", ".join(shares)])
    if "both" in there and settings.both:
        facts.append(["kNN + cache", f"λ of kNN {settings.both.knn_lambda:g}, "
                                     f"λ of the cache {settings.both.cache_lambda:g}"])  # fmt: skip
    return facts


def _figure(split: SplitResults, name: str) -> str:
    """Perplexity with its interval where there is one."""
    interval = ((split.bootstrap and split.bootstrap.intervals) or {}).get(name)
    between = f"  [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{split.figures(name).perplexity:.2f}{between}"


def cache_words(settings: CacheSettings) -> str:
    """The cache's settings in words."""
    rule = "none until the window is full" if settings.fill == "full" else "used before the window is full"
    return f"λ={settings.weight:g}, θ={settings.theta:g}, window={settings.window} ({rule})"


def ladder_words(ladder: Ladder) -> str:
    """The exactness ladder of results.json in words."""
    rungs = ", ".join(
        f"{name} {rung.perplexity:.2f} (recall {rung.recall:.1%})"
        for name, rung in (("exact", ladder.exact), ("rescored", ladder.rescored), ("quantised", ladder.quantised))
    )
    sample = f"on {ladder.queries} tokens of {ladder.split}, k={ladder.k}"
    return f"{sample}, perplexity per token: {rungs}; LM {ladder.lm.perplexity:.2f}"


def candidates_words(ladder: Ladder) -> str:
    """Recall and perplexity against cost: what exact distances find among more and more candidates, in words."""
    return ", ".join(
        f"of {one.candidates} {one.perplexity:.2f} (recall {one.recall:.1%})" for one in ladder.candidates or []
    )


def self_test_words(test: SelfTest) -> str:
    """The self-test of results.json in words."""
    if test.run is False:
        return "not run (knn.self_test=false when the neighbours were searched)"
    expected = "" if test.expected is UNSET else f", {test.expected:.1%} expected"
    words = (
        f"{test.found:.1%} of {test.keys} stored keys find their own row among {test.k}{expected}; "
        f"{test.first:.1%} find it first"
    )
    if test.checked is not UNSET:
        words += (
            f"; kept neighbours of {test.checked:,} tokens checked" if test.checked else "; kept neighbours not checked"
        )
    return words


def _store_facts(results: Results) -> list[list[str]]:
    """Of neighbours alone: without them there is nothing to say."""
    store, index, test = results.datastore, results.index, results.self_test
    if store is None or results.exactness is None or test is None:
        return []
    where = f"{index.factory}, {format_bytes(index.bytes)}" if index else "none (brute force)"
    return [
        ["distances", results.exactness],
        ["datastore", f"{store.rows:,} rows × {store.width} {store.dtype}, {format_bytes(store.bytes)}"],
        ["index", where],
        ["self-test", self_test_words(test)],
        *([["exactness", ladder_words(results.ladder)]] if results.ladder else []),
        *([["candidates", candidates_words(results.ladder)]] if results.ladder and results.ladder.candidates else []),
    ]


def _grid(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("─" * width for width in widths))
    return "\n".join(lines)


def _pairs(facts: Sequence[Sequence[str]]) -> str:
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)
