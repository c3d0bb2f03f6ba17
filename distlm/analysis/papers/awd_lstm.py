"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache.

table.md    every finished model beside the paper's two corpora; where there are several seeds mean ± standard deviation
table.csv   the runs one by one; lm_valid is the language model's perplexity where the cache was made

Δ is against the whole model, seed by seed, over the seeds that both have. The paper's effect "appears" where ours has
its sign and is further from 0 than half of its 95 % interval (Student's t for the number of seeds), and it "does not
appear" where ours has the other sign and is as far; else it "cannot be said". Where one seed alone is common, the error
is that of two independent runs with the deviation of the whole model's seeds, whose number then decides t; it is marked
as borrowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.papers.seeds import BY_T, Cell, Difference, finished_runs, model_and_seed
from distlm.analysis.processor import PROCESSOR_TABLE, processor_rows, write_processor_time
from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import ResultRow, ResultsPath, Verdict
from distlm.analysis.results.verdict import lower
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_text
from distlm.knnlm.evaluate.records import Results
from distlm.runtime.metrics import resolve
from distlm.runtime.rundir import RunDir

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
_SGD = "sgd"
"""The phase before the trigger, as metrics.jsonl names it."""
PATH: ResultsPath = "AWD-LSTM"
TABLES = {
    "table.csv": "perplexity of the best checkpoint, run by run",
    PROCESSOR_TABLE: "processor time, all starts of a run together",
}
NOTES = (
    "Perplexity on valid / test, in brackets valid's distance to the first row, seed by seed, ± its standard error; "
    "of one seed alone that of two independent runs. The cache's distance is to the language model of the same states. "
    "The paper's are of WikiText-2.",
)
RULE = (
    "Δ: seed by seed, over the seeds that both have. Trigger epoch: at whose end NT-ASGD's trigger fired first. An "
    f"effect appears where Δ is above 0 by more than {BY_T}. A borrowed standard error is of two independent runs with "
    "the deviation of the whole model's seeds, whose number then counts."
)
_HEAD = (
    "model", "updates", "trigger epoch", "valid", "test", "Δ valid", "PTB valid", "PTB test", "PTB Δ", "WT2 valid",
    "WT2 test", "WT2 Δ", "the paper's effect",
)  # fmt: skip


def write_tables(root: Path) -> str:
    """Write table.md and table.csv of what is finished in `root`; gives the table."""
    raw = [
        [
            label,
            run.model.step,
            *(run.splits[split].perplexity for split in ("valid", "test")),
            "",
            _trigger_epoch(root / label) or "",
        ]
        for name in MODELS
        for label, run in finished_runs(root, name).items()
    ]
    path = root / BASE / "results.json"
    if not raw and not path.exists():
        raise nothing_finished(root)
    if path.exists():
        splits = Results.read(path).splits
        valid, test = (splits[split].figures("cache").perplexity for split in ("valid", "test"))
        raw.append([_CACHED, "", valid, test, splits["valid"].figures("lm").perplexity, ""])
    write_csv(root / "table.csv", ("run", "updates", "valid", "test", "lm_valid", "trigger_epoch"), raw)
    write_processor_time(root)
    found = _measured(root)
    base, shown = found.get(BASE), []
    for name, model in found.items():
        words, published = ("AWD-LSTM + neural cache", CACHE) if name == _CACHED else MODELS[name]
        change = _change(name, model, base)
        shown.append([
            words, "/".join(model.updates), "/".join(model.triggered), str(model.valid), str(model.test),
            "" if change is None else f"{change.mean:.2f}", *_of_paper(published), _told(name, model, change),
        ])  # fmt: skip
    text = f"{markdown(_HEAD, shown)}\n\n{RULE}"
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def rows(root: Path) -> list[ResultRow]:
    """The models of table.csv, and whether each part that is left out costs perplexity on valid as in the paper; then
    the processor time."""
    found = _measured(root)
    base, made = found.get(BASE), []
    for name, model in found.items():
        words, published = ("AWD-LSTM + neural cache", CACHE) if name == _CACHED else MODELS[name]
        text, numbers = "{:.2f} / {:.2f}", [model.valid.mean, model.test.mean]
        change = _change(name, model, base)
        if change is not None and name != BASE:
            of_error = [] if change.error is None else [round(change.error, 6)]
            apart = "{:+.2f} ± {:.2f}" if of_error else "{:+.2f}"
            text, numbers = f"{text} ({apart})", [*numbers, round(change.mean, 6), *of_error]
        if model.valid.deviation is not None:
            text, numbers = f"{text}, ± {{:.2f}} on valid", [*numbers, round(model.valid.deviation, 6)]
        row = ResultRow(words, figure(text, *numbers), 0)
        if published.wikitext2 is not None:
            valid, test = published.wikitext2
            row.paper = figure("{:.1f} / {:.1f}", valid, test)
            if name != BASE:
                row.paper = figure("{:.1f} / {:.1f} ({:+.1f})", valid, test, round(valid - 68.6, 6))
        if (verdict := _verdict(name, model, change)) is not None:
            row.finding = "the cache lowers it" if name == _CACHED else "without it, it is higher"
            row.verdict = verdict
        made.append(row)
    return [*made, *processor_rows(root)]


@dataclass(frozen=True)
class Measured:
    """A model of table.csv."""

    updates: list[str]
    triggered: list[str]
    """Epochs at whose end the trigger fired first, of its runs."""
    by_seed: Mapping[str, float]
    """Perplexity on valid, by the seed in words."""
    test: Cell
    lm_valid: float | None
    """The language model's where a cache was made."""

    @property
    def valid(self) -> Cell:
        """Perplexity on valid."""
        return Cell([*self.by_seed.values()])


def _measured(root: Path) -> dict[str, Measured]:
    """By model, in the table's order."""
    lines = lines_of(root / "table.csv")
    found = {}
    for name in [*MODELS, _CACHED]:
        own = [line for line in lines if model_and_seed(line["run"])[0] == name]
        if own:
            updates, triggered = (
                list(dict.fromkeys(line[column] for line in own if line[column]))
                for column in ("updates", "trigger_epoch")
            )
            by_seed = {model_and_seed(line["run"])[1]: float(line["valid"]) for line in own}
            lm = float(own[0]["lm_valid"]) if own[0]["lm_valid"] else None
            found[name] = Measured(updates, triggered, by_seed, Cell([float(line["test"]) for line in own]), lm)
    return found


def _trigger_epoch(folder: Path) -> int | None:
    """At whose end the trigger fired first, outside of fine-tuning; None where it never did."""
    for line in resolve(RunDir(folder).metrics.read("train")):
        if line.values.get("train/phase") == _SGD and line.values.get("trigger/fired"):
            epoch = line.number("train/epoch")
            return None if epoch is None else int(epoch)
    return None


def _change(name: str, model: Measured, base: Measured | None) -> Difference | None:
    """Of the perplexity on valid: of the cache against the language model of the same states."""
    if name == _CACHED:
        return None if model.lm_valid is None else Difference(model.valid.mean - model.lm_valid, None, borrowed=False)
    return Difference.between(model.by_seed, base.by_seed, base.valid) if base else None


def _verdict(name: str, model: Measured, change: Difference | None) -> Verdict | None:
    """None where the paper has nothing of the kind."""
    if name == _CACHED:
        return None if model.lm_valid is None else lower(model.valid.mean, model.lm_valid)
    return None if change is None or name == BASE or MODELS[name][1].ptb is None else change.rises()


def _told(name: str, model: Measured, change: Difference | None) -> str:
    """The verdict, and by which error."""
    verdict = _verdict(name, model, change)
    if verdict is None or change is None:
        return ""
    if name == _CACHED:
        return verdict
    if change.error is None:
        return f"{verdict} (one seed)"
    return f"{verdict} (standard error {change.error:.2f}{', borrowed' if change.borrowed else ''})"


def _of_paper(published: Published) -> list[str]:
    """Valid, test and Δ valid of both corpora."""
    cells: list[str] = []
    for corpus in ("ptb", "wikitext2"):
        found, whole = getattr(published, corpus), getattr(MODELS[BASE][1], corpus)
        cells += map(_number, (*found, found[0] - whole[0]) if found else (None,) * 3)
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
