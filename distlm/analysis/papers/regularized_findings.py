"""What the runs of `distlm reproduce regularized-knnlm` say of the findings of Ton et al. (2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distlm.analysis.papers.regularized_runs import FORMS, MEASURES, Run
from distlm.analysis.papers.seeds import BY_T, Cell, Difference
from distlm.analysis.results.from_csv import figure
from distlm.analysis.results.records import Figure, ResultRow, Verdict
from distlm.analysis.results.verdict import MARGIN, similar

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
    "The best ω > 0 is the one that is best on valid, and is judged on test where that has neighbours. A finding "
    f"appears where the differences seed by seed gain more than {BY_T}, and does not where they lose as much. Two "
    "forms are similar where they are within 1 % by as much. Of one seed the error is borrowed: that of two "
    "independent runs with the deviation of ω = 0, whose seeds then count. Without one nothing can be said."
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


def findings(runs: Sequence[Run], edition: str | None) -> list[ResultRow]:
    """Whether some ω > 0 gives the best kNN-LM, of every form at each choice of λ and T, and whether queues (eq. 1) and
    L2 (eq. 2) are alike. The paper's figures are of the edition that the runs are of, else of WikiText-2."""
    text = edition if edition and edition in PUBLISHED else "WikiText-2"
    of_text = PUBLISHED[text]
    published = {L2: (min(of_text[weight][2] for weight in of_text if weight), of_text[0][2])}
    if text == "WikiText-2":
        published[QUEUE] = QUEUES
    made = []
    for form in dict.fromkeys(run.form for run in runs):
        for part in list(PARTS)[1:]:
            weight = _best(runs, form, part)
            pair = None if weight is None else _compared(runs, part, (form, weight), (L2, 0.0))
            if weight is None or pair is None:
                continue
            what = f"{FORMS[form]}, {PARTS[part]}, {pair.split}: the best ω > 0, {weight:g} (and ω = 0)"
            row = ResultRow(what, pair.shown(beside=True), 0)
            row.finding, row.verdict = "some ω > 0 is best", pair.apart.falls()
            if form in published:
                row.paper = figure(f"{text} valid {{}} ({{}})", *published[form])
            made.append(row)
    for part in list(PARTS)[1:]:
        queue, squares = _best(runs, QUEUE, part), _best(runs, L2, part)
        pair = None if queue is None or squares is None else _compared(runs, part, (QUEUE, queue), (L2, squares))
        if pair is None:
            continue
        what = f"queues and L2, {PARTS[part]}, {pair.split}: the best ω > 0, {queue:g} and {squares:g}"
        row = ResultRow(what, pair.shown(beside=False), 0)
        row.finding, row.verdict = "eq. 1 and eq. 2 give similar perplexities", pair.alike()
        if QUEUE in published:
            row.paper = figure(f"{text} valid {{}}, {{}}", published[QUEUE][0], published[L2][0])
        made.append(row)
    return made


@dataclass(frozen=True)
class _Pair:
    """Two forms and weights on one split."""

    split: str
    own: Cell
    other: Cell
    apart: Difference

    def shown(self, beside: bool) -> Figure:
        """Both, the second in brackets where the first one stands beside it; then how far they are apart."""
        both = shown([self.own], [self.other]) if beside else shown([self.own, self.other])
        mean, error = self.apart.mean, self.apart.error
        told = "; seed by seed {:+.2f}" + ("" if error is None else " ± {:.2f}")
        told += " (borrowed)" if self.apart.borrowed else ""
        return figure(both.shown + told, *both.numbers, mean, *([] if error is None else [error]))

    def alike(self) -> Verdict:
        """Whether they are within 1 % of each other."""
        half = self.apart.half
        return "cannot be said" if half is None else similar(self.apart.mean, half, MARGIN * self.other.mean)


def _compared(runs: Sequence[Run], part: str, own: tuple[str, float], other: tuple[str, float]) -> _Pair | None:
    """On test where both have it, else on valid; None where they have no seed in common. The deviation of ω = 0 is that
    of L2, which is then every form's."""
    for split, measure in (("test", f"{part}_test"), ("valid", part)):
        first, second, plain = (_by_seed(runs, key, measure) for key in (own, other, (L2, 0.0)))
        apart = Difference.between(first, second, Cell.of(plain.values()))
        if apart is not None:
            return _Pair(split, Cell([*first.values()]), Cell([*second.values()]), apart)
    return None


def _by_seed(runs: Sequence[Run], key: tuple[str, float], measure: str) -> dict[str, float]:
    """Of a form and ω: seed → figure, of those that have one."""
    found = {str(run.seed): run.measures[measure] for run in runs if (run.form, run.weight) == key}
    return {seed: value for seed, value in found.items() if value is not None}


def shown(cells: Sequence[Cell], beside: Sequence[Cell] = ()) -> Figure:
    """Values, and in brackets those that they stand beside."""
    numbers = [number for cell in (*cells, *beside) for number in (cell.mean, cell.deviation) if number is not None]
    texts = [["{:.2f}" if cell.deviation is None else "{:.2f} ± {:.2f}" for cell in group] for group in (cells, beside)]
    return figure(", ".join(texts[0]) + (f" ({', '.join(texts[1])})" if beside else ""), *numbers)


def _best(runs: Sequence[Run], form: str, part: str) -> float | None:
    """ω > 0 with the lowest mean on valid."""
    weights = dict.fromkeys(run.weight for run in runs if run.form == form and run.weight)
    means = {
        weight: Cell([*found.values()]).mean for weight in weights if (found := _by_seed(runs, (form, weight), part))
    }
    return min(means, key=lambda weight: means[weight], default=None)
