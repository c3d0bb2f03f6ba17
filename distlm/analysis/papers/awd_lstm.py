"""The tables of `distlm reproduce awd-lstm`: table 4 of Merity et al. (2017), and the neural cache."""

from pathlib import Path
from typing import Any

from distlm.analysis.tables import markdown, write_csv, write_text
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


def write_tables(root: Path) -> str:
    """Write table.md and table.csv of what is finished in `root`; gives the table."""
    found = {name: _perplexities(root / name) for name in PUBLISHED}
    head = ("model", "updates", "valid", "test", "Δ valid", "paper valid", "paper test", "paper Δ valid")
    base, rows, raw = found["awd-lstm"], [], []
    for name, (words, valid, test) in PUBLISHED.items():
        if (mine := found[name]) is None:
            continue
        change = mine["valid"] - base["valid"] if base else None
        paper = (valid, test, valid - 68.6 if valid is not None else None)
        rows.append([words, str(mine["updates"]), *map(_number, (mine["valid"], mine["test"], change, *paper))])
        raw.append([name, mine["updates"], mine["valid"], mine["test"], valid, test])
    path = root / "awd-lstm" / "results.json"
    if path.exists():
        splits = Results.read(path).splits
        valid, test = (splits[split].figures("cache").perplexity for split in ("valid", "test"))
        change = valid - base["valid"] if base else None
        rows.append(["AWD-LSTM + neural cache", "", *map(_number, (valid, test, change, 53.8, 52.0, 53.8 - 68.6))])
        raw.append(["cache", "", valid, test, 53.8, 52.0])
    write_csv(root / "table.csv", ("run", "updates", "valid", "test", "paper_valid", "paper_test"), raw)
    text = markdown(head, rows)
    write_text(root / "table.md", text)
    return f"{text}\n\ntable: {root / 'table.md'}"


def _perplexities(folder: Path) -> dict[str, Any] | None:
    if not (folder / RESULT).exists():
        return None
    results = LmResults.read(folder / RESULT)
    return {
        "updates": results.model.step, "valid": results.splits["valid"].perplexity,
        "test": results.splits["test"].perplexity,
    }  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
