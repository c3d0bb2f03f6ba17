"""The wrapper of Hugging Face's models: taps by module path, probabilities over the dictionary's ids, refusals."""

import copy
import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import write_text
from support.foreign.hf import save_gpt2, save_llama
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from distlm.data.dictionary import Dictionary
from distlm.data.records import TokenizerFacts
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.described import parameter_count
from distlm.models.hf.description import HfModel
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import FIRST_PIECE, HfLM, hf_model, pretrained, require_tap
from distlm.models.io import load_model, save_model

PIECES = 300
MEMORY = MemoryConfig(kind="resm", positions=[1, 2], sub_keys=8, heads=2, k=4, key_width=8, shared=True, gated=True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = write_text(tmp_path_factory.mktemp("models") / "text", train_lines=80)
    return save_gpt2(text.parent / "gpt2", text, extra_rows=12)


@pytest.fixture(scope="module")
def model(gpt2: Path) -> HfLM:
    config = hf_model(str(gpt2))
    config.line_end = 7
    return pretrained(str(gpt2), config, FIRST_PIECE + PIECES)


def rows() -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(FIRST_PIECE, FIRST_PIECE + PIECES, (3, 20))
    ids[:, 5] = Dictionary.EOS
    return ids


def by_hand(model: HfLM, path: str, side: str) -> Tensor:
    """What torch's own hook sees."""
    found: list[Tensor] = []
    module = model.hf.get_submodule(path)
    hook = module.register_forward_hook(
        lambda _module, given, output: found.append(given[0] if side == "input" else output)
    )
    pieces = rows() - FIRST_PIECE
    pieces[:, 5] = 7
    with torch.inference_mode():
        model.hf(input_ids=pieces)
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("path", "side"), [
    ("transformer.h.1.mlp", "input"), ("transformer.h.0.ln_2", "output"), ("transformer.h.1.attn.c_proj", "output"),
])  # fmt: skip
def test_a_tap_is_what_a_hook_sees(model: HfLM, path: str, side: str) -> None:
    with torch.inference_mode():
        output = model(rows(), tap=f"{path}:{side}")
        stopped = model(rows(), tap=f"{path}:{side}", stop_at_tap=True)
    assert torch.equal(output.tapped, by_hand(model, path, side)) and torch.equal(stopped.tapped, output.tapped)
    assert stopped.hidden is None
    assert torch.equal(model(rows()).hidden, model(rows(), tap="output").tapped) and model(rows()).tapped is None


def test_right_padding_and_threads_change_nothing(model: HfLM) -> None:
    """Threads share the modules, and may even want different taps."""
    taps, ids = ["transformer.h.1.mlp:input", "transformer.h.0.mlp:output"] * 8, rows()

    @torch.inference_mode()
    def passed(tap: str) -> Tensor:
        return model(ids, tap=tap).tapped

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(passed, taps))
    assert all(torch.equal(found, passed(tap)) for found, tap in zip(together, taps, strict=True))
    longer = torch.cat([ids, torch.full((3, 9), Dictionary.PAD)], dim=1)
    with torch.inference_mode():
        assert torch.allclose(model(longer).hidden[:, :20], model(ids).hidden, atol=1e-5)


def test_probabilities_are_the_models_own(model: HfLM) -> None:
    ids = rows()[0]
    with torch.inference_mode():
        hidden = model(ids[None]).hidden[0]
        full, one = model.full_log_probs(hidden), model.log_probs(hidden[:-1], ids[1:])
        pieces = ids - FIRST_PIECE
        pieces[5] = 7
        logits = model.hf(input_ids=pieces[None]).logits[0]
    assert logits.shape[1] == PIECES + 12 and full.shape[1] == FIRST_PIECE + PIECES
    expected = logits.log_softmax(1)
    assert torch.allclose(one, expected[:-1].gather(1, pieces[1:, None])[:, 0], atol=1e-5)
    assert torch.allclose(full[:-1].gather(1, ids[1:, None])[:, 0], one, atol=1e-5)
    # The rows without a piece have the rest.
    assert torch.allclose(full.exp().sum(1), 1 - expected[:, PIECES:].exp().sum(1), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_and_loaded_it_computes_the_same(gpt2: Path, tmp_path: Path, name: str) -> None:
    """Llama's rotary angles are no parameters: a loaded model must have them too."""
    folder = gpt2 if name == "gpt2" else save_llama(tmp_path / "llama", gpt2.parent / "text")
    config = hf_model(str(folder))
    model = pretrained(str(folder), config, FIRST_PIECE + 20)
    save_model(model, tmp_path / "model", {"dictionary": "d", "step": 0})
    loaded, card = load_model(tmp_path / "model")
    ids = rows().clamp(max=FIRST_PIECE + 19)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).hidden, model(ids).hidden)
    assert card.kind == "hf" and card.config["width"] == 32 and card.config["max_positions"] == 96
    assert parameter_count(config, FIRST_PIECE + 20) == sum(value.numel() for value in model.parameters())
    assert (
        json.loads((tmp_path / "model" / "model.json").read_text("utf-8"))["config"]["backbone"]["model_type"] == name
    )


def test_rotary_angles_stay_fp32_in_half_precision(gpt2: Path, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", gpt2.parent / "text")
    model = pretrained(str(folder), hf_model(str(folder)), FIRST_PIECE + 20)
    before = dict(model.named_buffers())["hf.model.rotary_emb.inv_freq"].clone()
    torch.nn.Sequential(model).bfloat16()
    after = dict(model.named_buffers())["hf.model.rotary_emb.inv_freq"]
    assert torch.equal(after, before) and after.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        assert model(rows().clamp(max=FIRST_PIECE + 19)).hidden.dtype == torch.bfloat16


def test_unknown_taps_and_long_rows_are_refused(gpt2: Path, model: HfLM) -> None:
    config = hf_model(str(gpt2))
    require_tap(config, "output", "datastore.tap")
    require_tap(config, "transformer.h.1.mlp:input", "datastore.tap")
    for tap, shown in (
        ("last_ffn_input", r"datastore.tap='last_ffn_input': .* transformer.h.1.ln_1, .*transformer.h.1.mlp"),
        ("transformer.h.2.mlp:input", r"MODULE:input or MODULE:output .* transformer.h.1.mlp"),
        ("transformer.h.1.mlp", "no such hidden state; choose output, or MODULE:input"),
    ):
        with pytest.raises(DistlmError, match=shown):
            require_tap(config, tap, "datastore.tap")
    with pytest.raises(DistlmError, match=r"gives a state of \[3, 20, 128\], not one of width 32 for every token"):
        model(rows(), tap="transformer.h.1.mlp.c_fc:output")
    for tap in ("lm_head:input", "transformer.wte:input"):
        with pytest.raises(DistlmError, match=r"the module is not run, or has no such side"):
            model(rows(), tap=tap)
    with pytest.raises(DistlmError, match=r"a sequence of 97 tokens is longer than the model's max_positions=96"):
        model(torch.full((1, 97), 9))


class Tokens:
    """As much of token files as hf_model looks at."""

    def __init__(self, tokenizer: TokenizerFacts | None) -> None:
        self.folder, self.tokenizer = Path("tokens"), tokenizer


def test_models_that_do_not_fit_are_refused(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"hf.name is empty"):
        hf_model("")
    with pytest.raises(DistlmError, match=r"no folder or name on the hub that transformers can read as a causal model"):
        hf_model(str(tmp_path))
    with pytest.raises(DistlmError, match=r"token files of words, .*data.tokenizer="):
        hf_model(str(gpt2), Tokens(None))  # type: ignore[arg-type]
    with pytest.raises(DistlmError, match=r"vocabulary mismatch: made with a tokenizer of 400 pieces, .* has 312 rows"):
        hf_model(str(gpt2), Tokens(TokenizerFacts("h", 400, 0, "")))  # type: ignore[arg-type]
    facts = TokenizerFacts("h", 300, 5, "")
    assert hf_model(str(gpt2), Tokens(facts), "none").line_end == 5  # type: ignore[arg-type]


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=40).save_pretrained(tmp_path / "t5")
    with pytest.raises(DistlmError, match=r"a t5, an encoder with a decoder"):
        hf_model(str(tmp_path / "t5"))


def test_a_model_without_all_of_its_weights_is_refused(gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(gpt2 / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text("utf-8"), "utf-8")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DistlmError, match=r"no weights of transformer.h.1.mlp.c_fc.weight; get the whole model"):
        pretrained(str(tmp_path), hf_model(str(tmp_path)), 304)


def test_rows_are_told_from_a_nested_configuration() -> None:
    assert HfModel({"model_type": "x", "vocab_size": 5}).rows == 5
    assert HfModel({"model_type": "x", "text_config": {"vocab_size": 6}}).rows == 6


@pytest.mark.parametrize("memory", [False, True])
def test_a_model_that_has_run_is_copied_and_pickled_like_any_module(model: HfLM, memory: bool) -> None:
    if memory:
        torch.manual_seed(0)
        model = HfLM(with_memory(model.config, MEMORY, 5), model.vocabulary).eval()
    tap = "transformer.h.1.attn:output"
    with torch.inference_mode():
        wanted = model(rows(), tap=tap)
        scores = model.full_log_probs(wanted.hidden[0])
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    for each in [*copies, averaged.module]:
        with torch.inference_mode():
            found = each(rows(), tap=tap)
            assert torch.equal(found.hidden, wanted.hidden) and torch.equal(found.tapped, wanted.tapped)
            assert torch.equal(each.full_log_probs(found.hidden[0]), scores)
        # They share nothing: not the hooks either.
        next(each.parameters()).data.zero_()
        each.unhook()
        with torch.inference_mode():
            assert torch.equal(model(rows(), tap=tap).tapped, wanted.tapped)


def test_settings_of_generation_are_kept_where_they_say_more_than_the_configuration(
    gpt2: Path, model: HfLM, tmp_path: Path
) -> None:
    assert not model.config.generation and "generation" not in model.config.recorded(), "as in files of older versions"
    shutil.copytree(gpt2, instruct := tmp_path / "instruct")
    # top_p without do_sample: transformers would not save it.
    says = {"bos_token_id": 0, "eos_token_id": [3, 5, 7], "top_p": 0.8, "repetition_penalty": 1.05, "pad_token_id": 0}
    (instruct / "generation_config.json").write_text(json.dumps(says), "utf-8")
    config = hf_model(str(instruct))
    of_it = pretrained(str(instruct), config, FIRST_PIECE + PIECES)
    assert {key: config.recorded()["generation"][key] for key in says} == says
    save_model(of_it, tmp_path / "checkpoint", {"dictionary": "d", "step": 0})
    kept, _ = load_model(tmp_path / "checkpoint")
    theirs, ours = cast(Any, kept.hf), cast(Any, of_it.hf)
    given = ours.generation_config.to_dict()
    assert theirs.generation_config.to_dict() == given and given["eos_token_id"] == [3, 5, 7]
    ids = torch.tensor([[5, 9, 17, 30]])
    assert torch.equal(theirs.generate(ids), ours.generate(ids))
    (instruct / "generation_config.json").unlink()
    assert not hf_model(str(instruct)).generation
