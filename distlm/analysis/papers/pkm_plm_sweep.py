"""Slots × reads: how many of a memory's slots a held-out text uses, by how many reads there are for a slot.

Kim & Jung (2020) measure 262,144 slots read by 4 heads. Where a text reads each slot hundreds of times all are used,
whatever the memory: top-1 use then tells nothing. sweep.md and .csv have PKM alone, after a short training.
"""

import re
from pathlib import Path

from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import ResultRow
from distlm.analysis.tables import markdown, write_csv, write_text
from distlm.config.load import load_config
from distlm.config.recipe import RUN_CONFIG
from distlm.memory.config import MemoryConfig
from distlm.training.finished import RESULT
from distlm.training.records import LmResults, LmSplit

_SWEEP = re.compile(r"sweep-n(\d+)-h(\d+)-k(\d+)")
_HEAD = (
    "run", "updates", "slots", "heads", "k", "text", "reads_a_slot", "perplexity", "layer", "top1_mu", "mu", "kl_u",
    "kl_w",
)  # fmt: skip


def memory_of(folder: Path) -> MemoryConfig | None:
    """The memory's settings, as a run has recorded them; None without a record."""
    path = folder / RUN_CONFIG
    return load_config(str(path)).section(MemoryConfig) if path.exists() else None


def reads_a_slot(folder: Path, split: LmSplit) -> float | str:
    """How often a text reads a slot of a run's memory first, on average: tokens × heads / slots. Empty where that is
    not recorded, and without memory."""
    memory = memory_of(folder)
    if not memory or not split.memory or not split.text_tokens:
        return ""
    return round(split.text_tokens * memory.heads / memory.sub_keys**2, 6)


def write_sweep(root: Path) -> str:
    """Write sweep.csv and sweep.md; the table as text, empty where no run of the sweep is finished."""
    raw, shown = [], []
    for folder in sorted(root.glob("sweep-*"), key=_order):
        memory, path = memory_of(folder), folder / RESULT
        if not _SWEEP.fullmatch(folder.name) or memory is None or not path.exists():
            continue
        found = LmResults.read(path)
        for text, split in found.splits.items():
            reads = reads_a_slot(folder, split)
            head = [folder.name, found.model.step, memory.sub_keys**2, memory.heads, memory.k, text, reads]
            uses = split.memory or {}
            raw += [
                [*head, split.perplexity, layer, use.top1_mu, use.mu, use.kl_u, use.kl_w] for layer, use in uses.items()
            ]
            shares = (
                " / ".join(f"{percent(getattr(use, name) or 0):.1f}" for use in uses.values())
                for name in ("top1_mu", "mu")
            )
            kl = " / ".join(f"{use.kl_u or 0:.2f}" for use in uses.values())
            told = f"{reads:.2f}" if isinstance(reads, float) else ""
            shown.append([*(f"{cell:,}" for cell in head[2:5]), text, told, *shares, kl, f"{split.perplexity:.1f}"])
    if not raw:
        return ""
    write_csv(root / "sweep.csv", _HEAD, raw)
    columns = ["slots", "heads", "k", "text", "first reads a slot", "top-1 MU %", "MU %", "KL_u", "ppl"]
    text = f"{markdown(columns, shown)}\n\nPKM after {raw[0][1]:,} updates, layer by layer."
    write_text(root / "sweep.md", text)
    return text


def sweep_rows(root: Path) -> list[ResultRow]:
    """Where slots have the most and the fewest reads on the last text: how many of them are used."""
    lines = lines_of(root / "sweep.csv")
    of_text = [line for line in lines if line["text"] == lines[-1]["text"] and line["reads_a_slot"]]
    reads = sorted({float(line["reads_a_slot"]) for line in of_text})
    made = []
    for words, number in (("most", reads[-1:]), ("fewest", reads[:1] if len(reads) > 1 else [])):
        for count in number:
            own = [line for line in of_text if float(line["reads_a_slot"]) == count]
            # Of several runs with as many reads the first.
            own = [line for line in own if line["run"] == own[0]["run"]]
            use = [percent(line["top1_mu"]) for line in own]
            what = (
                f"top-1 MU on {own[0]['text']} of a sweep over slots and heads, the {words} reads: "
                f"{int(own[0]['slots']):,} slots × {own[0]['heads']} heads after {own[0]['updates']} updates"
            )
            shown = " / ".join("{:.1f}" for _ in use)
            made.append(ResultRow(what, figure(f"{shown} % at {{:.2f}} first reads a slot", *use, count), 0))
    return made


def _order(folder: Path) -> tuple[int, ...]:
    match = _SWEEP.fullmatch(folder.name)
    return tuple(map(int, match.groups())) if match else ()
