"""The most probable next words, and the training contexts behind each."""

from dataclasses import dataclass

import numpy as np

from distlm.knnlm.generate.words import Generator, Retrieved


@dataclass(frozen=True)
class NextWord:
    """One word that may come next."""

    word: str
    """As it is written."""
    hangs: bool
    """It is a sub-word with no blank between it and the token before."""
    id: int
    p: float
    """Probability under the mixture; without neighbours that of the language model."""
    lm: float
    """Under the language model alone."""
    knn: float | None
    """Among the neighbours; None without neighbours."""
    contexts: list[Retrieved]
    """The neighbours whose value is this word, nearest first: `context` (the stored text before it, in one line),
    `token` (its place in the stored split), `row`, `distance` (squared L2) and `weight` (its share of p_kNN, over all
    k)."""


def next_words(generator: Generator, ids: list[int], top: int, contexts: int, context: int) -> list[NextWord]:
    """The `top` most probable words after the text `ids`, the most probable first, of equal ones the first in the
    dictionary; with at most `contexts` neighbours of each, of `context` words. Words that no text holds (<s>, <pad>,
    padding of the dictionary) are left out, as `distlm generate` leaves them out."""
    at = generator.next_word(ids)
    order = np.argsort(-np.where(generator.possible, at.p, -1.0), kind="stable")
    chosen = order[: min(top, int(generator.possible.sum()))].tolist()
    found = []
    for i in chosen:
        behind = []
        if at.found is not None:
            places = np.flatnonzero(at.found.values == i)[:contexts].tolist()
            behind = [generator.retrieved(at.found, place, i, context) for place in places]
        knn = None if at.knn is None else float(at.knn[i])
        hangs, word = generator.part(ids, i)
        found.append(NextWord(word, hangs, i, float(at.p[i]), float(at.lm[i]), knn, behind))
    return found
