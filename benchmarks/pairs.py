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

import gzip
import lzma
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TextIO

from shared.command import NO_FIGURES, Benchmark, Options
from shared.text import write_glue, write_text

Words = list[str]
ROWS = {"train": 260_000, "valid": 2_000, "test": 1_000}
PAIRS = {"train": ("train", 48_000), "valid": ("dev", 1_000)}
GLUE_COLUMNS = {"MRPC": (3, 4), "RTE": (1, 2)}


def parser(description: str | None = __doc__) -> Benchmark:
    """The command line, which benchmarks/contained.py shares."""
    parser = Benchmark(description, share=0.005)
    parser.add_input("--text", "folder of {train,valid,test}.txt(.xz, .gz)")
    parser.add_input("--glue", "folder of MRPC/train.tsv and RTE/{train,dev}.tsv")
    parser.add_input("--out", "folder to make")
    parser.add_argument("--share", type=float, default=1.0, help="make this share of the rows")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(options, Path(folder))
        make(options)
        show(options)


def make(options: Options) -> None:
    """Write all files."""
    rows, task = options.out / "rows", options.out / "glue" / "MRPC"
    for folder in (rows, task):
        folder.mkdir(parents=True)
    random, labelling = Random(2), Random(7)
    for split, count in ROWS.items():
        texts = sentences(lines_of(options.text, split))
        found = changed_copies(texts, round(count * options.share), random)
        if split == "train":
            found += 2 * glue_pairs(options.glue)
            random.shuffle(found)
        (rows / f"{split}.txt").write_text("".join(f"{one}\n{other}\n\n" for one, other in found), "utf-8")
        if split not in PAIRS:
            continue
        name, count = PAIRS[split]
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        long = [words for words in texts if len(words) >= 7]
        labelled = same_or_not(long, round(count * options.share), labelling)
        lines += [f"{int(same)}\t1\t2\t{one}\t{other}" for same, one, other in labelled]
        (task / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def make_inputs(options: Options, folder: Path) -> None:
    """With --quick: what is not given, in `folder`."""
    options.text = options.text or write_text(folder / "text")
    options.glue = options.glue or write_glue(folder / "glue")
    options.out = options.out or folder / "out"


def show(options: Options) -> None:
    """Print what was written."""
    for path in sorted(path for path in options.out.rglob("*") if path.is_file()):
        lines = path.read_text("utf-8").count("\n")
        print(f"{path.relative_to(options.out)}: {lines} lines")
    if options.quick:
        print(NO_FIGURES)


def lines_of(folder: Path, split: str) -> Iterator[str]:
    (path,) = folder.glob(f"{split}.txt*")
    with opened(path) as stream:
        yield from stream


def opened(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


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
        first, second = " ".join(one), " ".join(other)
        if not long and random.random() < 0.5:
            first, second = second, first
        yield same, first, second


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
