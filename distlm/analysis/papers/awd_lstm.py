"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache.

table.md    every finished model beside the paper's two corpora; where there are several seeds mean ± standard deviation
table.csv   the runs one by one

Δ is against the whole model. The paper's effect "appears" where ours has its sign and two standard errors, and it
"does not appear" where ours has the other sign and as much; else it "cannot be said". A model with one seed is given
the deviation of the whole model's seeds.
"""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_text
from distlm.knnlm.evaluate.records import Results
from distlm.training.finished import RESULT
from distlm.training.records import LmResults

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
_HEAD = (
    "model", "updates", "valid", "test", "Δ valid", "PTB valid", "PTB test", "PTB Δ", "WT2 valid", "WT2 test", "WT2 Δ",
    "the paper's effect",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Perplexities of one model on one split, of each seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n − 1); None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


def write_tables(root: Path) -> str:
    """Write table.md and table.csv of what is finished in `root`; gives the table."""
    runs = {name: _runs(root, name) for name in MODELS}
    path = root / BASE / "results.json"
    if not any(runs.values()) and not path.exists():
        raise nothing_finished(root)
    base = _cell(runs[BASE], "valid")
    rows, raw = [], []
    for name, (words, published) in MODELS.items():
        if not runs[name]:
            continue
        valid, test = (_cell(runs[name], split) for split in ("valid", "test"))
        assert valid is not None and test is not None
        change = valid.mean - base.mean if base else None
        told = "" if name == BASE or published.ptb is None else _verdict(base, valid)
        steps = "/".join(dict.fromkeys(str(run.model.step) for run in runs[name].values()))
        rows.append([words, steps, str(valid), str(test), _number(change), *_of_paper(published), told])
        raw += [
            [label, run.model.step, *(run.splits[split].perplexity for split in ("valid", "test"))]
            for label, run in runs[name].items()
        ]
    if path.exists():
        splits = Results.read(path).splits
        lm = splits["valid"].figures("lm").perplexity
        valid_, test_ = (splits[split].figures("cache").perplexity for split in ("valid", "test"))
        # Against the language model of the same states.
        told = "appears" if valid_ < lm else "does not appear"
        rows.append(
            ["AWD-LSTM + neural cache", "", *map(_number, (valid_, test_, valid_ - lm)), *_of_paper(CACHE), told]
        )
        raw.append(["cache", "", valid_, test_])
    write_csv(root / "table.csv", ("run", "updates", "valid", "test"), raw)
    text = markdown(_HEAD, rows)
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def _runs(root: Path, name: str) -> dict[str, LmResults]:
    """Finished runs of a model: the one of its name, then those of more seeds."""
    seeds = [path.name for path in root.glob(f"{name}-seed*") if re.fullmatch(rf"{name}-seed\d+", path.name)]
    names = [name, *sorted(seeds, key=lambda seed: int(seed.rpartition("seed")[2]))]
    return {one: LmResults.read(root / one / RESULT) for one in names if (root / one / RESULT).exists()}


def _cell(runs: Mapping[str, LmResults], split: str) -> Cell | None:
    return Cell([run.splits[split].perplexity for run in runs.values()]) if runs else None


def _verdict(base: Cell | None, other: Cell) -> str:
    if base is None or base.deviation is None:
        return "cannot be said (one seed)"
    errors = [cell.deviation or base.deviation for cell in (base, other)]
    error = math.hypot(*(one / math.sqrt(len(cell.values)) for one, cell in zip(errors, (base, other), strict=True)))
    change = other.mean - base.mean
    if abs(change) < 2 * error:
        return f"cannot be said (standard error {error:.2f})"
    return "appears" if change > 0 else "does not appear"


def _of_paper(published: Published) -> list[str]:
    """Valid, test and Δ valid of both corpora."""
    cells: list[str] = []
    for corpus in ("ptb", "wikitext2"):
        found, whole = getattr(published, corpus), getattr(MODELS[BASE][1], corpus)
        cells += map(_number, (*found, found[0] - whole[0]) if found else (None,) * 3)
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
