"""A table of values against a dense one under autograd; what it starts with; what it holds and what it never makes."""

from statistics import NormalDist

import pytest
import torch
from support.memory import READS, WIDTH, backward, dense_gradient, dense_sums, make, make_table, reads
from support.present import present
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlm.errors import DistlmError
from distlm.memory import lookup
from distlm.memory.lookup import products_by_pieces, score_gradients
from distlm.memory.values.random import normal_

GOLDEN = [
    [-0.491300106048584, 0.37881526350975037, 1.3031072616577148],
    [0.7843828797340393, -0.5735201835632324, -0.6453527212142944],
]


def drawn(rows: int, columns: int, seed: int = 1, layer: int = 2, first: int = 0) -> Tensor:
    out = torch.empty(rows, columns)
    normal_(out, 1.0, seed, layer, first)
    return out


def test_first_values_are_normal() -> None:
    numbers = drawn(4000, 100).flatten().double().sort().values
    points = torch.linspace(0.0005, 0.9995, 999)
    wanted = torch.tensor([NormalDist().inv_cdf(float(p)) for p in points]).double()
    places = (points.double() * len(numbers)).long()
    # Five standard errors of a sample quantile.
    error = 5 * (points * (1 - points) / len(numbers)).sqrt() / (torch.exp(-(wanted**2) / 2) / (2 * torch.pi) ** 0.5)
    assert ((numbers[places] - wanted).abs() < error).all()
    assert 4 < numbers[-1] < 6
    table = drawn(4000, 100).double()
    for other in (drawn(4000, 100, layer=3), drawn(4000, 100, seed=2), table.roll(1, 0), table.roll(1, 1)):
        assert (table * other).mean().abs() < 5 / 4e5**0.5


def test_first_values_are_a_function_of_their_place() -> None:
    whole = drawn(300, 37)
    assert torch.equal(drawn(300, 5, first=20), whole[:, 20:25])
    assert torch.equal(drawn(10, 37), whole[:10])
    # Wherever it runs: integers, one look-up, one product and one sum.
    assert drawn(2, 3).tolist() == GOLDEN
    for columns in (2, 4, 5, 20):
        parts = [make_table(columns=columns, column=column) for column in range(columns)]
        assert torch.equal(torch.cat([part.values for part in parts], 1), make_table().values)
    assert make_table().values.std().item() == pytest.approx(WIDTH**-0.5, rel=0.1)
    assert not make_table(values="zero").values.any()


@pytest.mark.parametrize("width", [1, 2, 7, 20, 64])
def test_outputs_and_gradients_are_those_of_a_dense_table(width: int) -> None:
    table, given = make_table(width), reads(1, width=width)
    out, of_weights = backward(table, given)
    values = table.values.double().requires_grad_()
    given.weights.requires_grad_()
    wanted = dense_sums(values, given)
    wanted.backward(given.upstream.double())
    torch.testing.assert_close(out.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_weights, given.weights.grad, rtol=1e-5, atol=1e-6)
    sums = present(table.gradient.take())
    found = torch.zeros(49, width)
    for rows, gradient in sums.by_pieces(64):
        found[rows] = gradient[: len(rows)]
    torch.testing.assert_close(found.double(), values.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(sums.rows, given.slots.unique().long())
    assert table.gradient.bytes == 0


def test_score_gradients_without_the_fused_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    given, values = reads(2), make_table().values
    fused = score_gradients(values, given.slots, given.upstream)
    monkeypatch.setattr(lookup, "_BUFFER_DEVICE", 4 * WIDTH * 10)
    monkeypatch.setattr(lookup, "_products", products_by_pieces)
    torch.testing.assert_close(score_gradients(values, given.slots, given.upstream), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype: torch.dtype) -> None:
    """Sums in fp32, rounded once; what the gradient is made of is kept as it came; the table stays fp32."""
    table, given = make_table(), reads(1)
    table.to(dtype)
    assert table.values.dtype == torch.float32
    assert torch.equal(table.values, make_table().values)
    full, _ = backward(make_table(), given)
    out, of_weights = backward(table, given, dtype)
    assert torch.equal(out, full.to(dtype))
    given.upstream = given.upstream.to(dtype).float()
    _, wanted = backward(make_table(), given)
    assert of_weights.dtype == torch.float32
    assert torch.equal(of_weights, wanted)
    assert table.gradient.bytes == given.slots.numel() * 8 + given.upstream.numel() * 2


def test_what_is_not_trained_keeps_nothing() -> None:
    given = reads(1)
    for table in (make_table(frozen=True), make_table().eval()):
        _, of_weights = backward(table, given)
        assert of_weights.abs().sum() > 0
        assert table.gradient.bytes == 0
    table = make_table()
    with torch.no_grad():
        table(given.slots, given.weights, torch.float32)
    assert table.gradient.bytes == 0
    out = table(given.slots, given.weights, torch.float32)
    out.backward(given.upstream)
    assert table.gradient.bytes > 0
    assert not list(table.parameters())
    assert set(table.state_dict()) == {"values", "columns"} and not list(table.buffers())


def test_columns_that_do_not_divide() -> None:
    with pytest.raises(DistlmError, match=r"memory\.columns=3 does not divide the model's width, 20"):
        make_table(columns=3)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation gave, apart from those in `known` memory."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numbers, self.operation = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                numbers = tensor.untyped_storage().nbytes() // 4
                if numbers > self.numbers:
                    self.numbers, self.operation = numbers, str(func)
        return out


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.1}, {"row_steps": True}, {"stale": "catch_up"}], ids=str)
def test_no_gradient_of_all_slots_and_no_row_for_every_read(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_BUFFER", 1)
    width, tokens, count, slots = 64, 96, 32, 48**2
    table, optimizer = make(width=width, sub_keys=48, **changes)
    for step in range(2):
        given = reads(step, slots, tokens, count, width, share=0.9)
        weights = given.weights.requires_grad_()
        known = [table.values, *table.make_moments(), given.upstream]
        with Largest(known) as largest:
            table(given.slots, weights, torch.float32).backward(given.upstream)
            taken = optimizer.update()
        assert taken.rows[0] > 1400
        # int64 places in the order of reads; three buffers of 64 rows; for stale slots those of 16 such buffers.
        bound = 2 * tokens * count if table.config.stale == "lazy" else 16 * 64 * width
        assert largest.numbers <= max(bound, 3 * 64 * width), largest.operation
        assert largest.numbers < min(slots, tokens * count) * width / 2


def test_gradient_that_is_summed_early_is_the_same() -> None:
    """Folded after every micro-batch, after some, or never: the same bits."""
    results = []
    for limit in (1 << 40, 1, 4000):
        table, optimizer = make()
        table.gradient.limit = limit
        for update in range(3):
            for micro in range(3):
                backward(table, reads(10 * update + micro))
                held = table.gradient.bytes
                assert held <= 49 * (4 * WIDTH + 8) or limit > 1
            optimizer.update(1 / 3)
        results.append([table.values, *table.make_moments()])
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert torch.equal(mine, wanted)


def test_gradient_is_summed_when_it_would_outgrow_that_of_all_slots() -> None:
    table = make_table()
    assert table.gradient.limit == 4 * 49 * WIDTH
    most = 0
    for micro in range(8):
        backward(table, reads(micro))
        most = max(most, table.gradient.bytes)
    one = 12 * (READS * 8 + WIDTH * 4)
    assert most <= table.gradient.limit + one + 49 * (4 * WIDTH + 8)
    wanted = torch.stack([dense_gradient(reads(micro)) for micro in range(8)]).sum(0)
    sums = present(table.gradient.take())
    rows, gradient = next(iter(sums.by_pieces(64)))
    torch.testing.assert_close(gradient[: len(rows)].double(), wanted[rows], rtol=1e-5, atol=1e-6)
