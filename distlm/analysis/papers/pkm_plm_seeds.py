"""The models of `distlm reproduce pkm-plm` over several seeds, from its CSV files, and what that says of Kim & Jung's
findings about use: ResM is used better than PKM, and starting from a dense model (Init) prevents drift.

A finding appears where the means of two models are further apart than half of the 95 % interval of their difference
(Welch's t), in every layer; seeds.csv has the means.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from distlm.analysis.papers.pkm_plm_models import MODELS, TOP1_MU
from distlm.analysis.papers.seeds import Cell, Difference, model_and_seed, numbers_of, place_of
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import ResultRow
from distlm.analysis.results.verdict import together
from distlm.analysis.tables import markdown, write_csv, write_text

_Cells = dict[tuple[str, str, str], Cell]
"""(model, measure, layer or empty) → its figures."""
_READ_LAST, _WRITTEN_LAST = "read first in the last fifth", "written in the last fifth"
_PERPLEXITY = " perplexity"
_USE = {"top1_mu": "top-1 MU", "mu": "MU", "kl_u": "KL_u", "kl_w": "KL_w"}
_SHARES = ("top-1 MU", "MU", _READ_LAST, _WRITTEN_LAST)
"""Measures in %."""
_OF_TASK = "SST-2 "
"""Before a measure of a model that was fine-tuned on it."""


@dataclass(frozen=True)
class _Finding:
    """What the paper says of two models."""

    measure: str
    own: str
    other: str
    rises: bool
    """Whether `own` has the higher figure."""
    words: str
    paper: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Of `own` and `other` in layers 4 and 8; None where our copy of the paper has no legible figures."""


_PKM, _RESM, _INIT_PKM, _INIT_RESM = (TOP1_MU[model] for model in ("pkm", "resm", "init-pkm", "init-resm"))
_FINDINGS = (
    _Finding("top-1 MU", "init-resm", "pkm", True, "ResM after Init uses more slots than PKM", (_INIT_RESM, _PKM)),
    _Finding("top-1 MU", "resm", "pkm", True, "ResM is used better than PKM", (_RESM, _PKM)),
    _Finding("KL_u", "resm", "pkm", False, "ResM reads more evenly than PKM", ((1.50, 0.71), (1.62, 0.89))),
    _Finding("top-1 MU", "init-pkm", "pkm", True, "Init prevents drift: more slots stay in use", (_INIT_PKM, _PKM)),
    _Finding("top-1 MU", "init-resm", "resm", True, "the same", (_INIT_RESM, _RESM)),
    _Finding("KL_u", "init-resm", "pkm", False, "ResM after Init reads more evenly", ((0.45, 0.46), (1.62, 0.89))),
    _Finding(_READ_LAST, "init-pkm", "pkm", True, "Init prevents staleness (figure 2)"),
    _Finding(_READ_LAST, "init-resm", "pkm", True, "ResM after Init prevents staleness (figure 2)"),
    _Finding(_OF_TASK + "top-1 MU", "init-resm", "pkm", True, "after fine-tuning, too, more slots are used (table 6)"),
    _Finding(_OF_TASK + "KL", "init-resm", "pkm", True, "the two labels use other slots more often (figure 4)"),
    _Finding(_OF_TASK + "IOU", "init-resm", "pkm", False, "the two labels use other slots more often (figure 4)"),
)  # fmt: skip


def write_seeds(root: Path) -> str:
    """Write seeds.csv and seeds.md where a model has several seeds; the table as text, empty where none has."""
    found = _cells(root)
    if not any(len(cell.values) > 1 for cell in found.values()):
        return ""
    write_csv(
        root / "seeds.csv", ["model", "measure", "layer", "seeds", "mean", "standard_error"],
        [[*key, len(cell.values), cell.mean, "" if cell.error is None else cell.error] for key, cell in found.items()],
    )  # fmt: skip
    measures = list(dict.fromkeys(measure for _, measure, _ in found))
    rows = []
    for model in dict.fromkeys(model for model, _, _ in found):
        of_model = {key[1:]: cell for key, cell in found.items() if key[0] == model}
        seeds = max(len(cell.values) for cell in of_model.values())
        columns = ([cell for (name, _), cell in of_model.items() if name == measure] for measure in measures)
        rows.append([MODELS[model], str(seeds), *(" / ".join(map(_told, cells)) for cells in columns)])
    head = ["model", "seeds", *(f"{name} %" if name.removeprefix(_OF_TASK) in _SHARES else name for name in measures)]
    text = f"{markdown(head, rows)}\n\nMean ± standard error over the seeds, layer by layer."
    write_text(root / "seeds.md", text)
    return text


def seed_rows(root: Path) -> list[ResultRow]:
    """The paper's findings about use, where models have several seeds; empty where none has."""
    found = _cells(root)
    if not any(len(cell.values) > 1 for cell in found.values()):
        return []
    where = _where(root)
    made = []
    for finding in _FINDINGS:
        own, other = (_layers(found, model, finding.measure) for model in (finding.own, finding.other))
        if not own or own.keys() != other.keys():
            continue
        pairs = [(own[layer], other[layer]) for layer in own]
        made.append(_row(finding, pairs, where if finding.measure in _USE.values() else ""))
    return made


def _row(finding: _Finding, pairs: list[tuple[Cell, Cell]], where: str) -> ResultRow:
    unit = " %" if finding.measure.removeprefix(_OF_TASK) in _SHARES else ""
    differences = [Difference.of_means(*pair) for pair in pairs]
    sides = list(zip(*pairs, strict=True))
    cells = [cell for side in sides for cell in side]
    texts = [" / ".join(map(place_of, side)) + unit for side in sides]
    shown = f"{texts[0]} ({texts[1]})"
    figures = [round(number, 6) for cell in cells for number in numbers_of(cell)]
    # Of equal figures of both seeds the error is 0, and no multiple of it says anything.
    if all(found.error for found in differences):
        apart = [found.mean / (found.error or 1) for found in differences]
        shown += f"; {' / '.join('{:+.1f}' for _ in apart)} standard errors apart"
        figures += [round(each, 6) for each in apart]
    what = f"{finding.measure}{where}, layer by layer, of {MODELS[finding.own]} (and {MODELS[finding.other]})"
    row = ResultRow(what, figure(shown, *figures), 0)
    if finding.paper:
        layers = [" / ".join("{:g}" for _ in side) + unit for side in finding.paper]
        row.paper = figure(f"{layers[0]} ({layers[1]})", *(number for side in finding.paper for number in side))
    row.finding = finding.words
    row.verdict = together(found.rises() if finding.rises else found.falls() for found in differences)
    return row


def _cells(root: Path) -> _Cells:
    values: dict[tuple[str, str, str], list[float]] = {}
    for run, measure, layer, value in [*_pretrained(root), *_last_used(root), *_finetuned(root)]:
        values.setdefault((model_and_seed(run)[0], measure, layer), []).append(value)
    return {key: Cell(found) for key, found in values.items()}


_Value = tuple[str, str, str, float]
"""Run, measure, layer, and its figure, a share in %."""


def _pretrained(root: Path) -> Iterator[_Value]:
    """Table 2: perplexities of each text, use on the last text of each run."""
    lines = lines_of(root / "pretraining.csv")
    names = list(lines[0]) if lines else []
    texts = names[2 : names.index("layer")] if lines else []
    for run, of_run in groupby(lines, lambda line: line["run"]):
        own = list(of_run)
        yield from ((run, text + _PERPLEXITY, "", float(own[0][text])) for text in texts if own[0][text])
        yield from ((run, *value) for line in own if line["layer"] for value in _use(line))


def _use(line: dict[str, str]) -> Iterator[tuple[str, str, float]]:
    for name, words in _USE.items():
        if line[name]:
            yield words, line["layer"], percent(line[name]) if words in _SHARES else float(line[name])


def _last_used(root: Path) -> Iterator[_Value]:
    """Figure 2: the newest of its groups, of all slots."""
    for (run, layer), of_memory in groupby(lines_of(root / "staleness.csv"), lambda line: (line["run"], line["layer"])):
        own = list(of_memory)
        for name, words in (("slots", _READ_LAST), ("written", _WRITTEN_LAST)):
            if counts := [float(line[name]) for line in own if line[name]]:
                yield run, words, layer, percent(counts[-1] / sum(counts))


def _finetuned(root: Path) -> Iterator[_Value]:
    """Table 6 and figure 4, after fine-tuning with updated values."""
    task = _OF_TASK.strip()
    for line in _named(lines_of(root / "usage.csv"), task):
        if line["memory"] == "updated":
            yield from ((line["run"], _OF_TASK + words, layer, value) for words, layer, value in _use(line))
    for line in _named(lines_of(root / "classes.csv"), task):
        if line["after"]:
            yield line["run"], _OF_TASK + line["measure"].upper(), line["layer"], float(line["after"])


def _named(lines: Iterable[dict[str, str]], name: str) -> list[dict[str, str]]:
    """A fine-tuning with a name of its own is another one."""
    return [line for line in lines if line["name"] == name]


def _layers(found: _Cells, model: str, measure: str) -> dict[str, Cell]:
    return {layer: cell for (own, name, layer), cell in found.items() if (own, name) == (model, measure)}


def _where(root: Path) -> str:
    """The text of the last run's use, and the reads of a slot there."""
    of_use = [line for line in lines_of(root / "pretraining.csv") if line["use_on"]]
    if not of_use:
        return ""
    last = of_use[-1]
    reads = f" ({float(last['reads_a_slot']):.2f} first reads a slot)" if last["reads_a_slot"] else ""
    return f" on {last['use_on']}{reads}"


def _told(cell: Cell) -> str:
    return place_of(cell).format(*numbers_of(cell))
