import random
from itertools import chain

import numpy as np
import pytest

from distlm.data.shards.records import Tokenizer
from distlm.data.shards.rows import RowPacker

PAD, UNK, CLS, SEP, MASK = range(5)
TOKENIZER = Tokenizer(1000, "hash", True, PAD, UNK, CLS, SEP, MASK)


def pack(documents: list[list[int]], length: int, cross: bool, chance: random.Random | None = None) -> np.ndarray:
    """All rows; with `chance` the documents come in pieces and rows are taken at any time."""
    packer, rows = RowPacker(length, TOKENIZER, cross, np.uint16), []
    for document in documents:
        place = 0
        while chance and place + 1 < len(document) and chance.random() < 0.6:
            step = chance.randrange(0, 9)
            packer.add(np.array(document[place : place + step], np.int32), False)
            rows.append(packer.rows())
            place += step
        packer.add(np.array(document[place:], np.int32), True)
    rows.append(packer.rows(last=True))
    assert packer.tokens == sum(map(len, documents)) and packer.documents == sum(map(bool, documents))
    return np.concatenate(rows)


def texts(chance: random.Random) -> list[list[int]]:
    return [[chance.randrange(5, 1000) for _ in range(chance.randrange(0, 40))] for _ in range(chance.randrange(1, 30))]


def test_rows_run_on_with_separators() -> None:
    rows = pack([[10, 11, 12], [20, 21], [], [30, 31, 32, 33, 34, 35]], 8, cross=True)
    assert rows.tolist() == [[CLS, 10, 11, 12, SEP, 20, 21, SEP], [CLS, 30, 31, 32, 33, 34, 35, SEP]]


def test_a_document_begins_a_row() -> None:
    rows = pack([[10, 11, 12], [], [30, 31, 32, 33, 34, 35, 36]], 6, cross=False)
    assert rows.tolist() == [
        [CLS, 10, 11, 12, SEP, PAD], [CLS, 30, 31, 32, 33, SEP], [CLS, 34, 35, 36, SEP, PAD],
    ]  # fmt: skip


def test_no_row_has_two_separators_in_a_row_or_begins_with_one() -> None:
    rows = pack([[10, 11, 12, 13], [20, 21, 22], [5, 6]], 6, cross=True)
    assert rows.tolist() == [[CLS, 10, 11, 12, 13, SEP], [CLS, 20, 21, 22, SEP, PAD], [CLS, 5, 6, SEP, PAD, PAD]]


@pytest.mark.parametrize("cross", [True, False])
def test_every_token_is_there_once_in_order_and_documents_are_apart(cross: bool) -> None:
    chance = random.Random(1)
    for _ in range(150):
        documents, length = texts(chance), chance.randrange(8, 20)
        rows = pack(documents, length, cross)
        assert rows.dtype == np.uint16 and (rows[:, 0] == CLS).all()
        padded = rows == PAD
        assert (padded[:, 1:] >= padded[:, :-1]).all(), "padding comes last"
        ends = length - padded.sum(1)
        assert (rows[np.arange(len(rows)), ends - 1] == SEP).all()
        assert [id for row in rows.tolist() for id in row if id > MASK] == [*chain(*documents)]
        # A row ends with a document, or the next one goes on with it.
        starts = [row[1] for row in rows.tolist()]
        if cross:
            assert (padded.sum(1)[:-1] <= 1).all()
        else:
            assert sum(len(row) for row in rows) == length * sum(-(-len(d) // (length - 2)) for d in documents)
            assert {d[0] for d in documents if d} <= set(starts)
        inner = [row[1 : end - 1] for row, end in zip(rows.tolist(), ends, strict=True)]
        assert all(row[0] != SEP and row[-1] != SEP for row in inner)


@pytest.mark.parametrize("cross", [True, False])
def test_rows_do_not_depend_on_how_the_text_comes(cross: bool) -> None:
    chance = random.Random(2)
    for _ in range(100):
        documents, length = texts(chance), chance.randrange(8, 20)
        assert np.array_equal(pack(documents, length, cross, chance), pack(documents, length, cross))


def test_nothing_gives_nothing() -> None:
    assert pack([[], []], 8, True).shape == pack([], 8, False).shape == (0, 8)
