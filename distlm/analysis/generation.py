"""The HTML page of `distlm generate`: the two texts, and behind each word the training contexts that it came from."""

from pathlib import Path

from distlm.analysis.pages import environment
from distlm.knnlm.generate.stage import Generation, marked
from distlm.knnlm.generate.words import Word
from distlm.runtime.files import atomic_path

HEADS = {"word": ("word", "p", "p_LM", "p_kNN"), "near": ("weight", "distance", "context", "value")}
"""Headings of the two tables behind a word: of the word itself, and of its neighbours."""
TERMS = {
    "p": "Probability of the word in the mixture: λ p_kNN + (1 − λ) p_LM.",
    "p_LM": "Its probability under the language model alone.",
    "p_kNN": "Its probability among the neighbours: the weights of those whose value it is, added.",
    "weight": "The neighbour's share of p_kNN; the nearer, the larger. Those of all k neighbours add up to 100 %.",
    "distance": "Squared L2 distance from the neighbour's key to the hidden state of the text so far.",
    "context": "The words before the neighbour's value in the training text.",
    "value": "The word that followed that context in the training text.",
}
"""Heading → what it says; the glossary has each of them."""


def write_page(made: Generation, path: Path) -> None:
    """Write the page; nothing of it is loaded from elsewhere."""
    weight = made.frozen.weight if made.frozen else 0.0
    shares = [share_of_neighbours(word, weight) for word in made.mixed]
    page = environment().get_template("generation.html").render(
        made=made, mixed=list(zip(made.mixed, shares, strict=True)), heads=HEADS, terms={"word": "The word that was "
        "generated.", **TERMS}, most=_most(made.mixed, shares),
    )  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def share_of_neighbours(word: Word, weight: float) -> float:
    """Share of a word's probability that came from the neighbours: λ p_kNN / p, in [0, 1]."""
    return weight * word.p_knn / word.p if word.p_knn is not None and word.p > 0 else 0.0


def _most(words: list[Word], shares: list[float]) -> str:
    """Which word owes most to the neighbours, and how many owe them half; empty without words."""
    if not words:
        return ""
    half = sum(share >= 0.5 for share in shares)
    at = max(range(len(words)), key=lambda place: shares[place])
    if not shares[at]:
        return "Here none of it did."
    word = marked(words[at])
    return (
        f"“{word}” has most of its probability from them, {shares[at]:.0%}; {half} of {len(words)} words half or more."
    )
