"""The tables and the figure of `distlm reproduce regularized-knnlm` (Ton et al. 2021), from what is finished.

table.md            tables 1 and 2: perplexities for every ω, mean ± standard deviation over the seeds; the processor
                    time; and for each of the paper's findings whether it appears
table.csv           the runs one by one
figure1.png, .csv   figure 1: perplexity on valid over ω

With neighbours there are three perplexities: at λ = 0.3 and T = 1, as in the paper; at the λ that is best on valid at
T = 1, which is how the paper came to 0.3; and at the λ, T and k that are best on valid for that run. The penalty
shrinks the keys and with them all distances, which by itself acts like another temperature: only the last perplexity
tells whether it does more than that.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distlm.analysis.papers.regularized_findings import (
    L2,
    PARTS,
    PUBLISHED,
    RULE,
    Cells,
    cells_of,
    findings,
    shown,
)
from distlm.analysis.papers.regularized_runs import FORMS, MEASURES, Run, read_runs
from distlm.analysis.papers.seeds import Cell
from distlm.analysis.plots.groups import perplexity_with_errors
from distlm.analysis.results.from_csv import figure
from distlm.analysis.results.records import ResultRow, ResultsPath
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_picture, write_text
from distlm.data.records import TokensMeta
from distlm.data.tokens import META
from distlm.runtime.records import given

PATH: ResultsPath = "Regularised training"
TABLES = {
    "table.csv": "every run by itself",
    "figure1.csv": "perplexity on valid, mean and standard deviation over the seeds",
}
NOTES = (
    "Perplexity on valid, mean ± standard deviation over the seeds. All tuned: λ, T and k, on valid, for every run. "
    "Train: with dropout, the tenth of the updates before the checkpoint.",
    RULE,
)


def write_tables(root: Path) -> str:
    """Write what there is the data for; the tables as text."""
    runs = read_runs(root)
    if not runs:
        raise nothing_finished(root)
    cells, edition = cells_of(runs), _edition(root)
    write_csv(
        root / "table.csv",
        ["penalty", "weight", "seed", *MEASURES, "lambda", "temperature", "k", "lambda_t1", "norm", "processor_s"],
        [[FORMS[run.form], run.weight, run.seed, *_blank(run.measures.values()), *run.settings,
          *_blank([run.lambda_t1, run.norm, run.processor_s])] for run in runs],
    )  # fmt: skip
    text = "\n\n".join([_table(runs, cells, edition), *_verdicts(findings(runs, edition))])
    write_text(root / "table.md", text)
    _figure(root, cells)
    return f"{text}\n\ntables and figure: {root}"


def rows(root: Path) -> list[ResultRow]:
    """How far train and valid are apart, the perplexities on valid of every form and ω, what the runs took, and what
    they say of the paper's findings."""
    runs, edition = read_runs(root), _edition(root)
    cells, published = cells_of(runs), PUBLISHED.get(edition or "", {})
    made = []
    plain = cells.get((L2, 0.0), {})
    if (train := plain.get("train")) and (ratio := plain.get("ratio")):
        train_0, valid_0, _ = (published or PUBLISHED["WikiText-2"])[0]
        row = ResultRow("L2, ω = 0: LM on train (and valid over train)", shown([train], [ratio]), 0)
        row.paper = figure(f"{edition or 'WikiText-2'} {{:.2f}} ({{:.2f}})", train_0, round(valid_0 / train_0, 6))
        made.append(row)
    for (form, weight), of in cells.items():
        there = {words: cell for name, words in PARTS.items() if (cell := of[name])}
        row = ResultRow(f"{FORMS[form]}, ω = {weight:g}: {', '.join(there)}", shown(list(there.values())), 0)
        if form == L2 and weight in published:
            row.paper = figure("LM {:.2f}, + kNN {:.2f}", *published[weight][1:])
        made.append(row)
    if spent := [run.processor_s for run in runs if run.processor_s is not None]:
        which = f"all {len(runs)} runs" if len(spent) == len(runs) else f"{len(spent)} of {len(runs)} runs"
        made.append(ResultRow(f"processor time of {which}, h", figure("{:.2f}", sum(spent) / 3600), 0))
    return [*made, *findings(runs, edition)]


def _table(runs: Sequence[Run], cells: Cells, edition: str | None) -> str:
    paper = PUBLISHED.get(edition or "", {})
    lines = []
    for (form, weight), of in cells.items():
        group = [run for run in runs if (run.form, run.weight) == (form, weight)]
        published = paper.get(weight) if form == L2 else None
        lines.append([
            f"{FORMS[form]}, ω = {weight:g}", str(len(group)), *(str(of[name] or "") for name in MEASURES),
            _each(run.lambda_t1 for run in group), *(_each(run.settings[place] for run in group) for place in (0, 1)),
            str(Cell.of([run.norm for run in group]) or ""),
            *(f"{value:.2f}" for value in published or ()), *([""] * (0 if published else 3)),
        ])  # fmt: skip
    head = [
        "penalty", "seeds", *MEASURES.values(), "λ at T 1", "λ", "T", "‖r‖", "paper train", "paper LM", "paper + kNN",
    ]  # fmt: skip
    note = (
        "Perplexity per word, mean ± standard deviation over the seeds. Train: with dropout, the tenth of the updates "
        "before the checkpoint. λ alone, and λ, T and k are tuned on valid for each run; test is evaluated with these."
    )
    edges: dict[str, list[str]] = {}
    for run in runs:
        for edge in run.edges:
            edges.setdefault(edge, []).append(run.name)
    warnings = [f"Warning: {edge} ({', '.join(names)})." for edge, names in edges.items()]
    return "\n\n".join([markdown(head, lines), note, *_spent(runs), *warnings])


def _spent(runs: Sequence[Run]) -> list[str]:
    """A sentence; none where no run has it on record."""
    spent = [run.processor_s for run in runs if run.processor_s is not None]
    if not spent:
        return []
    missing = len(runs) - len(spent)
    other = f"; {missing} more have no record of it" if missing else ""
    return [f"Processor time of all stages of {len(spent)} runs: {sum(spent) / 3600:.2f} h{other}."]


def _each(values: Iterable[float | None]) -> str:
    """The tuned values of the seeds, equal ones once."""
    return " / ".join(f"{value:g}" for value in dict.fromkeys(values) if value is not None)


def _verdicts(found: Sequence[ResultRow]) -> list[str]:
    """A table of them, and by which rule; nothing where there is none."""
    if not found:
        return []
    lines = [
        [row.what, row.ours.text(), row.paper.text() if row.paper else "", given(row.finding), given(row.verdict)]
        for row in found
    ]
    return [markdown(["measured", "ours", "paper", "the paper's finding", "in ours"], lines), RULE]


def _figure(root: Path, cells: Cells) -> None:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    lines: list[list[Any]] = []
    for form in dict.fromkeys(form for form, _ in cells):
        for name, words in PARTS.items():
            points = [(weight, cell) for (kind, weight), of in cells.items() if kind == form and (cell := of[name])]
            if points:
                curves[f"{FORMS[form]}: {words}"] = [
                    (weight, cell.mean, cell.deviation or 0.0) for weight, cell in points
                ]
            lines += [[FORMS[form], name, weight, cell.mean, *_blank([cell.deviation])] for weight, cell in points]
    write_csv(root / "figure1.csv", ["penalty", "perplexity", "weight", "mean", "standard_deviation"], lines)
    lowest = (f"{name}: ω = {min(points, key=lambda point: point[1])[0]:g}" for name, points in curves.items())
    caption = f"Perplexity is lowest at: {'; '.join(lowest)}. Bars: standard deviation over the seeds."
    write_picture(root / "figure1.png", perplexity_with_errors(curves, "ω, weight of the penalty", caption))


def _edition(root: Path) -> str | None:
    path = root / "tokens" / "tokens" / META
    found = TokensMeta.read(path).edition if path.exists() else None
    return found.name if found and found.exact else None


def _blank(values: Iterable[Any]) -> list[Any]:
    return ["" if value is None else value for value in values]
