import numpy as np
import pytest

from distlm.data.shards.order import ShardOrder, rank_places, update_positions

UNEVEN = [4, 4, 4, 1, 4, 4, 3, 4, 4, 4, 2]


def stream(order: ShardOrder, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    return order.rows_at(np.arange(first, first + count))


@pytest.mark.parametrize("pool_chunks", [1, 3, 4, 11, 100])
@pytest.mark.parametrize("chunks", [UNEVEN, [1], [5] * 7])
def test_every_epoch_has_every_row_once(chunks: list[int], pool_chunks: int) -> None:
    order, rows = ShardOrder(chunks, 3, pool_chunks), sum(chunks)
    epochs, numbers = stream(order, 0, 4 * rows)
    assert np.array_equal(epochs, np.repeat(np.arange(4), rows))
    for epoch in range(4):
        assert np.array_equal(np.sort(numbers[epochs == epoch]), np.arange(rows))


def test_any_position_is_found_without_the_ones_before_it() -> None:
    epochs, numbers = stream(ShardOrder(UNEVEN, 5, 3), 0, 200)
    for position in np.random.default_rng(0).permutation(200)[:60].tolist():
        epoch, number = stream(ShardOrder(UNEVEN, 5, 3), position, 1)
        assert (epoch[0], number[0]) == (epochs[position], numbers[position])
    backwards = np.arange(200)[::-1]
    assert np.array_equal(ShardOrder(UNEVEN, 5, 3).rows_at(backwards)[1], numbers[::-1])


def test_each_pool_is_read_once_in_an_epoch_and_its_chunks_forwards() -> None:
    order = ShardOrder(UNEVEN, 7, 3)
    visited: list[int] = []
    for position in range(sum(UNEVEN)):
        ((epoch, number, _, _),) = order.locate(np.array([position]))
        if not visited or visited[-1] != number:
            visited.append(number)
        pool = order.pool(epoch, number)
        assert len(pool.chunks) <= 3 and (np.diff(pool.chunks) > 0).all()
        laid = np.concatenate([np.arange(order.first_rows[c], order.first_rows[c + 1]) for c in pool.chunks])
        assert np.array_equal(laid[pool.places], pool.rows)
    assert visited == [0, 1, 2, 3]


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = []
    for seed in (1, 2, 2**63, -1):
        for epoch in (0, 1, 10**6):
            orders.append(stream(ShardOrder([50] * 20, seed, 4), epoch * 1000, 1000)[1])
    for number, left in enumerate(orders):
        for right in orders[number + 1 :]:
            assert (left == right).mean() < 0.02


def test_rows_are_well_mixed() -> None:
    """Neighbours in the text are rarely neighbours in the stream, and each row may come anywhere in an epoch."""
    numbers = stream(ShardOrder([10] * 100, 1, 20), 0, 1000)[1]
    assert (np.abs(np.diff(numbers)) == 1).mean() < 0.02
    places = np.array([np.flatnonzero(stream(ShardOrder([2] * 6, 1, 2), 12 * e, 12)[1] == 5)[0] for e in range(1200)])
    assert (abs(np.bincount(places, minlength=12) - 100) < 45).all()


def test_order_is_pinned() -> None:
    """Another order would break the resuming of runs started before."""
    epochs, numbers = stream(ShardOrder(UNEVEN, 1, 3), 34, 8)
    assert epochs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert numbers.tolist() == [6, 4, 37, 7, 37, 0, 3, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_out_an_update_in_contiguous_pieces_of_each_micro_batch(ranks: int) -> None:
    places = [rank_places(24, 12, rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(24))
    for micro in range(2):
        pieces = [mine.reshape(2, -1)[micro] for mine in places]
        assert np.array_equal(np.concatenate(pieces), np.arange(12) + 12 * micro)


def test_programmer_errors() -> None:
    for act in (
        lambda: rank_places(24, 9, 0, 1), lambda: rank_places(24, 12, 0, 5), lambda: update_positions(-1, 4),
        lambda: update_positions(0, 0), lambda: ShardOrder([], 1),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            act()
