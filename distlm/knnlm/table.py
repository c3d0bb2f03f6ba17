"""The results as a plain text table."""

from collections.abc import Sequence
from typing import Any

from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds


def results_table(results: dict[str, Any]) -> str:
    """Perplexities, then what they were measured with, of a results.json. No line is wider than its content needs."""
    splits: dict[str, Any] = results["splits"]
    rows = [
        ["perplexity per word", *splits],
        ["LM", *(f"{split['lm']['perplexity']:.2f}" for split in splits.values())],
        ["+ kNN", *(f"{split['knn']['perplexity']:.2f}" for split in splits.values())],
        ["tokens", *(f"{split['tokens']:,}" for split in splits.values())],
    ]
    settings, store, index = results["settings"], results["datastore"], results["index"]
    where = f"{index['factory']}, {format_bytes(index['bytes'])}" if index else "none (brute force)"
    probes = f", nprobe={settings['nprobe']}" if settings["nprobe"] else ""
    facts = [
        ["settings", f"λ={settings['lambda']:g}, T={settings['temperature']:g}, k={settings['k']}{probes}, "
                     f"tuned on {results['tuned_on']}"],
        ["distances", results["exactness"]],
        ["context", results["context_rule"]],
        ["model", f"{results['model']['parameters']:,} parameters, step {results['model']['step']}"],
        ["datastore", f"{store['rows']:,} rows × {store['width']} {store['dtype']}, {format_bytes(store['bytes'])}"],
        ["index", where],
        ["self-test", f"{results['self_test']['found']:.1%} of {results['self_test']['keys']} stored keys find "
                      "themselves"],
        ["time", ", ".join(f"{stage} {format_seconds(s)}" for stage, s in results["seconds"].items())],
    ]  # fmt: skip
    alarms = [name for name, split in splits.items() if split["shuffled"]["alarm"]]
    if alarms:
        facts.append(["ALARM", f"on {', '.join(alarms)} the neighbours' values are no better than permuted ones"])
    return f"{_grid(rows)}\n\n{_pairs(facts)}"


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
