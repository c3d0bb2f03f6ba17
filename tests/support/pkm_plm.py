"""Finished runs of `distlm reproduce pkm-plm` whose numbers a test writes, and the tables made of them."""

import csv
import statistics
from pathlib import Path
from typing import Any

from msgspec import convert

from distlm.finetune.records import FinetuneResults, SeedResult
from distlm.memory.records import MemoryUse
from distlm.runtime.files import write_json
from distlm.training.records import LmResults, LmSplit
from support.records.examples import example

USE = {"mu": 0.9, "top1_mu": 0.25, "kl_u": 1.5, "kl_w": 2.25, "gini": 0.5}
MAJORITY = {
    "SST-2": {"accuracy": 0.509}, "MRPC": {"accuracy": 0.684, "f1": 0.812}, "QNLI": {"accuracy": 0.505},
    "CoLA": {"matthews": 0.0, "accuracy": 0.691}, "MNLI": {"accuracy": 0.354, "accuracy_mismatched": 0.352},
    "RTE": {"accuracy": 0.527}, "SQuAD": {"f1": 0.01, "exact_match": 0.005},
}  # fmt: skip


def evaluated(root: Path, run: str, perplexities: dict[str, float], memory: dict[str, Any] | None = None) -> None:
    """lm.json as `distlm evaluate` writes it, as far as the tables read it."""
    found = example(LmResults)
    found.splits = {
        text: LmSplit(tokens=9, loss_nats=2.0, perplexity=value, memory=convert(memory or {}, dict[str, MemoryUse]))
        for text, value in perplexities.items()
    }
    found.model.step, found.staleness = 600, {}
    found.write(root / run / "lm.json")


def finetuned(
    root: Path, run: str, task: str, values: list[float], memory: str | None = None, name: str = "", rows: int = 872,
    **use: Any,
) -> Path:  # fmt: skip
    """results.json as `distlm finetune` writes it; `values` of the task's metric, of seeds 1, 2, … Other metrics are .1
    less. Gives the fine-tuning's folder."""
    metric = next(iter(MAJORITY[task]))
    name = name or task + ("-frozen" if memory == "frozen" else "")
    of_seed = example(SeedResult).tree()
    seeds = {str(seed): {**of_seed, "seed": seed, "last": {metric: value}} for seed, value in enumerate(values, 1)}
    middle = statistics.median(values)
    median = {other: middle if other == metric else middle - 0.1 for other in MAJORITY[task]}
    found = {
        **example(FinetuneResults).tree(), "name": name, "task": task, "memory_values": memory, "metric": metric,
        "median": median, "majority": MAJORITY[task], "memory": use.get("use", {}), "seeds": seeds,
        "rows": {"train": 9, "dev": rows},
    }  # fmt: skip
    folder = root / run / "finetune" / name
    write_json(folder / "results.json", found)
    return folder


def labelled(kl: float | None, iou: float | None) -> dict[str, Any]:
    return {**USE, "labels": {"1|0": {"kl": kl, "iou": iou}}}


def cells(path: Path) -> list[list[str]]:
    """Of a table in Markdown, without the line below the head."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
