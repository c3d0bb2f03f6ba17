"""Memory in causal models of Hugging Face: where it stands, what it starts from, dropout by row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_text
from support.foreign.hf import save_gpt2, save_llama
from torch import Tensor, nn

from distlm.data.subwords import FIRST_PIECE
from distlm.errors import DistlmError
from distlm.integrations.taps import default_tap
from distlm.memory.config import MemoryConfig
from distlm.models.described import parameter_count
from distlm.models.hf.description import HfModel
from distlm.models.hf.memory import equip, layers_of, with_memory
from distlm.models.hf.model import HfLM, hf_model, pretrained, require_tap
from distlm.models.row_dropout import row_keys
from distlm.training.memory.objective import objective_of

MEMORY = MemoryConfig(kind="resm", positions=[1, 2], sub_keys=8, heads=2, k=4, key_width=8)
PIECES = 30
FFN = {"gpt2": "transformer.h.{}.mlp", "llama": "model.layers.{}.mlp"}
Save = Callable[[Path, Path], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a GPT-2 that has dropout everywhere, and a Llama that has none."""
    text = write_text(tmp_path_factory.mktemp("memory") / "text", train_lines=80)
    save_gpt2(text.parent / "gpt2", text)
    save_llama(text.parent / "llama", text)
    return text.parent


def made(folder: Path, name: str, **changes: Any) -> HfLM:
    """The model's own weights with a fresh memory."""
    dense = hf_model(str(folder / name))
    model = pretrained(str(folder / name), dense, FIRST_PIECE + PIECES)
    if changes != {"kind": "none"}:
        model.add_memories(with_memory(dense, replace(MEMORY, **changes), 5), None)
    return model


def batch(rows: int = 4, tokens: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.randint(FIRST_PIECE, FIRST_PIECE + PIECES, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def nats(model: HfLM) -> Tensor:
    return objective_of(model, "output").eval()(*batch()).ce


@pytest.mark.parametrize("name", list(FFN))
def test_a_memory_of_zeros_beside_the_ffn_starts_at_the_models_loss(folder: Path, name: str) -> None:
    dense, model = made(folder, name, kind="none"), made(folder, name, values="zero")
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[path]) for path, value in dense.named_parameters())
    assert torch.equal(nats(dense), nats(model)) and not torch.equal(nats(dense), nats(made(folder, name)))


@pytest.mark.parametrize("name", list(FFN))
def test_pkm_stands_in_the_place_of_the_ffn(folder: Path, name: str) -> None:
    """At the middle layer; taps keep their names, and what the plan counts is what is there."""
    model = made(folder, name, kind="pkm", positions=[])
    place = FFN[name].format(1)
    assert list(model.memories) == [2] and model.ffn_names[2] == (f"hf.{place}.",)
    there = [path for path, _ in model.named_parameters() if path.startswith(f"hf.{place}.")]
    assert there and all(".memory." in path for path in there)
    output = model.eval()(batch()[0], tap=f"{place}:output")
    given = model(batch()[0], tap=f"{place}:input").tapped
    assert torch.equal(output.tapped, model.memories[2](given))
    require_tap(model.config, f"{place}:input", "datastore.tap")
    assert parameter_count(model.config, model.vocabulary) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list(FFN))
def test_dropout_belongs_to_rows(folder: Path, name: str) -> None:
    """GPT-2 has it in its embedding, on attention weights and behind each sublayer."""
    objective, (inputs, targets) = (
        objective_of(made(folder, name, query_norm=False, value_dropout=0.2), "output"),
        batch(),
    )
    keys = row_keys(1, 7, range(4))
    whole = objective.train()(inputs, targets, None, None, keys).ce
    parts = [objective(inputs[part], targets[part], None, None, keys[part]).ce for part in (slice(0, 1), slice(1, 4))]
    assert torch.isclose(whole, parts[0] + parts[1], rtol=1e-6)
    assert not torch.isclose(whole, objective(inputs, targets, None, None, row_keys(1, 8, range(4))).ce, rtol=1e-6)


def test_half_precision_leaves_the_memory_in_fp32(folder: Path) -> None:
    model = made(folder, "llama").half()
    table = model.memories[1].table
    assert table.values.dtype == torch.float32 and model.memories[1].retrieval.keys.dtype == torch.float16


class TwoInputs(nn.Module):
    """As Bloom's feed-forward module, which adds the residual itself."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


def test_layers_without_a_feed_forward_module_of_one_input_are_refused(folder: Path) -> None:
    model = made(folder, "gpt2", kind="none")
    for layer in model.hf.transformer.h:
        layer.mlp = TwoInputs()
    with pytest.raises(DistlmError, match="a gpt2, whose layers have no feed-forward module of one input"):
        equip(model.hf, with_memory(model.config, MEMORY, 1).memory, 32, 1, None)


def test_a_layer_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(DistlmError, match=r"memory.positions=\[3\]: the model has layers 1 to 2"):
        made(folder, "gpt2", positions=[3])


def test_a_model_with_a_tower_for_images_gets_its_memory_where_text_is_read() -> None:
    """As many layers as the text has, and in front of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": PIECES, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    hf = AutoModelForCausalLM.from_config(config).eval()
    path, name, layers = layers_of(hf)
    assert (path, name, len(layers)) == ("model.language_model.layers", "mlp", 2)
    assert default_tap(hf) == "model.language_model.layers.1.mlp:input"
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        dense = hf(input_ids=ids).logits
        equip(hf, with_memory(HfModel(config.to_dict(), 32, 64), MEMORY, 5).memory, 32, 5, None)
        assert not torch.equal(hf(input_ids=ids).logits, dense)
