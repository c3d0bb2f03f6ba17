"""Change of the loss by word between two evaluations of the same split (Merity et al. 2017, Table 3).

The change of a word is Σ over its occurrences of (loss before − loss after), in nats: above 0 where the second one is
better. Sums, not means: means would put rare words first.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distlm.data.text.shown import Shown
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.evaluate.records import NAMES
from distlm.models.perplexity import perplexity
from distlm.runtime.files import atomic_path
from distlm.runtime.rundir import RunDir


@dataclass(frozen=True)
class WordChange:
    """One word: occurrences, and sums over them in nats."""

    word: str
    count: int
    change: float
    before: float
    after: float


def open_evaluation(text: str, run: RunDir, split: str) -> Losses:
    """The losses that NAME of `run`, or RUN_DIR:NAME of another run, stands for; NAME is one of records.NAMES.

    Raises DistlmError for another name, or when the split was not evaluated.
    """
    folder, colon, name = text.rpartition(":")
    if name not in NAMES:
        raise DistlmError(f"{text!r}: expected {', '.join(NAMES)}, or RUN_DIR:NAME for another run")
    return Losses.open((RunDir(Path(folder)) if colon else run).losses, split, name)


def word_changes(before: Losses, after: Losses, skip: int = 0, shown: Shown | None = None) -> list[WordChange]:
    """Every word that occurs, the most improved first, equal ones by word; the first `skip` tokens are left out.

    `shown`: of the token files, so that sub-words are shown as text; None: as the dictionary has them. Raises
    DistlmError when the two are not of the same tokens, or nothing is left.
    """
    if before.facts.dictionary != after.facts.dictionary or not np.array_equal(before.targets, after.targets):
        raise DistlmError(
            f"{before.folder / before.facts.split} and {after.folder / after.facts.split} are not of the same "
            "tokens: evaluate both on the same split of the same token files"
        )
    if not 0 <= skip < len(before.targets):
        raise DistlmError(f"--skip {skip}: must be at least 0 and less than the {len(before.targets)} tokens there are")
    targets, words = before.targets[skip:], before.words()
    counts = np.bincount(targets, minlength=len(words))
    old, new = (np.bincount(targets, part.nats[skip:], minlength=len(words)) for part in (before, after))
    changes = np.bincount(targets, before.nats[skip:] - after.nats[skip:], minlength=len(words))
    rows = [
        WordChange(
            shown.word(int(i)) if shown else words[i], int(counts[i]), float(changes[i]), float(old[i]), float(new[i])
        )
        for i in np.flatnonzero(counts)
    ]
    return sorted(rows, key=lambda row: (-row.change, row.word))


def write_csv(rows: Sequence[WordChange], path: Path) -> None:
    """word, count, change, before, after; one line per word, sums in nats."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["word", "count", "change_nats", "before_nats", "after_nats"])
        writer.writerows((row.word, row.count, *(repr(x) for x in (row.change, row.before, row.after))) for row in rows)


def words_table(rows: Sequence[WordChange], top: int, title: str) -> str:
    """The `top` most deteriorated words on the left and the most improved on the right, and the totals, as text."""
    total = sum(row.count for row in rows)
    before, after = (math.fsum(values) for values in zip(*((row.before, row.after) for row in rows), strict=True))
    best = [row for row in rows[:top] if row.change > 0]
    worst = [row for row in rows[::-1][:top] if row.change < 0]
    width = max([4, *(len(row.word) for row in [*best, *worst])])
    head = f"{'word':<{width}} {'count':>8} {'Δ nats':>11}"
    lines = [
        f"{title}: {total:,} tokens, perplexity per token {perplexity(before / total):.2f} → "
        f"{perplexity(after / total):.2f}, {before - after:+.2f} nats in all",
        "",
        f"{head}   {head}",
    ]
    for place in range(max(len(best), len(worst))):
        left, right = (_cell(side, place, width) for side in (worst, best))
        lines.append(f"{left}   {right}".rstrip())
    return "\n".join(lines)


def _cell(rows: Sequence[WordChange], place: int, width: int) -> str:
    if place >= len(rows):
        return " " * (width + 21)
    row = rows[place]
    return f"{row.word:<{width}} {row.count:>8} {row.change:>+11.2f}"
