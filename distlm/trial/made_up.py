"""Text without meaning, of as many different words as are asked for: to time stages before there is any text."""

from pathlib import Path

import numpy as np

LINE = 24
"""Words of a line."""
_DOCUMENT = 40
"""Lines of a document."""


def write_made_up(folder: Path, words: int, tokens: dict[str, int]) -> None:
    """SPLIT.txt for each split, of about so many tokens, a line's end counted as one.

    Each of `words` words is in train at least once; the others are drawn by Zipf's law, as in a language. The text is a
    function of the arguments.
    """
    folder.mkdir(parents=True)
    names = np.array([_word(number) for number in range(words)])
    odds = 1 / np.arange(1, words + 1)
    drawn = np.random.default_rng(0)
    for split, count in tokens.items():
        ids = drawn.choice(words, size=max(1, count * LINE // (LINE + 1)), p=odds / odds.sum())
        if split == "train":
            ids = drawn.permutation(np.concatenate([ids[: max(0, len(ids) - words)], np.arange(words)]))
        lines = [" ".join(names[ids[at : at + LINE]]) for at in range(0, len(ids), LINE)]
        # Documents have a blank line behind them, where text has them.
        documents = ("\n".join(lines[at : at + _DOCUMENT]) for at in range(0, len(lines), _DOCUMENT))
        (folder / f"{split}.txt").write_text("\n\n".join(documents) + "\n", "utf-8")


def _word(number: int) -> str:
    """A word of letters: bijective base 26, so that a tokenizer of sub-words finds pieces in it."""
    found = ""
    number += 27  # two letters at least
    while number > 0:
        number, letter = divmod(number - 1, 26)
        found = chr(ord("a") + letter) + found
    return found
