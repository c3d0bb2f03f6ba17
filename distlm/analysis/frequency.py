"""Loss by the frequency of the target word in train, for any evaluations of the same tokens (Ton et al., figure 2).

The figure has the losses of the first evaluation, and of every other one the difference to those: pictures of the
losses themselves look alike.

Bins are powers of two of the word's count in train. `</s>` and `<unk>`, which the dictionary does not count, stand for
themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distlm.analysis.evaluations import Evaluation, open_evaluations
from distlm.analysis.plots.losses import losses_and_differences
from distlm.analysis.tables import markdown, write_csv, write_picture
from distlm.data.dictionary import Dictionary
from distlm.knnlm.evaluate.losses import WORDS


@dataclass(frozen=True)
class Bin:
    """Words that are about equally frequent."""

    label: str
    least: int
    """Least count in train; of `</s>` and `<unk>` −1."""
    most: int
    words: int
    """Words of the bin that occur in the split."""
    tokens: int
    """Tokens of the split that are one of them."""
    nats: tuple[float, ...]
    """Mean loss of those tokens in each evaluation, in nats."""

    def difference(self, column: int) -> float:
        """Mean loss of an evaluation less that of the first, in nats."""
        return self.nats[column] - self.nats[0]


def report_frequency(runs: Sequence[str], split: str, out: Path | None) -> str:
    """Write the figure (`out`, .png; default: in the first run's folder) and a .csv beside it, which has all losses; a
    table and a sentence as text.

    runs: RUN_DIR (its LM and its kNN-LM) or RUN_DIR:NAME. Raises DistlmError as open_evaluations.
    """
    evaluations = open_evaluations(runs, split, ("lm", "knn"))
    bins = loss_by_frequency(evaluations)
    labels = [evaluation.label for evaluation in evaluations]
    path = out or evaluations[0].run.root / f"frequency-{split}.png"
    first, *others = labels
    differences = {label: [item.difference(column) for item in bins] for column, label in enumerate(others, 1)}
    write_csv(
        path.with_suffix(".csv"),
        ["frequency", "least_count", "most_count", "words", "tokens", *labels, *(f"{o} less {first}" for o in others)],
        [[item.label, item.least, item.most, item.words, item.tokens, *item.nats,
          *(values[row] for values in differences.values())] for row, item in enumerate(bins)],
    )  # fmt: skip
    seen = _seen(bins, first, differences)
    write_picture(path, losses_and_differences(
        [item.label for item in bins], [item.tokens for item in bins], (first, [item.nats[0] for item in bins]),
        differences, "count of the word in train", seen,
    ))  # fmt: skip
    rows = [[item.label, f"{item.words:,}", f"{item.tokens:,}", *(f"{value:.3f}" for value in item.nats),
             *(f"{values[row]:+.3f}" for values in differences.values())] for row, item in enumerate(bins)]  # fmt: skip
    head = ["count in train", "words", "tokens", *(f"{label}, nats" for label in labels),
            *(f"{label}, Δ" for label in others)]  # fmt: skip
    note = f"{seen} Δ: less {first}." if others else seen
    return f"{markdown(head, rows)}\n\n{note}\n\nfigure: {path}, data: {path.with_suffix('.csv')}"


def _seen(bins: Sequence[Bin], first: str, differences: Mapping[str, Sequence[float]]) -> str:
    """What there is to see: of one evaluation where its loss is lowest and highest; of others where they gain or lose
    against the first."""
    if not differences:
        low, high = (choose(bins, key=lambda item: item.nats[0]) for choose in (min, max))
        return (
            f"The mean loss of {first} is lowest for {low.label} ({low.nats[0]:.2f} nats) and highest for {high.label} "
            f"({high.nats[0]:.2f})."
        )
    tokens = sum(item.tokens for item in bins)
    found = []
    for label, values in differences.items():
        mean = sum(item.tokens * value for item, value in zip(bins, values, strict=True)) / tokens
        fall, rise = (choose(range(len(bins)), key=lambda row: values[row]) for choose in (min, max))
        parts = [f"{mean:+.3f} nats per token over all"]
        for row, word, there in ((fall, "lower", values[fall] < 0), (rise, "higher", values[rise] > 0)):
            tokens_of = f"{bins[row].tokens:,} token{'s' * (bins[row].tokens > 1)}"
            where = f"most for {bins[row].label} ({values[row]:+.3f}, {tokens_of})" if there else "nowhere"
            parts.append(f"{word} {where}")
        found.append(f"Loss of {label} less that of {first}: {', '.join(parts)}.")
    return " ".join(found)


def loss_by_frequency(evaluations: Sequence[Evaluation]) -> list[Bin]:
    """Bins that have tokens, the most frequent words first, `</s>` and `<unk>` before them."""
    first = evaluations[0].losses
    dictionary = Dictionary.load(first.folder / WORDS)
    occurs = np.bincount(first.targets, minlength=len(dictionary)) > 0
    # 2^e ≤ count < 2^(e + 1); −1 for words that were never counted.
    exponents = np.frexp(np.array(dictionary.counts, np.float64))[1] - 1
    groups = [(dictionary.words[word], -1, -1, np.array([word])) for word in (Dictionary.EOS, Dictionary.UNK)]
    for e in range(int(exponents.max()), -1, -1):
        least, most = 2**e, 2 ** (e + 1) - 1
        label = f"{least}–{most}" if e else "1"
        groups.append((label, least, most, np.flatnonzero((exponents == e) & occurs)))
    found = []
    for label, least, most, words in groups:
        inside = np.isin(first.targets, words)
        if inside.any():
            nats = tuple(float(evaluation.losses.nats[inside].mean()) for evaluation in evaluations)
            found.append(Bin(label, least, most, len(words), int(inside.sum()), nats))
    return found
