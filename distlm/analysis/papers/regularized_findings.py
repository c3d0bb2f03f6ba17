"""What the runs of `distlm reproduce regularized-knnlm` say of the findings of Ton et al. (2021)."""

from collections.abc import Mapping, Sequence

from distlm.analysis.papers.regularized_runs import FORMS, MEASURES, Run
from distlm.analysis.papers.seeds import Cell
from distlm.analysis.results.from_csv import figure
from distlm.analysis.results.records import Figure, ResultRow, Verdict

PUBLISHED: Mapping[str, Mapping[float, tuple[float, float, float]]] = {
    "WikiText-2": {
        0: (19.99, 75.96, 74.11), 0.1: (20.05, 75.68, 73.13), 1: (20.11, 76.37, 70.63), 10: (21.37, 81.29, 80.52),
    },
    "WikiText-103": {0: (11.31, 18.00, 16.09), 1: (11.24, 17.95, 15.89), 10: (11.07, 17.71, 17.46)},
}  # fmt: skip
"""Text → ω → train perplexity, valid perplexity, valid perplexity with neighbours, of the L2 form (tables 1 and 2)."""
QUEUES = (70, 76)
"""With neighbours on WikiText-2: of the form with queues at its best ω, 2, and without a penalty (section 3)."""
L2, QUEUE = "", "queue-"
PARTS = {
    "lm": "LM", "fixed": "+ kNN at λ 0.3 and T 1", "lambda_tuned": "+ kNN, λ tuned at T 1", "tuned": "+ kNN, all tuned",
}  # fmt: skip
"""Perplexity on valid → what it is of."""
RULE = (
    "A finding about the best ω > 0 appears where that gains more than the larger standard deviation over the seeds. "
    "Two forms are alike where they are no further apart. Of one seed alone nothing can be said."
)

Cells = Mapping[tuple[str, float], Mapping[str, Cell | None]]
"""Form and ω → measure → its value."""


def cells_of(runs: Sequence[Run]) -> Cells:
    """Mean and deviation of the seeds of every form and ω."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.form, run.weight), []).append(run)
    return {
        key: {name: Cell.of([run.measures[name] for run in group]) for name in MEASURES}
        for key, group in groups.items()
    }


def findings(cells: Cells, edition: str | None) -> list[ResultRow]:
    """Whether some ω > 0 gives the best kNN-LM, of every form at each choice of λ and T, and whether queues (eq. 1) and
    L2 (eq. 2) are alike. The paper's figures are of the edition that the runs are of, else of WikiText-2."""
    text = edition if edition and edition in PUBLISHED else "WikiText-2"
    of_text = PUBLISHED[text]
    published = {L2: (min(of_text[weight][2] for weight in of_text if weight), of_text[0][2])}
    if text == "WikiText-2":
        published[QUEUE] = QUEUES
    made = []
    for form in dict.fromkeys(form for form, _ in cells):
        for part in list(PARTS)[1:]:
            plain, best = cells.get((L2, 0.0), {}).get(part), _best(cells, form, part)
            if plain is None or best is None:
                continue
            what = f"{FORMS[form]}, {PARTS[part]}: the best ω > 0, {best[0]:g} (and ω = 0)"
            row = ResultRow(what, shown([best[1]], [plain]), 0)
            row.finding, row.verdict = "some ω > 0 is best", seen(plain, best[1])
            if form in published:
                row.paper = figure(f"{text} {{}} ({{}})", *published[form])
            made.append(row)
    for part in list(PARTS)[1:]:
        queue, squares = _best(cells, QUEUE, part), _best(cells, L2, part)
        if queue is None or squares is None:
            continue
        what = f"queues and L2, {PARTS[part]}: the best ω > 0, {queue[0]:g} and {squares[0]:g}"
        row = ResultRow(what, shown([queue[1], squares[1]]), 0)
        row.finding, row.verdict = "eq. 1 and eq. 2 give similar perplexities", alike(queue[1], squares[1])
        if QUEUE in published:
            row.paper = figure(f"{text} {{}}, {{}}", published[QUEUE][0], published[L2][0])
        made.append(row)
    return made


def shown(cells: Sequence[Cell], beside: Sequence[Cell] = ()) -> Figure:
    """Values, and in brackets those that they stand beside."""
    numbers = [number for cell in (*cells, *beside) for number in (cell.mean, cell.deviation) if number is not None]
    texts = [["{:.2f}" if cell.deviation is None else "{:.2f} ± {:.2f}" for cell in group] for group in (cells, beside)]
    return figure(", ".join(texts[0]) + (f" ({', '.join(texts[1])})" if beside else ""), *numbers)


def seen(plain: Cell, best: Cell) -> Verdict:
    """Whether the best ω > 0 gains more than the standard deviation over the seeds; of one seed nothing can be said."""
    deviation = _deviation(plain, best)
    if deviation is None:
        return "cannot be said"
    return "appears" if plain.mean - best.mean > deviation else "does not appear"


def alike(one: Cell, other: Cell) -> Verdict:
    """Whether two perplexities are no further apart than the standard deviation over the seeds."""
    deviation = _deviation(one, other)
    if deviation is None:
        return "cannot be said"
    return "appears" if abs(one.mean - other.mean) <= deviation else "does not appear"


def _deviation(*cells: Cell) -> float | None:
    """The largest."""
    return max((cell.deviation for cell in cells if cell.deviation is not None), default=None)


def _best(cells: Cells, form: str, part: str) -> tuple[float, Cell] | None:
    """ω > 0 with the lowest mean, and that."""
    found = [(weight, cell) for (kind, weight), row in cells.items() if kind == form and weight and (cell := row[part])]
    return min(found, key=lambda point: point[1].mean, default=None)
