"""The HTML page of `distlm generate`: the two texts, and behind each word the training contexts that it came from."""

from pathlib import Path

from distlm.analysis.pages import environment
from distlm.knnlm.generate.stage import Generation
from distlm.knnlm.generate.words import Word
from distlm.runtime.files import atomic_path


def write_page(made: Generation, path: Path) -> None:
    """Write the page; nothing of it is loaded from elsewhere."""
    weight = made.frozen.weight if made.frozen else 0.0
    shares = [share_of_neighbours(word, weight) for word in made.mixed]
    page = environment().get_template("generation.html").render(
        made=made, mixed=list(zip(made.mixed, shares, strict=True))
    )  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def share_of_neighbours(word: Word, weight: float) -> float:
    """Share of a word's probability that came from the neighbours: λ p_kNN / p, in [0, 1]."""
    return weight * word.p_knn / word.p if word.p_knn is not None and word.p > 0 else 0.0
