"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache."""

from pathlib import Path

from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import ResultRow, ResultsPath
from distlm.analysis.results.verdict import lower
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_text
from distlm.knnlm.evaluate.records import Results
from distlm.training.finished import RESULT
from distlm.training.records import LmResults

PUBLISHED = {
    "awd-lstm": ("AWD-LSTM", 68.6, 65.8),
    "no-finetuning": ("– fine-tuning", 69.1, 66.0),
    "halved-sgd": ("– NT-ASGD (the rate halves instead)", 73.3, 69.7),
    "plain-sgd": ("– NT-ASGD (plain SGD)", None, None),
    "fixed-length": ("– variable sequence lengths", 69.3, 66.2),
    "no-embedding-dropout": ("– embedding dropout", 71.1, 68.1),
    "no-weight-decay": ("– weight decay", 71.9, 68.7),
    "no-ar-tar": ("– AR and TAR", 73.2, 70.1),
    "full-embedding": ("– embedding narrower than the LSTM", 73.7, 70.7),
    "no-weight-drop": ("– weight drop", 78.4, 74.9),
}
"""Run → what it is, and valid and test perplexity on WikiText-2 in the paper (table 4)."""
PATH: ResultsPath = "AWD-LSTM"
TABLES = {"table.csv": "perplexity of the best checkpoint, and the paper's"}
NOTES = ("Perplexity on valid / test, in brackets valid's distance to the first row.",)


def write_tables(root: Path) -> str:
    """Write table.md and table.csv of what is finished in `root`; gives the table."""
    found = {name: _evaluated(root / name) for name in PUBLISHED}
    path = root / "awd-lstm" / "results.json"
    if not any(found.values()) and not path.exists():
        raise nothing_finished(root)
    head = ("model", "updates", "valid", "test", "Δ valid", "paper valid", "paper test", "paper Δ valid")
    base, rows, raw = found["awd-lstm"], [], []
    for name, (words, valid, test) in PUBLISHED.items():
        if (mine := found[name]) is None:
            continue
        own_valid, own_test = (mine.splits[split].perplexity for split in ("valid", "test"))
        change = own_valid - base.splits["valid"].perplexity if base else None
        paper = (valid, test, valid - 68.6 if valid is not None else None)
        rows.append([words, str(mine.model.step), *map(_number, (own_valid, own_test, change, *paper))])
        raw.append([name, mine.model.step, own_valid, own_test, valid, test])
    if path.exists():
        splits = Results.read(path).splits
        valid, test = (splits[split].figures("cache").perplexity for split in ("valid", "test"))
        change = valid - base.splits["valid"].perplexity if base else None
        rows.append(["AWD-LSTM + neural cache", "", *map(_number, (valid, test, change, 53.8, 52.0, 53.8 - 68.6))])
        raw.append(["cache", "", valid, test, 53.8, 52.0])
    write_csv(root / "table.csv", ("run", "updates", "valid", "test", "paper_valid", "paper_test"), raw)
    text = markdown(head, rows)
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def rows(root: Path) -> list[ResultRow]:
    """The lines of table.csv, and whether each part that is left out costs perplexity on valid as in the paper."""
    found = {line["run"]: line for line in lines_of(root / "table.csv")}
    made = []
    for run, line in found.items():
        valid, test, base = float(line["valid"]), float(line["test"]), found.get("awd-lstm")
        what = PUBLISHED[run][0] if run in PUBLISHED else "AWD-LSTM + neural cache"
        shown, numbers = "{:.2f} / {:.2f}", [valid, test]
        if base is not None and line is not base:
            shown, numbers = f"{shown} ({{:+.2f}})", [*numbers, round(valid - float(base["valid"]), 6)]
        row = ResultRow(what, figure(shown, *numbers), 0)
        if line["paper_valid"]:
            published = float(line["paper_valid"]), float(line["paper_test"])
            row.paper = figure("{:.1f} / {:.1f}", *published)
            if base is not None and line is not base:
                row.paper = figure("{:.1f} / {:.1f} ({:+.1f})", *published, round(published[0] - 68.6, 6))
                row.finding = "the cache lowers it" if run == "cache" else "without it, it is higher"
                sides = (valid, float(base["valid"]))
                row.verdict = lower(*(sides if run == "cache" else sides[::-1]))
        made.append(row)
    return made


def _evaluated(folder: Path) -> LmResults | None:
    return LmResults.read(folder / RESULT) if (folder / RESULT).exists() else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
