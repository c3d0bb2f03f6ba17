"""Dropout whose masks belong to rows."""

import pytest
import torch

from distlm.models.row_dropout import RowDropout, Rows, row_keys, row_noise

SHAPE = torch.Size((16, 33, 7))


def noise(salt: int = 5, keys: torch.Tensor | None = None, p: float = 0.25) -> torch.Tensor:
    keys = row_keys(1, 3, range(16)) if keys is None else keys
    return row_noise(torch.Size((len(keys), *SHAPE[1:])), keys, salt, p, torch.float32)


def test_a_rows_mask_does_not_depend_on_the_rows_beside_it() -> None:
    whole = noise()
    for first, last in ((0, 4), (4, 5), (5, 16)):
        assert torch.equal(noise(keys=row_keys(1, 3, range(first, last))), whole[first:last])


def test_share_and_expectation() -> None:
    mask = row_noise(torch.Size((64, 4096)), row_keys(1, 0, range(64)), 1, 0.1, torch.float32)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    # Five standard deviations of 262,144 draws.
    assert (mask == 0).double().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / mask.numel()) ** 0.5)
    assert mask.double().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("other", ["update", "seed", "row", "module", "position"])
def test_masks_are_unrelated(other: str) -> None:
    size = torch.Size((32, 4096))
    keys = row_keys(1, 0, range(32))
    first = row_noise(size, keys, 9, 0.5, torch.float32)
    second = {
        "update": lambda: row_noise(size, row_keys(1, 1, range(32)), 9, 0.5, torch.float32),
        "seed": lambda: row_noise(size, row_keys(2, 0, range(32)), 9, 0.5, torch.float32),
        "row": lambda: row_noise(size, row_keys(1, 0, range(1, 33)), 9, 0.5, torch.float32),
        "module": lambda: row_noise(size, keys, 10, 0.5, torch.float32),
        "position": lambda: first.roll(1, 1),
    }[other]()
    # Correlation of 131,072 fair coins: standard deviation 0.0028.
    assert abs(((first - 1) * (second - 1)).mean().item()) < 0.015


def test_module() -> None:
    rows = Rows()
    drop = RowDropout(0.5, rows, "some.name")
    x = torch.randn(16, 8)
    with pytest.raises(ValueError, match="no keys"):
        drop(x)
    assert torch.equal(drop.eval()(x), x)
    drop.train()
    with rows.set(row_keys(1, 0, range(16)), None):
        first = drop(x)
    assert rows.keys is None
    with rows.set(row_keys(1, 0, range(16)), None):
        assert torch.equal(drop(x), first)
        assert not torch.equal(RowDropout(0.5, rows, "another")(x), first)
