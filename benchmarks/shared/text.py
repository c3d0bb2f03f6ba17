"""Small text: made up for --quick, as folders of text and of GLUE have it, and beginnings of a real one."""

from collections.abc import Mapping
from pathlib import Path
from random import Random

SPLITS = {"train": 1.0, "valid": 0.15, "test": 0.15}
"""Sentences of each split, relative to those of train."""
LENGTHS = (8, 30)
VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"


def write_text(folder: Path, sentences: int = 2_000, words: int = 1_200) -> Path:
    """{train,valid,test}.txt: a sentence a line, words by Zipf's law. The folder."""
    folder.mkdir(parents=True)
    random = Random(0)
    for split, share in SPLITS.items():
        lines = [_sentence(random, words) for _ in range(round(sentences * share))]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def write_beginning(text: Path, folder: Path, words: Mapping[str, int]) -> Path:
    """Whole lines from the beginning of {split}.txt of `text`, until there are so many words of each split. The folder.

    Raises OSError for a file that cannot be read.
    """
    folder.mkdir(parents=True)
    for split, count in words.items():
        lines = []
        with (text / f"{split}.txt").open(encoding="utf-8") as stream:
            for line in stream:
                if count <= 0:
                    break
                lines.append(line)
                count -= len(line.split()) + 1
        (folder / f"{split}.txt").write_text("".join(lines), "utf-8")
    return folder


def write_glue(folder: Path, rows: int = 60) -> Path:
    """MRPC/train.tsv and RTE/{train,dev}.tsv. The folder."""
    random = Random(1)
    headers = {"MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "RTE": "index\tsentence1\tsentence2\tlabel"}
    for task, split in (("MRPC", "train"), ("RTE", "train"), ("RTE", "dev")):
        (folder / task).mkdir(parents=True, exist_ok=True)
        lines = [headers[task]]
        for number in range(rows):
            one, other = _sentence(random, 1_200), _sentence(random, 1_200)
            mrpc, rte = f"1\t1\t2\t{one}\t{other}", f"{number}\t{one}\t{other}\tentailment"
            lines.append(mrpc if task == "MRPC" else rte)
        (folder / task / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def _sentence(random: Random, words: int) -> str:
    ranks = random.choices(range(words), [1 / (1 + rank) for rank in range(words)], k=random.randint(*LENGTHS))
    return " ".join(map(_word, ranks)).capitalize() + "."


def _word(rank: int) -> str:
    """Of one syllable or more, the frequent ones being short."""
    syllables = []
    number = rank + 1
    while number:
        number, place = divmod(number, len(CONSONANTS) * len(VOWELS))
        syllables.append(CONSONANTS[place // len(VOWELS)] + VOWELS[place % len(VOWELS)])
    return "".join(syllables)
