import numpy as np
import pytest

from distlm.data.order import epoch_order, rows_for_update


def stream(seed: int, updates: int, per_update: int, n: int) -> np.ndarray:
    return np.concatenate([rows_for_update(seed, update, per_update, n) for update in range(updates)])


@pytest.mark.parametrize(("per_update", "n"), [(4, 10), (7, 7), (3, 50), (25, 10)])
def test_every_epoch_is_a_permutation_also_across_updates(per_update: int, n: int) -> None:
    rows = stream(3, 60, per_update, n)
    for epoch in range(len(rows) // n):
        assert np.array_equal(np.sort(rows[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_stream_does_not_depend_on_how_it_is_cut_in_updates() -> None:
    whole = stream(5, 10, 12, 17)
    for per_update in (1, 2, 3, 4, 6, 8):
        assert np.array_equal(stream(5, 120 // per_update, per_update, 17), whole)


def test_update_needs_no_history() -> None:
    expected = stream(5, 50, 8, 13)[49 * 8 :]
    epoch_order.cache_clear()
    np.random.default_rng(0).random(100)
    assert np.array_equal(rows_for_update(5, 49, 8, 13), expected)


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (1, 2) for epoch in (0, 1)]
    for i, left in enumerate(orders):
        for right in orders[i + 1 :]:
            assert (left == right).mean() < 0.05


def test_order_is_pinned() -> None:
    """Another order would break the resuming of runs started before."""
    assert rows_for_update(1, 0, 8, 20).tolist() == [3, 5, 2, 9, 7, 10, 14, 0]


def test_each_row_is_equally_likely_in_first_place() -> None:
    firsts = np.bincount([epoch_order(9, epoch, 4)[0] for epoch in range(2000)], minlength=4)
    assert (abs(firsts - 500) < 100).all()


def test_large_seeds_and_epochs_are_accepted() -> None:
    assert sorted(rows_for_update(2**63, 10**9, 5, 5).tolist()) == [0, 1, 2, 3, 4]


def test_dtype_and_programmer_errors() -> None:
    assert rows_for_update(1, 3, 4, 9).dtype == np.int64
    for bad in ((1, -1, 4, 9), (1, 0, 0, 9), (1, 0, 4, 0)):
        with pytest.raises(ValueError):
            rows_for_update(*bad)
