"""The transformer language model against an independent second writing of it, its invariants and its taps."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from support.present import present

from distlm.errors import DistlmError
from distlm.models.described import parameter_count
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TAPS, DecoderLayer, TransformerLM, sinusoidal_positions

# Test folders are no packages, so a helper beside the test is loaded by its path.
_spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
assert _spec and _spec.loader
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

TINY = TransformerConfig(layers=3, width=32, heads=4, ffn_width=48, cutoffs=[20, 45], factor=2, max_positions=24)
VOCABULARY, EDGES = 80, [0, 20, 45, 80]


def model(config: TransformerConfig = TINY, seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    built = TransformerLM(config, VOCABULARY)
    # Away from initialisation, so that biases and norms are seen to be used.
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def layer_of(lm: TransformerLM, number: int) -> DecoderLayer:
    layer = lm.layers[number]
    assert isinstance(layer, DecoderLayer)
    return layer


def words(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_agrees_with_the_reference() -> None:
    lm = model().eval()
    weights = dict(lm.named_parameters())
    inputs, targets = words(2, 9), words(2, 9, seed=2)
    for tap in TAPS:
        out = lm(inputs, tap=tap)
        for row in range(2):
            expected = reference.states(weights, TINY, EDGES, inputs[row].tolist())
            torch.testing.assert_close(out.tapped[row], expected[tap], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(out.hidden[row], expected["output"], atol=2e-4, rtol=1e-4)
    log_probs = lm.log_probs(out.hidden.view(18, -1), targets.view(18))
    expected = [
        reference.log_prob(weights, EDGES, h, t)
        for h, t in zip(out.hidden.view(18, -1), targets.view(18).tolist(), strict=True)
    ]
    assert {reference.band_of(t, EDGES) for t in targets.view(18).tolist()} == {0, 1, 2}
    torch.testing.assert_close(log_probs, torch.stack(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("width", [8, 33, 192])
def test_positions_follow_the_formula(width: int) -> None:
    table = sinusoidal_positions(40, width, torch.float32, torch.device("cpu"))
    assert table.shape == (40, width)
    for t in (0, 1, 7, 39):
        expected = reference.position_vector(t + 2, width - width % 2)
        torch.testing.assert_close(table[t, : width - width % 2], expected, atol=5e-6, rtol=1e-5)
    assert table[:, width - width % 2 :].eq(0).all()


def test_position_table_cached_in_inference_serves_training() -> None:
    config = dataclasses.replace(TINY, width=40)
    lm = model(config)
    with torch.inference_mode():
        lm(words(1, 5))
    lm.log_probs(lm(words(1, 5)).hidden[0], words(1, 5)[0]).sum().backward()
    assert lm.embedding.embedding(0).grad is not None


def test_no_position_sees_later_tokens() -> None:
    lm = model().eval()
    inputs = words(1, 12)
    changed = inputs.clone()
    changed[0, 7:] = words(1, 5, seed=9)[0]
    before, after = lm(inputs).hidden, lm(changed).hidden
    torch.testing.assert_close(before[0, :7], after[0, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[0, 7], after[0, 7], atol=1e-2)


def test_right_padding_changes_nothing() -> None:
    lm = model().eval()
    inputs = words(2, 11)
    padded = torch.full((2, 20), 1)
    padded[:, :11] = inputs
    torch.testing.assert_close(lm(padded).hidden[:, :11], lm(inputs).hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tap", TAPS)
def test_stopping_at_a_tap_gives_the_same_bits_and_skips_the_rest(tap: str) -> None:
    lm = model().eval()
    inputs = words(3, 10)
    full, stopped = lm(inputs, tap=tap), lm(inputs, tap=tap, stop_at_tap=True)
    assert stopped.hidden is None
    assert torch.equal(full.tapped, stopped.tapped)
    assert torch.equal(full.hidden, lm(inputs).hidden)
    last = layer_of(lm, -1)
    calls: list[str] = []
    for name, module in (("attention", last.attention), ("fc1", last.fc1), ("fc2", last.fc2)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    lm(inputs, tap=tap, stop_at_tap=True)
    steps = ["attention", "fc1", "fc2"]
    assert calls == steps[: {"last_attention_residual": 0, "last_attention_input": 0, "output": 3}.get(tap, 1)]


def test_taps_are_what_their_names_say() -> None:
    lm = model().eval()
    inputs, last = words(2, 6), layer_of(lm, -1)
    seen = {tap: lm(inputs, tap=tap).tapped for tap in TAPS}
    assert torch.equal(last.ffn_norm(seen["last_ffn_residual"]), seen["last_ffn_input"])
    assert torch.equal(last.attention_norm(seen["last_attention_residual"]), seen["last_attention_input"])
    assert torch.equal(seen["output"], lm(inputs).hidden)


def test_bad_requests_name_the_field() -> None:
    lm = model()
    with pytest.raises(DistlmError, match=r"'ffn'.*last_ffn_input"):
        lm(words(1, 3), tap="ffn")
    with pytest.raises(DistlmError, match=r"25 tokens.*model\.max_positions=24"):
        lm(words(1, 25))
    with pytest.raises(DistlmError, match=r"model\.width=30.*model\.heads=4"):
        TransformerLM(dataclasses.replace(TINY, width=30), VOCABULARY)
    with pytest.raises(DistlmError, match=r"model\.factor=8"):
        TransformerLM(dataclasses.replace(TINY, factor=8), VOCABULARY)


@pytest.mark.parametrize("targets", [[5, 6, 7], [25, 30], [50, 79], []], ids=["head", "tail 1", "tail 2", "none"])
def test_every_parameter_gets_a_gradient_even_when_its_band_is_empty(targets: list[int]) -> None:
    lm = model()
    chosen = torch.tensor(targets, dtype=torch.int64)
    hidden = lm(torch.tensor([targets or [5]])).hidden[0, : len(targets)]
    (-lm.log_probs(hidden, chosen).sum()).backward()
    missing = [name for name, parameter in lm.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(present(parameter.grad).isfinite().all() for parameter in lm.parameters())
    if targets == [5, 6, 7]:
        assert present(lm.embedding.embedding(1).grad).eq(0).all()
        assert present(lm.embedding.projection(2).grad).eq(0).all()
        assert present(lm.softmax.class_weight.grad).ne(0).any()


def test_gradient_is_that_of_the_loss() -> None:
    config = dataclasses.replace(TINY, layers=1, width=8, heads=2, ffn_width=8, factor=2)
    lm = model(config).double().eval()
    inputs, targets = words(1, 6), torch.tensor([4, 19, 20, 44, 45, 79])

    def loss() -> torch.Tensor:
        # The model's log-softmax is fp32; the full one in fp64 is what finite differences need.
        hidden = lm(inputs).hidden[0]
        head = torch.log_softmax(lm.softmax._head_logits(hidden), 1)
        tails = [torch.log_softmax(lm.softmax._tail_logits(i, hidden), 1) + head[:, 19 + i, None] for i in (1, 2)]
        return -torch.cat([head[:, :20], *tails], 1).gather(1, targets[:, None]).sum()

    (-lm.log_probs(lm(inputs).hidden[0], targets).sum()).backward()
    for name, parameter in lm.named_parameters():
        place = int(present(parameter.grad).abs().argmax())
        flat = parameter.data.view(-1)
        ends = []
        for shift in (1e-5, -2e-5):
            flat[place] += shift
            with torch.no_grad():
                ends.append(loss().item())
        flat[place] += 1e-5
        slope = (ends[0] - ends[1]) / 2e-5
        assert present(parameter.grad).view(-1)[place].item() == pytest.approx(slope, rel=2e-3, abs=1e-5), name


def test_a_small_vocabulary_needs_no_tails() -> None:
    config = dataclasses.replace(TINY, cutoffs=[80, 200])
    lm = model(config).eval()
    assert lm.softmax.tails == 0
    hidden = lm(words(1, 5)).hidden[0]
    full = lm.full_log_probs(hidden)
    assert full.shape == (5, 80)
    torch.testing.assert_close(full.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(lm.log_probs(hidden, words(1, 5)[0]), full.gather(1, words(1, 5)[0][:, None]).squeeze(1))


def test_initialisation_follows_fairseq() -> None:
    torch.manual_seed(3)
    config = TransformerConfig(layers=1, width=256, heads=4, ffn_width=512, cutoffs=[2000, 4000])
    lm = TransformerLM(config, 9000)
    for band, width in enumerate((256, 64, 16)):
        assert lm.embedding.embedding(band).std().item() == pytest.approx(width**-0.5, rel=0.02)
        bound = math.sqrt(6 / (256 + width))
        assert 0.97 * bound < lm.embedding.projection(band).abs().max().item() <= bound
    assert lm.embedding.embedding(0)[1].eq(0).all()
    layer = layer_of(lm, 0)
    bound = math.sqrt(6 / 512) / math.sqrt(2)
    assert 0.99 * bound < layer.attention.qkv.weight.abs().max().item() <= bound
    assert 0.99 * math.sqrt(6 / 512) < layer.attention.out.weight.abs().max().item() <= math.sqrt(6 / 512)
    assert 0.99 * math.sqrt(6 / 768) < layer.fc1.weight.abs().max().item() <= math.sqrt(6 / 768)
    for linear in (layer.attention.out, layer.fc1, layer.fc2):
        assert linear.bias.eq(0).all()
    again = TransformerLM(config, 9000)
    torch.manual_seed(3)
    same = TransformerLM(config, 9000)
    assert torch.equal(lm.softmax.class_weight, same.softmax.class_weight)
    assert not torch.equal(lm.softmax.class_weight, again.softmax.class_weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lm = TransformerLM(TINY, VOCABULARY).eval()
    inputs, targets = words(2, 16), words(2, 16, seed=4).view(-1)
    exact = lm.log_probs(lm(inputs).hidden.view(32, -1), targets)
    lm = lm.to(dtype)
    out = lm(inputs, tap="last_ffn_input")
    assert out.tapped.dtype == dtype
    rounded = lm.log_probs(out.hidden.view(32, -1), targets)
    assert rounded.dtype == torch.float32
    assert rounded.isfinite().all()
    tolerance = 0.02 if dtype == torch.float16 else 0.15
    torch.testing.assert_close(rounded, exact, atol=tolerance, rtol=0)
    lm.train()
    lm.log_probs(lm(inputs).hidden.view(32, -1), targets).sum().backward()
    assert all(present(parameter.grad).isfinite().all() for parameter in lm.parameters())


def test_dropout_acts_in_training_only() -> None:
    lm = model()
    inputs = words(1, 8)
    assert not torch.equal(lm(inputs).hidden, lm(inputs).hidden)
    lm.eval()
    assert torch.equal(lm(inputs).hidden, lm(inputs).hidden)


def test_parameter_count_is_what_the_model_holds() -> None:
    assert parameter_count(TINY, VOCABULARY) == sum(p.numel() for p in model().parameters())
