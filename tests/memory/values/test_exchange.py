"""One rank sends nothing; what several send is tested in tests/multiprocess/memory/test_memory_table_ranks.py."""

import pytest
import torch

from distlm.errors import DistlmError
from distlm.memory.values.exchange import Exchange


def test_one_rank_sends_nothing() -> None:
    for exchange in (Exchange.alone(), Exchange(0), Exchange(1)):
        assert (exchange.rank, exchange.size, exchange.columns, exchange.column) == (0, 1, 1, 0)
        assert (exchange.replicas, exchange.replica) == (1, 0)
        x = torch.rand(4, 6, dtype=torch.float64)
        for method in (
            exchange.gather_tokens, exchange.gather_replicas, exchange.to_columns, exchange.to_tokens,
            exchange.sum_columns, exchange.sum, exchange.maximum,
        ):  # fmt: skip
            assert torch.equal(method(x, "x"), x)
        assert exchange.bytes == {}


@pytest.mark.parametrize("columns", [2, -1])
def test_columns_that_do_not_divide_the_ranks(columns: int) -> None:
    with pytest.raises(DistlmError, match=rf"memory\.columns={columns} does not divide the number of ranks, 1"):
        Exchange(columns)
