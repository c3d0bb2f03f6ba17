"""The bits of the ids that a merge has seen: gathered in pieces, and no more of them than the ids need."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from support.threads import ThreadComm, on_threads

from distlm.index.merge import ids as ids_of
from distlm.index.merge.ids import IdBits


def test_bits_count_ids_and_name_the_missing_and_the_repeated() -> None:
    bits = IdBits(20, gaps=True)
    bits.add(np.array([3, 1, 0, 2, *range(5, 20)]))
    assert bits.missing() == 4 and bits.count() == 19
    bits.add(np.array([7, 30, 30]))
    assert bits.count() == 20
    assert bits.first_again([np.array([4, 2]), np.array([9, 2, 4])]) == 2
    assert bits.first_again([np.array([4, 2]), np.array([9, 8, 9])]) == 9


def test_bits_of_many_ranks_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_of, "GATHERED_BYTES", 48)
    monkeypatch.setattr(ids_of, "LEAST_PIECE", 16)
    sent: list[int] = []
    real = ThreadComm.gather

    def noted(comm: ThreadComm, value: Any) -> list[Any] | None:
        sent.append(0 if value is None else len(value))
        return real(comm, value)

    monkeypatch.setattr(ThreadComm, "gather", noted)
    random = np.random.default_rng(0)
    # Of different lengths, and one rank has none.
    shares = [random.choice(most, 200, replace=False) for most in (900, 9000)] + [np.empty(0, np.int64)]
    every = len(np.unique(np.concatenate(shares)))

    def counts(comm: ThreadComm) -> tuple[int, int]:
        bits = IdBits(400, gaps=True)
        bits.add(shares[comm.rank])
        bits.gather(comm)
        gathered = bits.count()
        bits.add(np.concatenate(shares))
        return gathered, bits.count()

    assert on_threads(3, counts) == [(every, every), (200, every), (0, every)]
    assert max(sent) == 16 and sent.count(0) > len(sent) / 3


def test_bits_with_gaps_take_no_more_than_their_ids_need() -> None:
    tracemalloc.start()
    try:
        bits = IdBits(10**7, gaps=True)
        bits.add(np.arange(10**7 - 1000, 10**7))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    bits.add(np.array([bits.limit - 1, 5]))
    assert bits.count() == 1002
