"""Does a text hold what a part says? Two tasks in the layout of RTE, on the way to RTE (intermediate training).

From plain text, and the first texts of the train sets of RTE and MRPC without their labels, this makes

    OUT/easy/RTE/{train,dev}.tsv   the text is short, and in a part that it does not hold most rare words are others
    OUT/hard/RTE/{train,dev}.tsv   parts of more places, with other endings of words; up to 30 % of the rare words are
                                   others in a part that counts as held, half or more in one that does not
    OUT/folds/{0,1,2}/RTE          all labelled rows of RTE, a third of them held out: RTE's own dev set has 277 rows,
                                   in which one standard error is 3 %

Common words come and go whatever the label is. A small model learns the easy task after a long plateau, and the hard
one only after the easy one.

    python benchmarks/contained.py --text FOLDER --glue FOLDER --out FOLDER
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from pairs import GLUE_COLUMNS, Words, lines_of, make_inputs, part_of, rows_of, show
from pairs import parser as parser_of_pairs
from shared.command import Benchmark, Options

FOLDS = 3


class Task(NamedTuple):
    hard: bool
    rows: int  # tried, of the text; too short ones give none
    rows_of_glue: int
    lengths: list[int]  # of the text, in words; up to 7 more
    dropped: list[float]
    exchanged: list[float]  # common words
    inflected: list[float]


EASY = Task(False, 40_000, 13_333, [14, 20, 26], [0, 0.1, 0.2], [0, 0, 0.2], [])
HARD = Task(True, 20_000, 24_000, [16, 20, 26, 32, 40, 50], [0, 0.1, 0.3], [0, 0.2, 0.4], [0, 0.1, 0.25])
DEV_ROWS = 1_200


def parser() -> Benchmark:
    """The command line."""
    return parser_of_pairs(__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(options, Path(folder))
        make(options)
        show(options)


def make(options: Options) -> None:
    """Write all files."""
    options.out.mkdir(parents=True)
    of_glue = [
        cells[GLUE_COLUMNS[task][0]].split()
        for task in ("RTE", "MRPC")
        for cells in rows_of(options.glue / task / "train.tsv")[1:]
    ]
    train, valid = (
        [words for words in map(str.split, lines_of(options.text, split)) if words] for split in ("train", "valid")
    )
    common, common_of_valid = common_words(train), common_words(valid)
    for name, task in (("easy", EASY), ("hard", HARD)):
        random = Random(11)
        rows = list(parts_or_not(train, round(task.rows * options.share), task, common, random))
        shuffled = of_glue.copy()
        random.shuffle(shuffled)
        rows += parts_or_not(shuffled, round(task.rows_of_glue * options.share), task, common, random)
        write_task(options.out / name, "train", rows, random)
        dev = list(parts_or_not(valid, round(DEV_ROWS * options.share), task, common_of_valid, random))
        write_task(options.out / name, "dev", dev, random)
    write_folds(options.glue / "RTE", options.out / "folds")


def plain(word: str) -> str:
    return re.sub(r"\W", "", word.lower())


def common_words(texts: list[Words]) -> set[str]:
    seen = Counter(plain(word) for words in texts[:20_000] for word in words)
    return {word for word, _ in seen.most_common(150)}


def parts_or_not(
    texts: list[Words], count: int, task: Task, common: set[str], random: Random
) -> Iterator[tuple[str, str, bool]]:
    """At most `count` of (text, part, does the text hold the part?). Other words come from the texts around."""

    def rare(word: str) -> bool:
        return bool(plain(word)) and plain(word) not in common

    for _ in range(count):
        at = random.randrange(3, len(texts) - 3)
        words = [word for text in texts[at : at + 3] for word in text]
        text = words[: random.choice(task.lengths) + random.randrange(8)]
        if len(text) < 14:
            continue
        near = [word for other in texts[at - 3 : at] for word in other[:80]] + words[len(text) : len(text) + 80]
        others = [word for word in near if rare(word)]
        if len(others) < 8:
            continue
        part = places_of(text, random) if task.hard else place_or_two(text, random)
        length = len(part)
        dropped = random.choice(task.dropped)
        part = [word for word in part if random.random() >= dropped] or part[:2]
        exchanged = random.choice(task.exchanged)
        usual = [word for word in text + near if plain(word) in common] or ["the"]
        part = [
            random.choice(usual) if plain(word) in common and random.random() < exchanged else word for word in part
        ]
        if task.inflected:
            share = random.choice(task.inflected)
            part = [
                other_ending(word, random) if plain(word) not in common and random.random() < share else word
                for word in part
            ]
        where = [place for place, word in enumerate(part) if rare(word)]
        if len(where) < 2:
            continue
        holds = random.random() < 0.5
        if task.hard:
            share = random.uniform(0, 0.3) if holds else random.uniform(0.5, 1)
            count_others = int(len(where) * share) if holds else max(1, round(len(where) * share))
            exchange(part, random.sample(where, count_others), others, random)
        elif holds:
            if random.random() < 0.3:
                place = random.choice(where)
                if len(where) >= 5:
                    exchange(part, [place], others, random)
        elif random.random() < 0.15:
            part = part_of(near, length, length, random)
        else:
            count_others = max(1 if len(where) < 5 else 2, round(len(where) * random.uniform(0.6, 1)))
            exchange(part, random.sample(where, min(count_others, len(where))), others, random)
        yield " ".join(text), " ".join([part[0][:1].upper() + part[0][1:], *part[1:]]), holds


def place_or_two(text: Words, random: Random) -> Words:
    length = random.randint(5, 14)
    if random.random() < 0.5:
        return part_of(text, length, length, random)
    first = random.randint(2, max(2, length - 2))
    return part_of(text, first, first, random) + part_of(text, length - first, length - first, random)


def places_of(text: Words, random: Random) -> Words:
    found = []
    for _ in range(random.randint(1, 3)):
        length = random.randint(3, 7)
        found += part_of(text, length, length, random)
    return found


def other_ending(word: str, random: Random) -> str:
    found = re.match(r"(\w+?)(ing|ed|es|s)?(\W*)$", word)
    if not found or len(found[1]) < 4:
        return word
    return found[1] + random.choice(["", "s", "ed", "ing"]) + found[3]


def exchange(part: Words, places: list[int], others: Words, random: Random) -> None:
    for place in places:
        part[place] = random.choice(others)


def write_task(folder: Path, split: str, pairs: list[tuple[str, str, bool]], random: Random) -> None:
    random.shuffle(pairs)
    labels = {True: "entailment", False: "not_entailment"}
    rows = [[str(number), text, part, labels[holds]] for number, (text, part, holds) in enumerate(pairs)]
    write_rows(folder, split, ["index", "sentence1", "sentence2", "label"], rows)


def write_folds(rte: Path, out: Path) -> None:
    (header, *rows), (_, *dev) = rows_of(rte / "train.tsv"), rows_of(rte / "dev.tsv")
    rows += dev
    Random(3).shuffle(rows)
    for fold in range(FOLDS):
        write_rows(out / str(fold), "dev", header, rows[fold::FOLDS])
        write_rows(out / str(fold), "train", header, (row for at, row in enumerate(rows) if at % FOLDS != fold))


def write_rows(folder: Path, split: str, header: list[str], rows: Iterable[list[str]]) -> None:
    (folder / "RTE").mkdir(parents=True, exist_ok=True)
    lines = "".join("\t".join(row) + "\n" for row in [header, *rows])
    (folder / "RTE" / f"{split}.tsv").write_text(lines, "utf-8")


if __name__ == "__main__":
    main()
