"""The chief figures of `distlm reproduce pkm-plm` beside those of Kim & Jung (2020), from its CSV files."""

import statistics
from pathlib import Path

from distlm.analysis.papers.pkm_plm_seeds import seed_rows
from distlm.analysis.papers.pkm_plm_sweep import sweep_rows
from distlm.analysis.papers.seeds import Cell, error_between, higher, model_and_seed, numbers_of, place_of
from distlm.analysis.processor import processor_rows
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import Figure, ResultRow, Verdict
from distlm.analysis.results.verdict import above, lower, together

_MODELS = {"pkm": "+PKM", "resm": "+ResM", "init-pkm": "+Init +PKM", "init-resm": "+Init +ResM"}
_PAIRS = {
    ("pkm", "dense"): "a memory lowers the perplexity", ("resm", "dense"): "a memory lowers the perplexity",
    ("init-pkm", "init"): "a memory lowers it more than training on", ("init-resm", "init"): "the same",
    ("resm", "pkm"): "ResM is no worse than PKM", ("init-resm", "init-pkm"): "ResM is better than PKM",
}  # fmt: skip
"""Run and the one that it is compared with → what the paper says."""
_WORDS = {**_MODELS, "dense": "dense", "init": "dense, as long again"}
_WIKITEXT_2 = {"dense": 3.49, "init": 3.40, "pkm": 3.26, "resm": 3.26, "init-pkm": 3.14, "init-resm": 3.10}
"""Perplexity of masked tokens (table 2)."""
_TOP1_MU = {"pkm": (2.2, 84.1), "resm": (75.0, 81.0), "init-pkm": (97.4, 95.7), "init-resm": (98.2, 97.3)}
"""In % of layers 4 and 8 (table 2)."""
_SCORES = {"SST-2": (92.4, 94.0, 93.3), "CoLA": (61.4, 64.1, 61.6)}
"""Dense with as many updates, +Init +ResM with values updated, and frozen, on dev in % (tables 4 and 5)."""


def rows(root: Path) -> list[ResultRow]:
    """Perplexities in pairs, use of the memories, and the scores of the best model; then the sweep and the processor
    time. Where models have several seeds their use is compared over them."""
    use = seed_rows(root) or _use(root)
    return [*_perplexities(root), *use, *_scores(root), *sweep_rows(root), *processor_rows(root)]


def _perplexities(root: Path) -> list[ResultRow]:
    lines = lines_of(root / "pretraining.csv")
    names = list(lines[0]) if lines else []
    texts = names[2 : names.index("layer")] if lines else []
    texts = list(dict.fromkeys([texts[0], texts[-1]])) if texts else []
    # A run has a line for each of its layers.
    of_run = {line["run"]: line for line in lines}
    found: dict[str, dict[str, list[float]]] = {}
    for run, line in of_run.items():
        for text in texts:
            if line[text]:
                found.setdefault(model_and_seed(run)[0], {}).setdefault(text, []).append(float(line[text]))
    made = []
    for (run, other), finding in _PAIRS.items():
        if run not in found or other not in found:
            continue
        both = [text for text in texts if text in found[run] and text in found[other]]
        pairs = [(Cell(found[run][text]), Cell(found[other][text])) for text in both]
        sides = list(zip(*pairs, strict=True))
        shown = [", ".join(map(place_of, side)) for side in sides]
        numbers = [round(number, 6) for side in sides for cell in side for number in numbers_of(cell)]
        row = ResultRow(
            f"{_WORDS[run]} (and {_WORDS[other]}): {', '.join(both)}", figure(f"{shown[0]} ({shown[1]})", *numbers), 0,
            paper=figure("WikiText-2 {:.2f} ({:.2f})", _WIKITEXT_2[run], _WIKITEXT_2[other]),
        )  # fmt: skip
        row.finding, row.verdict = finding, together(_lower(*pair) for pair in pairs)
        made.append(row)
    return made


def _lower(own: Cell, against: Cell) -> Verdict:
    """By the standard errors where both have several seeds, else by the margin of one seed."""
    return lower(own.mean, against.mean) if error_between(own, against) is None else higher(against, own)


def _use(root: Path) -> list[ResultRow]:
    first: dict[str, list[float]] = {}
    for line in lines_of(root / "pretraining.csv"):
        if line["layer"]:
            first.setdefault(line["run"], []).append(percent(line["top1_mu"]))
    made = []
    for run, dense in (("pkm", "init-pkm"), ("resm", "init-resm")):
        if run in first and dense in first:
            own, published = (first[dense], first[run]), ([*_TOP1_MU[dense]], [*_TOP1_MU[run]])
            words = f"top-1 MU, layer by layer, of {_MODELS[dense]} (and {_MODELS[run]})"
            row = ResultRow(words, _layers(*own), 0, paper=_layers(*published))
            row.finding = "a model that starts from a dense one uses more of its memory"
            row.verdict = together(map(above, *own))
            made.append(row)
    return made


def _layers(own: list[float], other: list[float]) -> Figure:
    shown = " / ".join("{:.1f}" for _ in own)
    return figure(f"{shown} % ({shown} %)", *own, *other)


def _scores(root: Path) -> list[ResultRow]:
    medians: dict[tuple[str, str, str], list[float]] = {}
    majority: dict[str, float] = {}
    for line in lines_of(root / "finetuning.csv"):
        # A fine-tuning with a name of its own is another one.
        if line["name"] != line["task"] + ("-frozen" if line["memory"] == "frozen" else ""):
            continue
        medians.setdefault((line["run"], line["memory"], line["task"]), []).append(percent(line["dev"]))
        majority[line["task"]] = percent(line["majority"])
    made = []
    for task, best in majority.items():
        cells = [medians.get(key) for key in (("dense", "", task), *(("init-resm", values, task) for values in
                                                                    ("updated", "frozen")))]  # fmt: skip
        if not all(cells):
            continue
        dense, updated, frozen = (statistics.median(cell or []) for cell in cells)
        published = _SCORES.get(task)
        pairs = (
            ("updated (and dense; best single answer)", "a memory raises the score", (updated, dense), (best,), (1, 0)),
            ("frozen (and updated)", "frozen values score less", (frozen, updated), (), (2, 1)),
        )
        for words, finding, sides, more, places in pairs:
            shown = "{:.1f} ({:.1f}; {:.1f})" if more else "{:.1f} ({:.1f})"
            row = ResultRow(f"{task} on dev, +Init +ResM, values {words}", figure(shown, *sides, *more), 0)
            if published:
                row.paper = figure("{:.1f} ({:.1f})", *(published[place] for place in places))
            row.finding, row.verdict = finding, above(*(sides if more else sides[::-1]))
            made.append(row)
    return made
