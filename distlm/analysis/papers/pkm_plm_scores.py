"""Scores after fine-tuning, of which Kim & Jung (2020) say that a memory raises them and frozen values lower them
(tables 4 and 5).

A finding is said where the difference is further from 0 than half of its 95 % interval over the rows of dev, and, of
several seeds, over these, too: over those of the pretraining where there are several, else those of the fine-tuning.
compared.csv has the differences.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distlm.analysis.papers.pkm_plm_models import words_of
from distlm.analysis.papers.seeds import Difference, model_and_seed
from distlm.analysis.results.dev_scores import dev_rows, dev_terms, paired_error, score_error
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import ResultRow
from distlm.analysis.results.verdict import together
from distlm.analysis.tables import write_csv
from distlm.finetune.records import FinetuneResults

COMPARED = "compared.csv"
"""In the experiment's folder."""
_HEAD = (
    "task", "metric", "own", "own_memory", "own_score", "other", "other_memory", "other_score", "best_single_answer",
    "difference", "rows", "rows_error", "row_by_row", "seeds", "seeds_error",
)  # fmt: skip


class _Paper(NamedTuple):
    """In %, on dev: of MNLI the matched set, of SQuAD F1."""

    dense: float
    """Model (a)."""
    longer: float
    """Model (b), dense with as many updates as those with memory."""
    updated: float
    """Model (f), +Init +ResM."""
    frozen: float | None = None


_PAPER = {
    "SST-2": _Paper(92.8, 92.4, 94.0, 93.3), "CoLA": _Paper(60.8, 61.4, 64.1, 61.6),
    "MNLI": _Paper(84.3, 84.8, 86.0, 85.8), "QQP": _Paper(91.0, 91.2, 91.4), "QNLI": _Paper(89.3, 89.2, 90.4),
    "SQuAD": _Paper(89.8, 90.1, 90.8, 90.8),
}  # fmt: skip
_BEST = "init-resm"
_DENSE = {"init": "dense, as long again", "dense": "dense"}
"""What the best model is compared with: the first one that there is."""


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning with its results.json."""

    run: str
    folder: Path
    results: FinetuneResults

    @property
    def task(self) -> str:
        return self.results.task

    @property
    def memory(self) -> str:
        """`updated`, `frozen`, or empty for a model without memory."""
        return self.results.memory_values or ""

    @property
    def usual(self) -> bool:
        """Whether it has the name that the task gives it, and not one of its own (finetune.name)."""
        return self.results.name == self.task + ("-frozen" if self.memory == "frozen" else "")

    @property
    def model(self) -> str:
        """What tells it from the run's other fine-tunings on the task: the model, with the fine-tuning's name where
        that is its own."""
        return words_of(self.run) + ("" if self.usual else f" ({self.results.name})")

    @property
    def scores(self) -> dict[str, float]:
        """Seed of the fine-tuning → the task's metric on dev after the last epoch."""
        return {seed: found.last[self.results.metric] for seed, found in self.results.seeds.items()}


_Seeds = Mapping[str, Finetuning]
"""Seed of the pretraining, in words → its fine-tuning."""


def write_compared(root: Path, found: Iterable[Finetuning]) -> None:
    """Write compared.csv, of the fine-tunings with their task's name; nothing where there are no two to compare.

    Scores in %: medians over the seeds of the fine-tuning, of several seeds of the pretraining their mean. Raises
    DistlmError for predictions that are damaged.
    """
    of_task: dict[str, dict[tuple[str, str], dict[str, Finetuning]]] = {}
    for each in found:
        if each.usual:
            model, seed = model_and_seed(each.run)
            of_task.setdefault(each.task, {}).setdefault((model, each.memory), {})[seed] = each
    lines = [line for models in of_task.values() for line in _lines(models)]
    if lines:
        write_csv(root / COMPARED, _HEAD, lines)


def score_rows(root: Path) -> list[ResultRow]:
    """Whether a memory raises the score and frozen values lower it, task by task, from compared.csv."""
    made = []
    for line in lines_of(root / COMPARED):
        paper = _PAPER.get(line["task"])
        own, other, best = (float(line[name]) for name in ("own_score", "other_score", "best_single_answer"))
        what = f"{line['task']} on dev, +Init +ResM, values"
        differences = [Difference(
            float(line["difference"]), float(line["rows_error"]), borrowed=False, degrees=int(line["rows"]) - 1
        )]  # fmt: skip
        told = "{:+.1f} ± {:.1f} " + ("row by row" if line["row_by_row"] == "yes" else "by the rows")
        if line["seeds_error"]:
            seeds = int(line["seeds"])
            differences.append(Difference(
                float(line["difference"]), float(line["seeds_error"]), borrowed=False, degrees=seeds - 1
            ))  # fmt: skip
            told += f", ± {{:.1f}} by {seeds} seeds"
        numbers = [differences[0].mean, *(found.error or 0.0 for found in differences)]
        if line["other_memory"] == "frozen":
            row = ResultRow(
                f"{what} frozen (and updated)", figure(f"{{:.1f}} ({{:.1f}}); updated {told}", other, own, *numbers), 0
            )
            row.finding = "frozen values score less"
            if paper and paper.frozen is not None:
                row.paper = figure("{:.1f} ({:.1f})", paper.frozen, paper.updated)
        else:
            row = ResultRow(
                f"{what} updated (and {_DENSE[line['other']]}; best single answer)",
                figure(f"{{:.1f}} ({{:.1f}}; {{:.1f}}); {told}", own, other, best, *numbers), 0,
            )  # fmt: skip
            row.finding = "a memory raises the score"
            if paper:
                dense = paper.longer if line["other"] == "init" else paper.dense
                row.paper = figure("{:.1f} ({:.1f})", paper.updated, dense)
        row.verdict = together(found.rises() for found in differences)
        made.append(row)
    return made


def _lines(models: Mapping[tuple[str, str], _Seeds]) -> Iterator[list[object]]:
    """Of one task: the best model beside a dense one, and with its values frozen."""
    own = models.get((_BEST, "updated"))
    dense = next(((name, "") for name in _DENSE if (name, "") in models), None)
    for other in (dense, (_BEST, "frozen")):
        if own and other and other in models and (line := _line(own, other, models[other])):
            yield line


def _line(own: _Seeds, other: tuple[str, str], against: _Seeds) -> list[object] | None:
    """None where they have no seed in common, and of a single row."""
    pairs = [
        (pretraining, seed)
        for pretraining in own if pretraining in against
        for seed in own[pretraining].scores if seed in against[pretraining].scores
    ]  # fmt: skip
    results = next(iter(own.values())).results
    rows = dev_rows(results)
    if not pairs or rows < 2:
        return None
    apart = {pair: _score(own, pair) - _score(against, pair) for pair in pairs}
    by_seed = _by_seed(apart)
    paired = _paired(own, against, pairs)
    error = paired
    if error is None:
        sides = (statistics.fmean(_score(side, pair) for pair in pairs) for side in (own, against))
        errors = [score_error(results.metric, score, rows) for score in sides]
        error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    difference = Difference.between(by_seed, dict.fromkeys(by_seed, 0.0))
    assert difference is not None
    return [
        results.task, results.metric, _BEST, "updated", _median(own, pairs), *other, _median(against, pairs),
        percent(results.majority[results.metric]), percent(difference.mean), rows, percent(error),
        "no" if paired is None else "yes", len(by_seed),
        "" if difference.error is None else percent(difference.error),
    ]  # fmt: skip


def _score(side: _Seeds, pair: tuple[str, str]) -> float:
    pretraining, seed = pair
    return side[pretraining].scores[seed]


def _median(side: _Seeds, pairs: Iterable[tuple[str, str]]) -> float:
    """In %: of each pretraining over all seeds of its fine-tuning, as the paper has it; then their mean."""
    pretrainings = dict.fromkeys(pretraining for pretraining, _ in pairs)
    return percent(statistics.fmean(statistics.median(side[one].scores.values()) for one in pretrainings))


def _by_seed(apart: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Of several pretrainings one mean difference each, else of every seed of the fine-tuning."""
    pretrainings = dict.fromkeys(pretraining for pretraining, _ in apart)
    if len(pretrainings) == 1:
        return {seed: value for (_, seed), value in apart.items()}
    return {
        one: statistics.fmean(value for (pretraining, _), value in apart.items() if pretraining == one)
        for one in pretrainings
    }


def _paired(own: _Seeds, against: _Seeds, pairs: Sequence[tuple[str, str]]) -> float | None:
    """Standard error of the mean difference row by row; None where the rows of one of the models are not known."""
    sides = []
    for side in (own, against):
        terms = [dev_terms(side[one].folder, side[one].results, seed) for one, seed in pairs]
        known = [each for each in terms if each is not None]
        if len(known) < len(terms):
            return None
        sides.append(known)
    counts = {len(each) for known in sides for each in known}
    return paired_error(*sides) if len(counts) == 1 else None
