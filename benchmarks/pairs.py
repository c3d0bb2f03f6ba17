"""Text in which a sentence comes back changed: what a small model needs before tasks on pairs of sentences.

A model that has read millions of words, not billions, has seldom seen one thing said twice, and that is what MRPC and
RTE are about. From plain text, and the pairs of the train sets of those two tasks without their labels, this makes

    OUT/rows/{train,valid,test}.txt   documents of two lines, one a changed copy of the other (15 %: the sentence after
                                      it), to pretrain on with shards.cross_documents=false
    OUT/glue/MRPC/{train,dev}.tsv     pairs in the layout of MRPC: does the second sentence say what the first does, or
                                      are a quarter to 60 % of its words others? A task on the way to MRPC (intermediate
                                      training, Phang et al. 2018)

Changes are: words left out or exchanged, halves swapped, a short part taken out of a long sentence.

    python benchmarks/pairs.py --text FOLDER --glue FOLDER --out FOLDER
"""

import argparse
import gzip
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

Words = list[str]
ROWS = {"train": 260_000, "valid": 2_000, "test": 1_000}
PAIRS = {"train": ("train", 48_000), "valid": ("dev", 1_000)}
GLUE_COLUMNS = {"MRPC": (3, 4), "RTE": (1, 2)}


def main() -> None:
    options = folders(__doc__)
    rows, task = options.out / "rows", options.out / "glue" / "MRPC"
    for folder in (rows, task):
        folder.mkdir(parents=True)
    random, labelling = Random(2), Random(7)
    for split, count in ROWS.items():
        texts = sentences(lines_of(options.text, split))
        found = changed_copies(texts, count, random)
        if split == "train":
            found += 2 * glue_pairs(options.glue)
            random.shuffle(found)
        (rows / f"{split}.txt").write_text("".join(f"{one}\n{other}\n\n" for one, other in found), "utf-8")
        if split not in PAIRS:
            continue
        name, count = PAIRS[split]
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        labelled = same_or_not([words for words in texts if len(words) >= 7], count, labelling)
        lines += [f"{int(same)}\t1\t2\t{one}\t{other}" for same, one, other in labelled]
        (task / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def folders(description: str | None) -> argparse.Namespace:
    """The command line's `text`, `glue` and `out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of {train,valid,test}.txt(.xz, .gz)")
    parser.add_argument("--glue", type=Path, required=True, help="folder of MRPC/train.tsv and RTE/{train,dev}.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    return parser.parse_args()


def lines_of(folder: Path, split: str) -> Iterator[str]:
    (path,) = folder.glob(f"{split}.txt*")
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8") as stream:
        yield from stream


def sentences(lines: Iterable[str]) -> list[Words]:
    """Those that have at least six words."""
    split_up = (part.split() for line in lines for part in re.split(r"(?<=[.!?;])\s+", line.strip()))
    return [words for words in split_up if len(words) >= 6]


def rows_of(path: Path) -> list[list[str]]:
    """The cells of each row of a file of GLUE, its header first."""
    return [line.split("\t") for line in path.read_text("utf-8-sig").split("\n") if line]


def glue_pairs(folder: Path) -> list[Words]:
    """The pairs of the train sets in both orders."""
    found = []
    for task, columns in GLUE_COLUMNS.items():
        for cells in rows_of(folder / task / "train.tsv")[1:]:
            pair = [cells[column] for column in columns]
            found += [pair, pair[::-1]]
    return found


def changed_copies(texts: list[Words], count: int, random: Random) -> list[Words]:
    """Pairs [one, other] of a sentence and its copy, in either order."""
    bag = [word for words in random.sample(texts, min(len(texts), 20_000)) for word in words]
    found = []
    for _ in range(count):
        at = random.randrange(len(texts) - 1)
        long = random.random() < 0.3
        one = texts[at][: 30 if long else 20]
        if random.random() < 0.15:
            other = texts[at + 1][: 12 if long else 20]
        else:
            other = part_of(one, 12, 10, random) if long else one
            other = halves_swapped(other, random)
            dropped, exchanged = random.choice([0, 0, 0.1]), random.choice([0, 0, 0.1])
            other = [
                random.choice(bag) if random.random() < exchanged else word
                for word in other
                if random.random() >= dropped
            ]
        pair = [" ".join(one), " ".join(other)]
        if random.random() < 0.5:
            pair.reverse()
        found.append(pair)
    return found


def same_or_not(texts: list[Words], count: int, random: Random) -> Iterator[tuple[bool, str, str]]:
    """(has the copy still the content?, one, other). Exchanged words come from the sentences around."""
    for _ in range(count):
        at = random.randrange(2, len(texts) - 2)
        near = [word for step in (-2, -1, 1, 2) for word in texts[at + step]]
        long = random.random() < 0.4
        one = texts[at][: 34 if long else 20]
        length = random.randint(6, 12) if long else 0
        other = halves_swapped(part_of(one, length, length, random) if long else one, random)
        same = random.random() < 0.55
        dropped = random.choice([0, 0.1, 0.2, 0.3])
        other = [word for word in other if random.random() >= dropped] or other[:1]
        if same:
            exchanged = random.choice([0, 0, 0.08])
            other = [random.choice(near) if random.random() < exchanged else word for word in other]
        elif random.random() < 0.2:
            other = texts[at + 1][: len(other) + 2]
        else:
            number = max(2, int(len(other) * random.uniform(0.25, 0.6)))
            places = set(random.sample(range(len(other)), min(number, len(other))))
            other = [random.choice(near) if place in places else word for place, word in enumerate(other)]
        pair = [" ".join(one), " ".join(other)]
        if not long and random.random() < 0.5:
            pair.reverse()
        yield same, *pair


def part_of(words: Words, length: int, room: int, random: Random) -> Words:
    first = random.randrange(0, max(1, len(words) - room))
    return words[first : first + length]


def halves_swapped(words: Words, random: Random) -> Words:
    """In 40 % of the cases."""
    if random.random() >= 0.4:
        return words
    cut = random.randrange(1, len(words))
    return words[cut:] + words[:cut]


if __name__ == "__main__":
    main()
