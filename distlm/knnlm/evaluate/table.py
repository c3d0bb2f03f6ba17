"""The results as a plain text table."""

from collections.abc import Sequence
from typing import Any

from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds

PART_WORDS = {
    "lm": "LM", "cache": "+ cache", "knn": "+ kNN", "knn_buckets": "+ kNN, λ by distance", "gate": "+ kNN, gated",
    "stores": "+ kNN, several stores", "both": "+ kNN + cache", "both_buckets": "+ kNN + cache, λ by distance",
}  # fmt: skip
"""The parts of a split's entry in results.json, in words."""


def results_table(results: dict[str, Any]) -> str:
    """Perplexities, then what they were measured with, of a results.json. No line is wider than its content needs."""
    splits: dict[str, Any] = results["splits"]
    there = [name for name in PART_WORDS if all(name in split for split in splits.values())]
    rows = [["perplexity per word", *splits]]
    for name in there:
        rows.append([PART_WORDS[name], *(_figure(split, name) for split in splits.values())])
    rows.append(["tokens", *(f"{split['tokens']:,}" for split in splits.values())])
    if all("words" in split for split in splits.values()):
        rows.append(["words", *(f"{split['words']:,}" for split in splits.values())])
        rows += [
            [f"{PART_WORDS[name]}, per token", *(f"{split[name]['token_perplexity']:.2f}" for split in splits.values())]
            for name in there
        ]
    settings = results["settings"]
    facts = []
    if "knn" in there:
        probes = f", nprobe={settings['nprobe']}" if settings["nprobe"] else ""
        facts.append(["settings", f"λ={settings['lambda']:g}, T={settings['temperature']:g}, k={settings['k']}"
                                  f"{probes}, tuned on {results['tuned_on']}"])  # fmt: skip
    if "cache" in there:
        facts.append(["cache", cache_words(settings["cache"]) + f", tuned on {results['tuned_on']}"])
    if "stores" in there:
        own = settings["stores"]
        shares = (f"{s['run'] or 'own'} λ={w:.3f}" for s, w in zip(own["stores"], own["lambdas"], strict=True))
        facts.append(["stores", ", ".join(shares)])
    if "both" in there:
        facts.append(["kNN + cache", f"λ of kNN {settings['both']['knn_lambda']:g}, "
                                     f"λ of the cache {settings['both']['cache_lambda']:g}"])  # fmt: skip
    facts += [
        ["context", results["context_rule"]],
        ["model", f"{results['model']['parameters']:,} parameters, step {results['model']['step']}"],
    ]
    if boot := next(iter(splits.values())).get("bootstrap", {}):
        facts.append(
            ["intervals", f"{boot['level']:.0%}, bootstrap over {boot['over']}" if "level" in boot else "none"]
        )
    if adaptive := settings.get("adaptive"):
        facts.append(["cross-fitted", f"λ by distance and gate on {results['tuned_on']}, over halves of its "
                                      f"{adaptive['halves_of']}"])  # fmt: skip
    if "knn" in there:
        facts += _store_facts(results)
    facts.append(["time", ", ".join(f"{stage} {format_seconds(s)}" for stage, s in results["seconds"].items())])
    alarms = [name for name, split in splits.items() if "shuffled" in split and split["shuffled"]["alarm"]]
    if alarms:
        facts.append(["ALARM", f"on {', '.join(alarms)} the neighbours' values are no better than permuted ones"])
    return f"{_grid(rows)}\n\n{_pairs(facts)}"


def _figure(split: dict[str, Any], name: str) -> str:
    """Perplexity with its interval where there is one."""
    interval = split.get("bootstrap", {}).get("intervals", {}).get(name)
    between = f"  [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{split[name]['perplexity']:.2f}{between}"


def cache_words(settings: dict[str, Any]) -> str:
    """The cache's settings in words."""
    rule = "none until the window is full" if settings["fill"] == "full" else "used before the window is full"
    return f"λ={settings['lambda']:g}, θ={settings['theta']:g}, window={settings['window']} ({rule})"


def ladder_words(ladder: dict[str, Any]) -> str:
    """The exactness ladder of results.json in words."""
    rungs = ", ".join(
        f"{name} {ladder[name]['perplexity']:.2f} (recall {ladder[name]['recall']:.1%})"
        for name in ("exact", "rescored", "quantised")
    )
    sample = f"on {ladder['queries']} tokens of {ladder['split']}, k={ladder['k']}"
    return f"{sample}: {rungs}; LM {ladder['lm']['perplexity']:.2f}"


def self_test_words(test: dict[str, Any]) -> str:
    """The self-test of results.json in words."""
    if not test.get("run", True):
        return "not run (knn.self_test=false when the neighbours were searched)"
    expected = f", {test['expected']:.1%} expected" if "expected" in test else ""
    words = (
        f"{test['found']:.1%} of {test['keys']} stored keys find their own row among {test['k']}{expected}; "
        f"{test['first']:.1%} find it first"
    )
    if "checked" in test:
        checked = test["checked"]
        words += f"; kept neighbours of {checked:,} tokens checked" if checked else "; kept neighbours not checked"
    return words


def _store_facts(results: dict[str, Any]) -> list[list[str]]:
    store, index = results["datastore"], results["index"]
    where = f"{index['factory']}, {format_bytes(index['bytes'])}" if index else "none (brute force)"
    return [
        ["distances", results["exactness"]],
        ["datastore", f"{store['rows']:,} rows × {store['width']} {store['dtype']}, {format_bytes(store['bytes'])}"],
        ["index", where],
        ["self-test", self_test_words(results["self_test"])],
        *([["exactness", ladder_words(ladder)]] if (ladder := results.get("ladder")) else []),
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
