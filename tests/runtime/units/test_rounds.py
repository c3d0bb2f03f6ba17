"""Runs of units over ranks: whose they are, and how busy the ranks are."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.threads import ThreadComm, on_threads

from distlm.errors import DistlmError, Stopped
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag
from distlm.runtime.units.planned import efficiency, idle_note, speedup
from distlm.runtime.units.rounds import first_readers, rounds, share_of_units


def on_ranks(ranks: int, units: Sequence[int], act: Any, stop_at: int | None = None) -> list[list[list[Any]]]:
    """What `rounds` gives on each rank, round by round; an exception in its place."""

    def one(comm: ThreadComm) -> list[Any]:
        results: list[Any] = []
        stage = cast(Stage, SimpleNamespace(comm=comm, stop=StopFlag(comm.rank)))
        try:
            # The ranks have different numbers of threads.
            own = rounds(stage, "work", units, lambda run: act(comm.rank, run), 1 + comm.rank % 2)
            for number, found in enumerate(own):
                results.append(found)
                if number == stop_at and comm.rank == ranks - 1:
                    stage.stop.reason = "SIGUSR1"
        except (DistlmError, Stopped) as error:
            results.append(error)
        return results

    return on_threads(ranks, one)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("units", [0, 1, 5, 6, 100])
def test_every_unit_is_one_rank_s_and_all_ranks_make_the_same_rounds(ranks: int, units: int) -> None:
    whole = list(range(units))
    runs = [share_of_units(whole, rank, ranks) for rank in range(ranks)]
    assert [unit for run in runs for unit in run] == whole
    assert max(map(len, runs)) - min(map(len, runs)) <= 1

    found = on_ranks(ranks, whole, lambda rank, run: (rank, list(run)))
    assert all(of_rank == found[0] for of_rank in found)
    done = {
        rank: [unit for one in found[0] for who, run in one if who == rank for unit in run] for rank in range(ranks)
    }
    assert [done[rank] for rank in range(ranks)] == [list(run) for run in runs]


def test_a_shard_is_copied_for_the_rank_that_has_its_first_unit() -> None:
    assert first_readers([0, 0, 0, 1, 1, 2], 2) == {0: 0, 1: 1, 2: 1}
    assert first_readers([0] * 5 + [3], 3) == {0: 0, 3: 2} and first_readers([], 2) == {}


def test_a_fault_of_one_rank_is_raised_on_all() -> None:
    def act(rank: int, run: Sequence[int]) -> None:
        if 41 in run:
            raise DistlmError(f"rank {rank} met unit 41")

    found = on_ranks(3, range(60), act)
    assert [str(of_rank[-1]) for of_rank in found] == ["rank 2 met unit 41"] * 3


def test_a_stop_signal_of_one_rank_stops_all_after_the_round() -> None:
    found = on_ranks(3, range(1000), lambda rank, run: len(run), stop_at=1)
    assert [len(of_rank) for of_rank in found] == [3, 3, 3]
    assert all(isinstance(of_rank[-1], Stopped) for of_rank in found)


def test_how_busy_ranks_are() -> None:
    assert efficiency([512], 128) == 1 and efficiency([513], 128) == 513 / 640
    # Phases wait for each other.
    assert efficiency([3, 3], 2) == 6 / 8 and efficiency([6], 2) == 1
    assert speedup([5], 4) == 2.5 and efficiency([], 4) == 1
    assert idle_note(3, 4, "more ranks do not help") == [
        "3 units of work: 1 of 4 ranks will have nothing to do; more ranks do not help"
    ]
    assert idle_note(4, 4, "") == idle_note(0, 4, "") == []
