"""The AWD-LSTM: weight drop acts, the five masks have their shapes and scales; in eval mode it is the plain LSTM."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.sim.devices import ON_DEVICE
from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.models.awd_lstm import model as awd_lstm
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.lstm import WeightDropLstm
from distlm.models.awd_lstm.model import AwdLstm, Columns
from distlm.models.dropout import dropout

DEVICES = ["cpu", ON_DEVICE]
OFF = {f"{name}_dropout": 0.0 for name in ("embedding", "input", "hidden", "output", "weight")}
V = 42


def model_of(**settings: float) -> AwdLstm:
    torch.manual_seed(1)
    return AwdLstm(LstmConfig(**{"layers": 3, "width": 8, "hidden_width": 12, **OFF, **settings}), V)  # type: ignore[arg-type]


def words(tokens: int = 6, rows: int = 4) -> Tensor:
    return torch.randint(2, V, (tokens, rows), generator=torch.Generator().manual_seed(2))


def layer_of(p: float, device: str) -> WeightDropLstm:
    torch.manual_seed(3)
    return WeightDropLstm(5, 7, p).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_raw_weight_has_a_gradient_exactly_where_the_mask_keeps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def dropped(weight: Tensor, p: float, training: bool) -> Tensor:
        masks.append(torch.bernoulli(torch.full_like(weight, 1 - p)) / (1 - p))
        return weight * masks[-1]

    monkeypatch.setattr("distlm.models.awd_lstm.lstm.dropout", dropped)
    layer = layer_of(0.5, device).train()
    # Three steps from a state that is not zero: every hidden-to-hidden product counts.
    state = tuple(torch.randn(1, 2, 7, device=device) for _ in range(2))
    output, _ = layer(torch.randn(3, 2, 5, device=device), state)
    output.square().sum().backward()
    assert layer.weight_hh.grad is not None
    assert 0.3 < float((masks[0] > 0).float().mean()) < 0.7
    assert torch.equal(layer.weight_hh.grad != 0, masks[0] > 0)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_act_from_the_second_step_on_and_only_in_training(device: str) -> None:
    layer = layer_of(0.5, device)
    hidden = torch.randn(4, 2, 5, device=device)
    one, other = (layer.train()(hidden, layer.zero_state(2))[0] for _ in range(2))
    assert torch.equal(one[0], other[0]), "h is zero before the first step, so its weights do not matter"
    assert not torch.isclose(one[1], other[1]).all()
    one, other = (layer.eval()(hidden, layer.zero_state(2))[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_dropped_weights_are_those_of_torch_s_lstm(device: str) -> None:
    """The same numbers as nn.LSTM that was given the masked weights, forward and backward: no stale flat buffer."""
    layer = layer_of(0.4, device).train()
    hidden = torch.randn(5, 3, 5, device=device)
    torch.manual_seed(9)
    output, (h, c) = layer(hidden, layer.zero_state(3))
    reference = nn.LSTM(5, 7).to(device)
    torch.manual_seed(9)
    ours = (layer.weight_ih, dropout(layer.weight_hh, 0.4, True), layer.bias_ih, layer.bias_hh)
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), ours, strict=True):
            parameter.copy_(value)
    expected, (h0, c0) = reference(hidden)
    for mine, theirs in ((output, expected), (h, h0), (c, c0)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.weight_ih.grad, reference.weight_ih_l0.grad, rtol=1e-4, atol=1e-5)


def test_state_dict_holds_the_raw_weights_and_nothing_else() -> None:
    model = model_of(weight_dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.stream(words(), model.zero_states(4))
    names = {f"layers.{i}.{name}" for i in range(3) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert set(before) == names | {"embedding", "decoder_bias"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_eval_is_a_stack_of_torch_s_lstms_with_a_tied_decoder() -> None:
    model = model_of(**{name: 0.5 for name in OFF}).eval()
    hidden = model.embedding[words() - 2]
    for layer, (before, after) in zip(model._layers(), pairwise([8, 12, 12, 8]), strict=True):
        reference = nn.LSTM(before, after)
        with torch.no_grad():
            for parameter, value in zip(reference.parameters(), layer.parameters(), strict=True):
                parameter.copy_(value)
        hidden = reference(hidden)[0]
    output = model(words().t(), tap="last_output")
    assert torch.equal(output.hidden, output.tapped)
    torch.testing.assert_close(output.hidden.transpose(0, 1), hidden, rtol=1e-5, atol=1e-6)
    scores = F.log_softmax(hidden[-1] @ model.embedding.t() + model.decoder_bias, dim=1)
    torch.testing.assert_close(model.full_log_probs(hidden[-1])[:, 2:], scores)
    targets = torch.tensor([2, 3, 7, 41])
    torch.testing.assert_close(model.log_probs(hidden[-1], targets), scores[torch.arange(4), targets - 2])


def test_initial_values() -> None:
    model = model_of()
    assert 0.09 < float(model.embedding.abs().max()) <= 0.1
    assert not model.decoder_bias.any()
    for layer, width in zip(model._layers(), (12, 12, 8), strict=True):
        for parameter in layer.parameters():
            assert 0.8 * width**-0.5 < float(parameter.abs().max()) <= width**-0.5


def scaled(kept: Tensor, p: float) -> Iterator[bool]:
    yield bool(torch.isclose(kept[kept != 0], torch.tensor(1 / (1 - p)), rtol=1e-3).all())
    yield bool((kept == 0).any() and (kept != 0).any())


def test_embedding_dropout_drops_whole_words_of_the_input_alone() -> None:
    model = model_of(embedding_dropout=0.4)
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    text = words(30, 6)
    model.train().stream(text, model.zero_states(6))
    kept = (seen[0] / model.embedding[text - 2]).detach()
    assert torch.equal((kept > 0).any(-1), (kept > 0).all(-1)), "a word's embedding is there as a whole or not at all"
    assert all(scaled(kept, 0.4))
    for word in text.unique():
        assert len((kept[..., 0] > 0)[text == word].unique()) == 1, "and everywhere in the update"


@pytest.mark.parametrize(("name", "layer"), [("input", 0), ("hidden", 1), ("hidden", 2)])
def test_locked_dropout_is_one_mask_per_column_for_all_steps(name: str, layer: int) -> None:
    plain, model = model_of(), model_of(**{f"{name}_dropout": 0.3})
    seen: list[list[Tensor]] = [[], []]
    for found, one in zip(seen, (plain, model), strict=True):
        one.layers[layer].register_forward_pre_hook(lambda _, arguments, found=found: found.append(arguments[0]))
    torch.manual_seed(5)
    model.train().stream(words(), model.zero_states(4))
    torch.manual_seed(5)
    if name == "hidden" and layer == 2:
        plain = model_of(hidden_dropout=0.3)
    plain.train().stream(words(), plain.zero_states(4))
    masked = seen[1][0]
    zero = (masked == 0).all(0)
    assert torch.equal((masked == 0).any(0), zero), "the same elements in every step"
    assert zero.any() and not zero.all()
    assert not torch.equal(zero[0], zero[1]), "a mask of its own for each column"
    if layer == 0:
        assert all(scaled((masked / seen[0][0]).detach(), 0.3))


def test_output_dropout_is_locked_and_leaves_the_raw_output() -> None:
    model = model_of(output_dropout=0.3).train()
    output = model.stream(words(), model.zero_states(4))
    kept = (output.dropped / output.raw).detach()
    assert torch.equal(kept[0] > 0, kept[-1] > 0) and all(scaled(kept, 0.3))


def test_parts_of_a_batch_have_the_masks_of_the_whole() -> None:
    model = model_of(**{name: 0.4 for name in OFF}).train()
    torch.manual_seed(7)
    whole = model.stream(words(), model.zero_states(4))
    parts = []
    for first in (0, 2):
        torch.manual_seed(7)
        parts.append(model.stream(words()[:, first : first + 2], model.zero_states(2), Columns(first, 4)))
    torch.testing.assert_close(torch.cat([part.dropped for part in parts], 1), whole.dropped)


def test_state_carried_over_a_cut_gives_the_uncut_reading() -> None:
    model = model_of().eval()
    whole = model.stream(words(9), model.zero_states(4))
    first = model.stream(words(9)[:4], model.zero_states(4))
    second = model.stream(words(9)[4:], first.states)
    torch.testing.assert_close(torch.cat([first.raw, second.raw]), whole.raw)


def test_right_padding_and_other_rows_change_nothing() -> None:
    model = model_of().eval()
    text = words().t()
    padded = F.pad(text, (0, 3), value=1)
    torch.testing.assert_close(model(padded).hidden[:, :6], model(text).hidden)
    torch.testing.assert_close(model(text[:1]).hidden, model(text).hidden[:1])


def test_taps() -> None:
    assert awd_lstm.TAPS == ("last_output",)
    model = model_of().eval()
    assert model(words().t(), tap="last_output", stop_at_tap=True).hidden is None
    with pytest.raises(DistlmError, match="no such hidden state; choose one of last_output"):
        model(words(), tap="last_ffn_input")
