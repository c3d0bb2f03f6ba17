"""Dropout whose masks belong to rows."""

import pytest
import torch
from support.present import present

from distlm.models.dropout import dropout
from distlm.models.row_dropout import RowDropout, Rows, drop_with_keys, row_keys

SHAPE = torch.Size((16, 33, 7))


def noise(salt: int = 5, keys: torch.Tensor | None = None, p: float = 0.25) -> torch.Tensor:
    keys = row_keys(1, 3, range(16)) if keys is None else keys
    return drop_with_keys(torch.ones(len(keys), *SHAPE[1:]), p, keys, salt)


def test_a_rows_mask_does_not_depend_on_the_rows_beside_it() -> None:
    whole = noise()
    for first, last in ((0, 4), (4, 5), (5, 16)):
        assert torch.equal(noise(keys=row_keys(1, 3, range(first, last))), whole[first:last])


def test_share_and_expectation() -> None:
    mask = drop_with_keys(torch.ones(64, 4096), 0.1, row_keys(1, 0, range(64)), 1)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    # Five standard deviations of 262,144 draws.
    assert (mask == 0).double().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / mask.numel()) ** 0.5)
    assert mask.double().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_half_precision_keeps_the_expectation(dtype: torch.dtype, p: float) -> None:
    """The scale is not rounded to it: the mean of what is kept, and of its gradient, is that of fp32."""
    keys = row_keys(1, 0, range(64))
    x = (torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) + 1).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    found, wanted = drop_with_keys(x, p, keys, 1), drop_with_keys(wide, p, keys, 1)
    assert torch.equal(found.float(), wanted.to(dtype).float())
    (found * x.detach()).sum().backward()
    (wanted * wide.detach()).sum().backward()
    kept = wanted != 0
    for half, exact in ((found, wanted), (present(x.grad), present(wide.grad))):
        ratio = half[kept].double().mean() / exact[kept].double().mean()
        assert ratio.item() == pytest.approx(1, abs=1e-4)
    torch.manual_seed(3)
    plain = dropout(x.detach(), p, True)
    torch.manual_seed(3)
    assert torch.equal(plain, dropout(wide.detach(), p, True).to(dtype))


@pytest.mark.parametrize("other", ["update", "seed", "row", "module", "position"])
def test_masks_are_unrelated(other: str) -> None:
    ones = torch.ones(32, 4096)
    keys = row_keys(1, 0, range(32))
    first = drop_with_keys(ones, 0.5, keys, 9)
    second = {
        "update": lambda: drop_with_keys(ones, 0.5, row_keys(1, 1, range(32)), 9),
        "seed": lambda: drop_with_keys(ones, 0.5, row_keys(2, 0, range(32)), 9),
        "row": lambda: drop_with_keys(ones, 0.5, row_keys(1, 0, range(1, 33)), 9),
        "module": lambda: drop_with_keys(ones, 0.5, keys, 10),
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
