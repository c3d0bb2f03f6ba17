"""Exported models of Hugging Face: as transformers saves them, or with a memory and their own code; generation."""

from pathlib import Path

import pytest
import torch
import transformers
from support import write_text
from support.foreign.hf import save_gpt2
from support.hf.exported import exported

from distlm.data.subwords import FIRST_PIECE
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.export.folder import write_export
from distlm.models.export.memory import memory_words, reader_settings
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import HfLM, hf_model

AUTO = transformers.AutoModelForCausalLM
MEMORY = MemoryConfig(kind="resm", positions=[1, 2], sub_keys=8, heads=2, k=4, key_width=8, shared=True, gated=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HfLM:
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder / "gpt2", write_text(folder / "text", train_lines=80))
    dense = hf_model(str(folder / "gpt2"))
    torch.manual_seed(0)
    return HfLM(with_memory(dense, MEMORY, 5), FIRST_PIECE + dense.rows).eval()


def test_a_model_with_memory_generates_as_without_a_cache(model: HfLM, tmp_path: Path) -> None:
    found = exported(model, tmp_path / "hf")
    ids = torch.tensor([[5, 9, 17, 30], [8, 2, 2, 40]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model.hf(ids).logits, rtol=0, atol=1e-5)
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(found.generate(ids, use_cache=True, **given), found.generate(ids, use_cache=False, **given))
    # The values of both layers are one tensor.
    assert len([name for name in found.state_dict() if ".values." in name]) == 1
    first, second = (layer.mlp.memory for layer in found.transformer.h)
    assert second._read[0] is first.values
    with torch.no_grad():
        before = found(ids).logits
        first.values[0].zero_()
        assert not torch.allclose(found(ids).logits, before)


def test_it_is_refused_without_its_code_and_not_written_twice(model: HfLM, tmp_path: Path) -> None:
    exported(model, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"trust_remote_code|distlm_gpt2"):
        AUTO.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    with pytest.raises(DistlmError, match=r"hf: not empty; give another folder"):
        exported(model, tmp_path / "hf")


def test_a_folder_whose_name_may_be_lost_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []

    def broken(path: Path) -> None:
        synced.append(path)
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")

    with monkeypatch.context() as patched:
        patched.setattr("distlm.models.export.folder.sync_folder", broken)
        with pytest.raises(DistlmError, match="/hf: input/output error"):
            write_export(tmp_path / "hf", "hf", fill)
    assert synced[-1] == tmp_path and not [*tmp_path.iterdir()]
    write_export(tmp_path / "hf", "hf", fill)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == b"weights"


def test_a_memory_in_words() -> None:
    assert memory_words(reader_settings(vars(MEMORY), 32)) == (
        ", with shared and gated product-key memory (Lample et al. 2019) of 64 slots beside the feed-forward network "
        "of layers 1, 2, counted from 1"
    )
    plain = reader_settings(vars(MemoryConfig(kind="pkm", positions=[3], sub_keys=8)), 32)
    assert "with product-key memory" in memory_words(plain) and "in place of" in memory_words(plain)
    assert memory_words({}) == ""
