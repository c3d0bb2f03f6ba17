"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache.

table.md    every finished model beside the paper's two corpora; where there are several seeds mean ± standard deviation
table.csv   the runs one by one; lm_valid is the language model's perplexity where the cache was made

Δ is against the whole model, seed by seed, over the seeds that both have. The paper's effect "appears" where ours has
its sign and is further from 0 than half of its 95 % interval (Student's t for the number of seeds), and it "does not
appear" where ours has the other sign and is as far; else it "cannot be said". Where one seed alone is common, the error
is that of two independent runs with the deviation of the whole model's seeds, whose number then decides t; it is marked
as borrowed.

results.json has the paper's figures of the corpus that the runs have, WikiText-2 where it is neither. Of runs with the
settings of the authors' README (recipes `-released`) it has the README's figures where there are any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.against_recipe import against_recipe
from distlm.analysis.papers.seeds import BY_T, Cell, Difference, finished_runs, model_and_seed
from distlm.analysis.processor import PROCESSOR_TABLE, processor_rows, write_processor_time
from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import Figure, ResultRow, ResultsPath, Verdict
from distlm.analysis.results.verdict import lower
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_text
from distlm.config.yaml_files import recorded_settings
from distlm.data.records import TokensMeta
from distlm.data.tokens import META
from distlm.knnlm.evaluate.records import Results
from distlm.runtime.metrics import resolve
from distlm.runtime.rundir import RunDir

BASE = "awd-lstm"


@dataclass(frozen=True)
class Published:
    """Valid and test perplexity as somebody else has them."""

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
README: Mapping[str, Published] = {
    BASE: Published((58.8, 56.5), (67.4, 64.7)),
    "no-finetuning": Published((61.2, 58.8), (68.7, 65.6)),
    _CACHED: Published((53.2, 52.5), (52.2, 50.6)),
}
"""The README of the authors' code, with other settings than the paper's."""
_CORPORA = {"Penn Treebank": "ptb", "WikiText-2": "wikitext2"}
"""Edition → field of Published."""
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
    "README: the figures of the authors' code, of the recipes `-released`; it has none for the other parts, whose "
    "figures are the paper's, with its settings.",
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
            run.splits["valid"].perplexity,
            # knn.splits may have valid alone.
            run.splits["test"].perplexity if "test" in run.splits else "",
            "",
            _trigger_epoch(root / label) or "",
        ]
        for name in MODELS
        for label, run in finished_runs(root, name).items()
        if "valid" in run.splits
    ]
    path = root / BASE / "results.json"
    splits = Results.read(path).splits if path.exists() else {}
    if "valid" in splits:
        valid, lm = (splits["valid"].figures(part).perplexity for part in ("cache", "lm"))
        test = splits["test"].figures("cache").perplexity if "test" in splits else ""
        raw.append([_CACHED, "", valid, test, lm, ""])
    if not raw:
        raise nothing_finished(root)
    write_csv(root / "table.csv", ("run", "updates", "valid", "test", "lm_valid", "trigger_epoch"), raw)
    write_processor_time(root)
    found = _measured(root)
    base, shown = found.get(BASE), []
    for name, model in found.items():
        words, published = ("AWD-LSTM + neural cache", CACHE) if name == _CACHED else MODELS[name]
        change = _change(name, model, base)
        shown.append([
            words, "/".join(model.updates), "/".join(model.triggered), str(model.valid), str(model.test or ""),
            "" if change is None else f"{change.mean:.2f}", *_of_paper(published), _told(name, model, change),
        ])  # fmt: skip
    text = f"{markdown(_HEAD, shown)}\n\n{RULE}"
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def rows(root: Path) -> list[ResultRow]:
    """The models of table.csv, and whether each part that is left out costs perplexity on valid as in the paper; then
    the processor time."""
    found, corpus = _measured(root), _corpus(root)
    base, made = found.get(BASE), []
    for name, model in found.items():
        text, numbers = "{:.2f} / –", [model.valid.mean]
        if model.test is not None:
            text, numbers = "{:.2f} / {:.2f}", [*numbers, model.test.mean]
        change = _change(name, model, base)
        if change is not None and name != BASE:
            of_error = [] if change.error is None else [round(change.error, 6)]
            apart = "{:+.2f} ± {:.2f}" if of_error else "{:+.2f}"
            text, numbers = f"{text} ({apart})", [*numbers, round(change.mean, 6), *of_error]
        if model.valid.deviation is not None:
            text, numbers = f"{text}, ± {{:.2f}} on valid", [*numbers, round(model.valid.deviation, 6)]
        row = ResultRow("AWD-LSTM + neural cache" if name == _CACHED else MODELS[name][0], figure(text, *numbers), 0)
        if (published := _published(root, name, corpus)) is not None:
            row.paper = published
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
    test: Cell | None
    """Perplexity on test, where it was measured."""
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
            test = Cell.of(float(line["test"]) if line["test"] else None for line in own)
            found[name] = Measured(updates, triggered, by_seed, test, lm)
    return found


def _corpus(root: Path) -> str:
    """The paper's corpus that the runs have, WikiText-2 where it is neither. The run `words` has all of the text."""
    paths = (root / run / "tokens" / META for run in ("words", "tokens"))
    found = next((TokensMeta.read(path).edition for path in paths if path.exists()), None)
    return found.name if found and found.name in _CORPORA else "WikiText-2"


def _published(root: Path, name: str, corpus: str) -> Figure | None:
    """Of a model: valid, test and Δ valid as published for that corpus, with its name; None where there are none."""
    source, of, base = "", CACHE if name == _CACHED else MODELS[name][1], MODELS[BASE][1]
    if name in README and _is_released(root / (BASE if name == _CACHED else name)):
        source, of, base = "README, ", README[name], README[BASE]
    found, whole = (getattr(each, _CORPORA[corpus]) for each in (of, base))
    if found is None:
        return None
    shown = f"{source}{corpus}: {{:.1f}} / {{:.1f}}"
    return (
        figure(shown, *found) if name == BASE else figure(f"{shown} ({{:+.1f}})", *found, round(found[0] - whole[0], 6))
    )


def _is_released(run: Path) -> bool:
    settings = recorded_settings(run / "configs" / "train.yaml")
    return bool(settings) and against_recipe(run.name, settings).recipe.endswith("-released")


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
