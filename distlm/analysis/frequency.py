"""Loss by the frequency of the target word in train, for any evaluations of the same tokens (Ton et al., figure 2).

Bins are powers of two of the word's count in train. `</s>` and `<unk>`, which the dictionary does not count, stand for
themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distlm.analysis import plots
from distlm.analysis.evaluations import Evaluation, open_evaluations
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


def report_frequency(runs: Sequence[str], split: str, out: Path | None) -> str:
    """Write the figure (`out`, .png; default: in the first run's folder) and a .csv beside it; a table as text.

    runs: RUN_DIR (its LM and its kNN-LM) or RUN_DIR:NAME. Raises DistlmError as open_evaluations.
    """
    evaluations = open_evaluations(runs, split, ("lm", "knn"))
    bins = loss_by_frequency(evaluations)
    labels = [evaluation.label for evaluation in evaluations]
    path = out or evaluations[0].run.root / f"frequency-{split}.png"
    write_csv(
        path.with_suffix(".csv"),
        ["frequency", "least_count", "most_count", "words", "tokens", *labels],
        [[item.label, item.least, item.most, item.words, item.tokens, *item.nats] for item in bins],
    )
    losses = {label: [item.nats[column] for item in bins] for column, label in enumerate(labels)}
    heights = [item.tokens for item in bins]
    write_picture(path, plots.loss_histograms([item.label for item in bins], heights, losses, "count in train"))
    rows = [[item.label, f"{item.words:,}", f"{item.tokens:,}", *(f"{value:.3f}" for value in item.nats)]
            for item in bins]  # fmt: skip
    text = markdown(["count in train", "words", "tokens", *(f"{label}, nats" for label in labels)], rows)
    return f"{text}\n\nfigure: {path}, data: {path.with_suffix('.csv')}"


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
