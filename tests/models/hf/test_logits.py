"""Models whose forward does something to the softmax layer's output: their own logits, through their own code."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distlm.errors import DistlmError
from distlm.models.described import parameter_count
from distlm.models.hf.logits import OwnLogits, logits_of
from distlm.models.hf.model import FIRST_PIECE, HfLM, hf_model, pretrained, wrapped
from distlm.models.io import load_model, save_model

PIECES = 60
SIZES: dict[str, Any] = {
    "vocab_size": PIECES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {**SIZES, "head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "granite": {**SIZES, "logits_scaling": 8.0},
    "cohere": {**SIZES, "logit_scale": 0.0625},
    "bert": {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"} | {"is_decoder": True},
}
"""Capped, divided, multiplied, projected before."""


def save(folder: Path, kind: str, sizes: dict[str, Any]) -> Any:
    """A random model with large weights, so that a cap shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter *= 3
    hf.save_pretrained(folder)
    return hf


def read(folder: Path) -> HfLM:
    config = hf_model(str(folder))
    config.line_end = 7
    return pretrained(str(folder), config, FIRST_PIECE + PIECES)


@pytest.mark.parametrize("kind", SCALED)
def test_log_probabilities_are_those_of_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    hf = save(tmp_path / "model", kind, SCALED[kind])
    model = read(tmp_path / "model")
    rows = torch.randint(8, PIECES, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model(rows + FIRST_PIECE).hidden[0]
        expected = hf(input_ids=rows).logits[0].log_softmax(1)
        one = model.log_probs(hidden[:-1], rows[0, 1:] + FIRST_PIECE)
        full = model.full_log_probs(hidden)
        plain = hf.get_output_embeddings()(hidden).log_softmax(1)
    assert torch.allclose(one, expected[:-1].gather(1, rows[0, 1:, None])[:, 0], atol=1e-5)
    assert torch.allclose(full[:, FIRST_PIECE + 8 :], expected[:, 8:], atol=1e-5)
    assert (plain - expected).abs().max() > 0.1, "the softmax layer alone would have done"
    # The stub is no part of the model: saved and loaded it is the same one.
    assert sum(value.numel() for value in model.parameters()) == parameter_count(model.config, FIRST_PIECE + PIECES)
    save_model(model, tmp_path / "saved", {"dictionary": "d", "step": 0})
    loaded: Any = load_model(tmp_path / "saved")[0]
    with torch.inference_mode():
        assert torch.equal(loaded.log_probs(hidden[:-1], rows[0, 1:] + FIRST_PIECE), one)


def test_gradients_go_through_the_cap(tmp_path: Path) -> None:
    save(tmp_path / "model", "gemma2", SCALED["gemma2"])
    model = read(tmp_path / "model").train()
    rows = torch.arange(8, 20)[None]
    model.log_probs(model(rows + FIRST_PIECE).hidden[0, :-1], rows[0, 1:] + FIRST_PIECE).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_few_logits_are_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", "gemma2", SCALED["gemma2"])
    model, seen = read(tmp_path / "model"), list[int]()
    monkeypatch.setattr("distlm.models.hf.model.chunk_rows", lambda *_: 4)
    head = model._head
    head.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
    with torch.inference_mode():
        model.log_probs(torch.randn(11, 32), torch.full((11,), 9))
    assert seen == [4, 4, 3]


def test_a_softmax_layer_alone_stays_one(tmp_path: Path) -> None:
    hf = save(tmp_path / "model", "llama", SIZES)
    assert logits_of(hf) is hf.get_output_embeddings()
    hidden = torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.allclose(OwnLogits(hf)(hidden), hf.get_output_embeddings()(hidden))


def test_another_width_than_the_last_states_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": PIECES, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "max_position_embeddings": 64, "word_embed_proj_dim": 16}  # fmt: skip
    save(tmp_path / "model", "opt", sizes)
    with pytest.raises(DistlmError, match=r"a opt, whose logits are not a function of its last hidden state of width"):
        read(tmp_path / "model")


AHEAD: dict[str, dict[str, Any]] = {
    "bert": SCALED["bert"] | {"is_decoder": False},
    "roberta": SCALED["bert"] | {"is_decoder": False, "max_position_embeddings": 70, "pad_token_id": 1},
    "xlnet": {"vocab_size": PIECES, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
}
"""Encoders that AutoModelForCausalLM loads as well."""


@pytest.mark.parametrize("kind", AHEAD)
def test_a_model_that_sees_the_tokens_to_come_is_refused(kind: str, tmp_path: Path) -> None:
    hf = save(tmp_path / "model", kind, AHEAD[kind])
    refused = rf"a {kind} that sees the tokens behind .*is_decoder=true"
    with pytest.raises(DistlmError, match=refused):
        wrapped(hf, PIECES, 7)
    with pytest.raises(DistlmError, match=refused):
        read(tmp_path / "model")


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_taken_in_any_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where a token's experts have more rows when a later token comes to them."""
    sizes = SCALED["bert"] if kind == "bert" else SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    hf = save(tmp_path / "model", kind, sizes)
    assert wrapped(hf.to(dtype), PIECES, 7).vocabulary == FIRST_PIECE + PIECES
