"""The tables and the figure of `distlm reproduce regularized-knnlm` (Ton et al. 2021), from what is finished.

table.md            tables 1 and 2: perplexities for every ω, mean ± standard deviation over the seeds, and in words
                    whether the paper's effect appears
table.csv           the runs one by one
figure1.png, .csv   figure 1: perplexity on valid over ω

With neighbours there are two perplexities: at λ = 0.3 and T = 1, as in the paper, and at the λ, T and k that are best
on valid for that run. The penalty shrinks the keys and with them all distances, which by itself acts like another
temperature: only the second perplexity tells whether it does more than that.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.analysis.plots.groups import perplexity_with_errors
from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import Figure, ResultRow, ResultsPath, Verdict
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_picture, write_text
from distlm.data.records import TokensMeta
from distlm.data.tokens import META
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.tune.records import Tuned
from distlm.runtime import metrics
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir

LAMBDA, TEMPERATURE = 0.3, 1.0
"""Of the paper, for every ω; the temperature is not mentioned there and 1 in the code it builds upon."""
PUBLISHED: Mapping[str, Mapping[float, tuple[float, float, float]]] = {
    "WikiText-2": {
        0: (19.99, 75.96, 74.11), 0.1: (20.05, 75.68, 73.13), 1: (20.11, 76.37, 70.63), 10: (21.37, 81.29, 80.52),
    },
    "WikiText-103": {0: (11.31, 18.00, 16.09), 1: (11.24, 17.95, 15.89), 10: (11.07, 17.71, 17.46)},
}  # fmt: skip
"""Text → ω → train perplexity, valid perplexity, valid perplexity with neighbours, of the L2 form (tables 1 and 2)."""
PATH: ResultsPath = "Regularised training"
TABLES = {
    "table.csv": "every run by itself",
    "figure1.csv": "perplexity on valid, mean and standard deviation over the seeds",
}
NOTES = ("Perplexity on valid, mean ± standard deviation over the seeds. Tuned: λ, T and k, on valid, for every run.",)
FORMS = {"": "L2", "queue-": "queues", "mean-": "running means"}
"""Beginning of a run's name → its penalty."""
_PARTS = {"lm": "LM", "fixed": "+ kNN at λ 0.3 and T 1", "tuned": "+ kNN tuned"}
"""Perplexity in figure1.csv → what it is of."""
_NAME = re.compile(r"(queue-|mean-|)w([\d.]+(?:e-?\d+)?)-s(\d+)")
_MEASURES = {
    "train": "train", "lm": "valid LM", "fixed": "+ kNN, λ 0.3, T 1", "tuned": "+ kNN, tuned", "lm_test": "test LM",
    "tuned_test": "+ kNN, tuned",
}  # fmt: skip
"""Measure → head of its column."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    form: str
    weight: float
    seed: int
    perplexities: dict[str, float | None]
    """Of _MEASURES; the training split's with dropout, over the last tenth of the updates."""
    settings: tuple[float, float, int]
    """λ, T and k as tuned."""
    norm: float | None
    """Mean ‖r‖ in the same updates."""
    edges: list[str]
    """Tuned settings that are the last of their grid, in words."""


@dataclass(frozen=True)
class Cell:
    """Runs of one form and ω."""

    mean: float
    deviation: float | None
    """Standard deviation over the seeds (n − 1); None of one seed."""

    @staticmethod
    def of(values: Sequence[float | None]) -> "Cell | None":
        """None when there is no value."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return Cell(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


Cells = dict[tuple[str, float], dict[str, Cell | None]]


def write_tables(root: Path) -> str:
    """Write what there is the data for; the table and the statement as text."""
    runs = sorted(filter(None, map(_read, sorted(root.iterdir()))), key=lambda run: (run.form, run.weight, run.seed))
    if not runs:
        raise nothing_finished(root)
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.form, run.weight), []).append(run)
    cells: Cells = {
        key: {name: Cell.of([run.perplexities[name] for run in group]) for name in _MEASURES}
        for key, group in groups.items()
    }
    write_csv(
        root / "table.csv",
        ["penalty", "weight", "seed", *_MEASURES, "lambda", "temperature", "k", "norm"],
        [[FORMS[run.form], run.weight, run.seed, *_blank(run.perplexities.values()), *run.settings,
          *_blank([run.norm])] for run in runs],
    )  # fmt: skip
    text = "\n\n".join([_table(groups, cells, _edition(root)), *_statements(cells)])
    write_text(root / "table.md", text)
    _figure(root, cells)
    return f"{text}\n\ntables and figure: {root}"


def rows(root: Path) -> list[ResultRow]:
    """For every form and ω the perplexities on valid, and for λ and T fixed and tuned whether the effect appears."""
    cells: dict[tuple[str, float], dict[str, Cell]] = {}
    for line in lines_of(root / "figure1.csv"):
        deviation = float(line["standard_deviation"]) if line["standard_deviation"] else None
        of = cells.setdefault((line["penalty"], float(line["weight"])), {})
        of[line["perplexity"]] = Cell(float(line["mean"]), deviation)
    published = PUBLISHED.get(_edition(root) or "", {})
    made = []
    for (form, weight), found in cells.items():
        words = [name for key, name in _PARTS.items() if key in found]
        row = ResultRow(
            f"{form}, ω = {weight:g}: {', '.join(words)}", _shown([found[key] for key in _PARTS if key in found]), 0
        )
        if form == FORMS[""] and weight in published:
            row.paper = figure("LM {:.2f}, + kNN {:.2f}", *published[weight][1:])
        made.append(row)
    for form in dict.fromkeys(form for form, _ in cells):
        for key in ("fixed", "tuned"):
            there = {
                weight: row[key] for (kind, weight), row in cells.items() if kind == form and weight and key in row
            }
            plain = cells.get((FORMS[""], 0.0), {}).get(key)
            if plain is None or not there:
                continue
            best = min(there, key=lambda weight: there[weight].mean)
            row = ResultRow(
                f"{form}, {_PARTS[key]}: the best ω > 0, {best:g} (and ω = 0)", _shown([there[best]], [plain]), 0
            )
            row.finding, row.verdict = "some ω > 0 is best", _seen(plain, there[best])
            if form == FORMS[""] and published:
                least = min(published[weight][2] for weight in published if weight)
                row.paper = figure("{:.2f} ({:.2f})", least, published[0][2])
            made.append(row)
    return made


def _shown(cells: Sequence[Cell], beside: Sequence[Cell] = ()) -> Figure:
    numbers = [number for cell in (*cells, *beside) for number in (cell.mean, cell.deviation) if number is not None]
    texts = [[_form(cell) for cell in group] for group in (cells, beside)]
    return figure(", ".join(texts[0]) + (f" ({', '.join(texts[1])})" if beside else ""), *numbers)


def _form(cell: Cell) -> str:
    return "{:.2f}" if cell.deviation is None else "{:.2f} ± {:.2f}"


def _read(folder: Path) -> Run | None:
    match, run = _NAME.fullmatch(folder.name), RunDir(folder)
    if not match or not (run.results.exists() and run.tuned.exists()):
        return None
    results, tuned = Results.read(run.results), Tuned.read(run.tuned)
    if not results.splits["valid"].knn or not tuned.grid:
        return None
    perplexities: dict[str, float | None] = {"fixed": fixed_perplexity(tuned)}
    for split, suffix in (("valid", ""), ("test", "_test")):
        found = results.splits.get(split)
        for part, name in (("lm", "lm"), ("knn", "tuned")):
            figures = found and found.of(part)
            perplexities[name + suffix] = figures.perplexity if figures else None
    lines = list(run.metrics.read("train"))
    loss, norm = (_at_the_end(metrics.points(lines, name)) for name in (metrics.TRAIN_LOSS, metrics.TRAIN_NORM))
    perplexities["train"] = None if loss is None else math.exp(loss)
    ordered = {name: perplexities[name] for name in _MEASURES}
    settings = given(tuned.weight), given(tuned.temperature), given(tuned.k)
    return Run(match[1], float(match[2]), int(match[3]), ordered, settings, norm, tuned.edges or [])


def _at_the_end(points: Sequence[tuple[int, float]]) -> float | None:
    """Mean over the last tenth of the updates."""
    return statistics.fmean(value for step, value in points if step > 0.9 * points[-1][0]) if points else None


def fixed_perplexity(tuned: Tuned) -> float | None:
    """Perplexity on the tuning split at the paper's λ and T and the largest k; None when the grid of knn.json has no
    such point."""
    grid = tuned.grid
    if not grid or LAMBDA not in grid.lambdas or TEMPERATURE not in grid.temperatures:
        return None
    at = grid.ks.index(max(grid.ks)), grid.temperatures.index(TEMPERATURE), grid.lambdas.index(LAMBDA)
    return math.exp(grid.loss_nats[at[0]][at[1]][at[2]])


def _table(groups: Mapping[tuple[str, float], Sequence[Run]], cells: Cells, edition: str | None) -> str:
    paper = PUBLISHED.get(edition or "", {})
    rows = []
    for (form, weight), group in groups.items():
        published = paper.get(weight) if form == "" else None
        rows.append([
            f"{FORMS[form]}, ω = {weight:g}", str(len(group)), *("" if cell is None else str(cell) for cell in
                                                               cells[form, weight].values()),
            *(_each(run.settings[place] for run in group) for place in (0, 1)),
            str(Cell.of([run.norm for run in group]) or ""),
            *(f"{value:.2f}" for value in published or ()), *([""] * (0 if published else 3)),
        ])  # fmt: skip
    head = ["penalty", "seeds", *_MEASURES.values(), "λ", "T", "‖r‖", "paper train", "paper LM", "paper + kNN"]
    note = (
        "Perplexity per word, mean ± standard deviation over the seeds. Train: with dropout, last tenth of the "
        "updates. λ, T and k are tuned on valid for each run; test is evaluated with them."
    )
    edges: dict[str, list[str]] = {}
    for run in (run for group in groups.values() for run in group):
        for edge in run.edges:
            edges.setdefault(edge, []).append(f"{run.form}w{run.weight:g}-s{run.seed}")
    warnings = [f"Warning: {edge} ({', '.join(names)})." for edge, names in edges.items()]
    return "\n\n".join([markdown(head, rows), note, *warnings])


def _each(values: Iterable[float]) -> str:
    """The tuned values of the seeds, equal ones once."""
    return " / ".join(f"{value:g}" for value in dict.fromkeys(values))


def _statements(cells: Cells) -> list[str]:
    """For each form: does some ω > 0 give the best kNN-LM, by more than the standard deviation over the seeds?"""
    found = []
    for form in dict.fromkeys(form for form, _ in cells):
        for name, words in (("fixed", f"λ = {LAMBDA:g}, T = {TEMPERATURE:g}"), ("tuned", "λ, T and k tuned on valid")):
            of_form = {weight: row[name] for (kind, weight), row in cells.items() if kind == form}
            there = {weight: cell for weight, cell in of_form.items() if weight > 0 and cell is not None}
            plain = cells.get(("", 0.0), {}).get(name)
            if plain is None or not there:
                continue
            best = min(there, key=lambda weight: there[weight].mean)
            found.append(f"{FORMS[form]}, {words}: {_verdict(plain, best, there[best])}")
    return found


def _seen(plain: Cell, best: Cell) -> Verdict:
    """Whether the best ω > 0 gains more than the standard deviation over the seeds; of one seed nothing can be said."""
    deviations = [cell.deviation for cell in (plain, best) if cell.deviation is not None]
    if not deviations:
        return "cannot be said"
    return "appears" if plain.mean - best.mean > max(deviations) else "does not appear"


def _verdict(plain: Cell, weight: float, best: Cell) -> str:
    gain = plain.mean - best.mean
    figures = f"ω = {weight:g} gives {best} where ω = 0 gives {plain}"
    seen = _seen(plain, best)
    if seen == "cannot be said":
        return f"{figures}; one seed alone does not tell whether the paper's effect appears."
    if seen == "does not appear":
        why = "no ω > 0 is better" if gain <= 0 else "less than the standard deviation apart"
        return f"the paper's effect does not appear: {figures} ({why})."
    return f"the paper's effect appears: {figures}."


def _figure(root: Path, cells: Cells) -> None:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    rows = []
    for form in dict.fromkeys(form for form, _ in cells):
        for name, words in (("lm", "LM"), ("fixed", "+ kNN, λ 0.3, T 1"), ("tuned", "+ kNN, tuned")):
            points = [(weight, row[name]) for (kind, weight), row in cells.items() if kind == form]
            curve = [(weight, cell.mean, cell.deviation or 0.0) for weight, cell in points if cell is not None]
            if curve:
                curves[f"{FORMS[form]}: {words}"] = curve
            rows += [[FORMS[form], name, weight, cell.mean, "" if cell.deviation is None else cell.deviation]
                     for weight, cell in points if cell is not None]  # fmt: skip
    write_csv(root / "figure1.csv", ["penalty", "perplexity", "weight", "mean", "standard_deviation"], rows)
    lowest = (f"{name}: ω = {min(points, key=lambda point: point[1])[0]:g}" for name, points in curves.items())
    seen = f"Perplexity is lowest at: {'; '.join(lowest)}. Bars: standard deviation over the seeds."
    write_picture(root / "figure1.png", perplexity_with_errors(curves, "ω, weight of the penalty", seen))


def _edition(root: Path) -> str | None:
    path = root / "tokens" / "tokens" / META
    found = TokensMeta.read(path).edition if path.exists() else None
    return found.name if found and found.exact else None


def _blank(values: Any) -> list[Any]:
    return ["" if value is None else value for value in values]
