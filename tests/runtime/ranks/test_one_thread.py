"""torch's thread count is put back whoever leaves last, and is 1 for whoever is inside."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from distlm.runtime.ranks.one_thread import one_thread, one_thread_workers


@pytest.fixture(autouse=True)
def four() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def of_new_thread() -> int:
    """What a thread that begins now has."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_threads_may_be_inside_at_once() -> None:
    """The second to come has the first one's 1 before its eyes, and is the last to leave."""
    with ThreadPoolExecutor(1) as other, ExitStack() as theirs:
        with one_thread() as given:
            assert (given, torch.get_num_threads()) == (4, 1)
            assert other.submit(theirs.enter_context, one_thread()).result() == 4
        assert torch.get_num_threads() == 4 and other.submit(torch.get_num_threads).result() == 1
        with one_thread_workers(1, "inside") as workers:
            assert workers.submit(torch.get_num_threads).result() == 1
        other.submit(theirs.close).result()
        assert other.submit(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == 4 and of_new_thread() == 4


def test_blocks_of_one_thread_end_in_any_order() -> None:
    """As those of generators do, of which the first is closed first."""
    first, second = one_thread(), one_thread()
    assert (first.__enter__(), second.__enter__()) == (4, 4)
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 4 and of_new_thread() == 4
