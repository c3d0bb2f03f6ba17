"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache.

table.md    every finished model beside the paper's two corpora; where there are several seeds mean ± standard deviation
table.csv   the runs one by one; lm_valid is the language model's perplexity where the cache was made

Δ is against the whole model. The paper's effect "appears" where ours has its sign and two standard errors, and it
"does not appear" where ours has the other sign and as much; else it "cannot be said". A model with one seed is given
the deviation of the whole model's seeds.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.papers.seeds import Cell, finished_runs
from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import ResultRow, ResultsPath, Verdict
from distlm.analysis.results.verdict import lower
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_text
from distlm.knnlm.evaluate.records import Results

BASE = "awd-lstm"


@dataclass(frozen=True)
class Published:
    """Valid and test perplexity in the paper."""

    ptb: tuple[float, float] | None = None
    """Penn Treebank."""
    wikitext2: tuple[float, float] | None = None


MODELS: Mapping[str, tuple[str, Published]] = {
    BASE: ("AWD-LSTM", Published((60.0, 57.3), (68.6, 65.8))),
    "no-finetuning": ("– fine-tuning", Published((60.7, 58.8), (69.1, 66.0))),
    "halved-sgd": ("– NT-ASGD (the rate halves instead)", Published((66.3, 63.7), (73.3, 69.7))),
    "plain-sgd": ("– NT-ASGD (plain SGD)", Published()),
    "fixed-length": ("– variable sequence lengths", Published((61.3, 58.9), (69.3, 66.2))),
    "no-embedding-dropout": ("– embedding dropout", Published((65.1, 62.7), (71.1, 68.1))),
    "no-weight-decay": ("– weight decay", Published((63.7, 61.0), (71.9, 68.7))),
    "no-ar-tar": ("– AR and TAR", Published((62.7, 60.3), (73.2, 70.1))),
    "full-embedding": ("– embedding narrower than the LSTM", Published((68.0, 65.6), (73.7, 70.7))),
    "no-weight-drop": ("– weight drop", Published((71.1, 68.9), (78.4, 74.9))),
}
"""Run → what it is, and what the paper has (table 4)."""
CACHE = Published((53.9, 52.8), (53.8, 52.0))
"""The whole model with the neural cache (tables 1 and 2)."""
_CACHED = "cache"
PATH: ResultsPath = "AWD-LSTM"
TABLES = {"table.csv": "perplexity of the best checkpoint, run by run"}
NOTES = (
    "Perplexity on valid / test, in brackets valid's distance to the first row, the cache's to the language model of "
    "the same states. The paper's are of WikiText-2.",
)
_HEAD = (
    "model", "updates", "valid", "test", "Δ valid", "PTB valid", "PTB test", "PTB Δ", "WT2 valid", "WT2 test", "WT2 Δ",
    "the paper's effect",
)  # fmt: skip


def write_tables(root: Path) -> str:
    """Write table.md and table.csv of what is finished in `root`; gives the table."""
    raw = [
        [label, run.model.step, *(run.splits[split].perplexity for split in ("valid", "test")), ""]
        for name in MODELS
        for label, run in finished_runs(root, name).items()
    ]
    path = root / BASE / "results.json"
    if not raw and not path.exists():
        raise nothing_finished(root)
    if path.exists():
        splits = Results.read(path).splits
        valid, test = (splits[split].figures("cache").perplexity for split in ("valid", "test"))
        raw.append([_CACHED, "", valid, test, splits["valid"].figures("lm").perplexity])
    write_csv(root / "table.csv", ("run", "updates", "valid", "test", "lm_valid"), raw)
    found = _measured(root)
    base, shown = found.get(BASE), []
    for name, model in found.items():
        words, published = ("AWD-LSTM + neural cache", CACHE) if name == _CACHED else MODELS[name]
        effect = _effect(name, model, base)
        told = (
            "" if effect is None else effect.verdict if effect.error is None else f"{effect.verdict} ({effect.error})"
        )
        shown.append([
            words, "/".join(model.updates), str(model.valid), str(model.test), _number(_change(name, model, base)),
            *_of_paper(published), told,
        ])  # fmt: skip
    text = markdown(_HEAD, shown)
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def rows(root: Path) -> list[ResultRow]:
    """The models of table.csv, and whether each part that is left out costs perplexity on valid as in the paper."""
    found = _measured(root)
    base, made = found.get(BASE), []
    for name, model in found.items():
        words, published = ("AWD-LSTM + neural cache", CACHE) if name == _CACHED else MODELS[name]
        text, numbers = "{:.2f} / {:.2f}", [model.valid.mean, model.test.mean]
        change = _change(name, model, base)
        if change is not None and name != BASE:
            text, numbers = f"{text} ({{:+.2f}})", [*numbers, round(change, 6)]
        if model.valid.deviation is not None:
            text, numbers = f"{text}, ± {{:.2f}} on valid", [*numbers, round(model.valid.deviation, 6)]
        row = ResultRow(words, figure(text, *numbers), 0)
        if published.wikitext2 is not None:
            valid, test = published.wikitext2
            row.paper = figure("{:.1f} / {:.1f}", valid, test)
            if name != BASE:
                row.paper = figure("{:.1f} / {:.1f} ({:+.1f})", valid, test, round(valid - 68.6, 6))
        if (effect := _effect(name, model, base)) is not None:
            row.finding = "the cache lowers it" if name == _CACHED else "without it, it is higher"
            row.verdict = effect.verdict
        made.append(row)
    return made


@dataclass(frozen=True)
class Measured:
    """A model of table.csv."""

    updates: list[str]
    valid: Cell
    test: Cell
    lm_valid: float | None
    """The language model's where a cache was made."""


@dataclass(frozen=True)
class Effect:
    """What leaving a part out says of the paper's finding."""

    verdict: Verdict
    error: str | None
    """Why it cannot be said."""


def _measured(root: Path) -> dict[str, Measured]:
    """By model, in the table's order."""
    lines = lines_of(root / "table.csv")
    found = {}
    for name in [*MODELS, _CACHED]:
        own = [line for line in lines if re.fullmatch(rf"{name}(-seed\d+)?", line["run"])]
        if own:
            valid, test = (Cell([float(line[split]) for line in own]) for split in ("valid", "test"))
            lm = float(own[0]["lm_valid"]) if own[0]["lm_valid"] else None
            found[name] = Measured(list(dict.fromkeys(line["updates"] for line in own)), valid, test, lm)
    return found


def _change(name: str, model: Measured, base: Measured | None) -> float | None:
    """Of the perplexity on valid: of the cache against the language model of the same states."""
    if name == _CACHED:
        return model.valid.mean - model.lm_valid if model.lm_valid is not None else None
    return model.valid.mean - base.valid.mean if base else None


def _effect(name: str, model: Measured, base: Measured | None) -> Effect | None:
    """None where the paper has nothing of the kind."""
    if name == _CACHED:
        return None if model.lm_valid is None else Effect(lower(model.valid.mean, model.lm_valid), None)
    if name == BASE or base is None or MODELS[name][1].ptb is None:
        return None
    if base.valid.deviation is None:
        return Effect("cannot be said", "one seed")
    cells = (base.valid, model.valid)
    error = math.hypot(*((cell.deviation or base.valid.deviation) / math.sqrt(len(cell.values)) for cell in cells))
    change = model.valid.mean - base.valid.mean
    if abs(change) < 2 * error:
        return Effect("cannot be said", f"standard error {error:.2f}")
    return Effect("appears" if change > 0 else "does not appear", None)


def _of_paper(published: Published) -> list[str]:
    """Valid, test and Δ valid of both corpora."""
    cells: list[str] = []
    for corpus in ("ptb", "wikitext2"):
        found, whole = getattr(published, corpus), getattr(MODELS[BASE][1], corpus)
        cells += map(_number, (*found, found[0] - whole[0]) if found else (None,) * 3)
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
