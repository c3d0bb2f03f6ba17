"""A run of a Hugging Face model with a product-key memory: as a KnnLM, in `generate`, and in lm_eval."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.hf.runs import Made, made_run

import distlm
from distlm.errors import DistlmError
from distlm.integrations.reading import of_run
from distlm.knnlm.evaluate.losses import Losses
from distlm.memory.layer import ProductKeyMemory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made_run(tmp_path_factory, "gemma2", memory=True)


def memory_of(knn: distlm.KnnLM) -> ProductKeyMemory:
    return next(module for module in knn.model.modules() if isinstance(module, ProductKeyMemory))


def test_numbers_are_those_of_knn_evaluate(made: Made) -> None:
    nats = {name: Losses.open(made.run.losses, "valid", name).nats for name in ("lm", "knn")}
    knn, text = distlm.KnnLM.of_run(made.run.root), made.split("valid")
    found = knn.log_probs(text, lam=knn.mixing.lam, context_window=32, block=32, batch_blocks=4)
    assert np.abs(found.lm + nats["lm"]).max() < 1e-5 and np.abs(found.mixture + nats["knn"]).max() < 1e-5
    assert of_run(made.run.root).log_prob(text) == pytest.approx(-nats["knn"].sum(), rel=1e-5)
    # The memory is read.
    with torch.no_grad():
        memory_of(knn).table.values.add_(1.0)
    assert np.abs(knn.log_probs(text).lm - found.lm).max() > 1e-3


def test_generation_with_and_without_cache_in_a_padded_batch(made: Made) -> None:
    knn = distlm.KnnLM.of_run(made.run.root)
    processor = distlm.KnnLogitsProcessor(knn, lam=0.5, temperature=2.0, k=8)
    begin = knn.lm.config.begin
    given = {"input_ids": torch.tensor([[begin, 5, 6, 7], [0, 0, begin, 8]]),
             "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])}  # fmt: skip
    words = {"logits_processor": [processor], "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    kept, anew = (knn.model.generate(**given, **words, use_cache=cache) for cache in (True, False))
    assert torch.equal(kept, anew)
    mixing = knn.mixed(0.5, 2.0, 8)
    assert kept[1, 4] == knn.pieces(knn.scorer(mixing).next_word(np.array([12])).argmax()[None].numpy())[0]


def test_a_store_in_a_folder_is_of_the_memorys_values_too(made: Made, tmp_path: Path) -> None:
    text = made.split("train")
    knn = _round(made).add(text, tmp_path / "store", block=64)
    _round(made).add(text, tmp_path / "store", block=64)
    other = _round(made)
    with torch.no_grad():
        memory_of(other).table.values.mul_(2.0)
    with pytest.raises(DistlmError, match=r"begun with other settings .*model \(checkpoint\)"):
        other.add(text, tmp_path / "store", block=64)
    assert knn.rows == len(knn.ids(text))


def _round(made: Made) -> distlm.KnnLM:
    """The run's model and tokenizer, without its store."""
    knn = distlm.KnnLM.of_run(made.run.root)
    return distlm.KnnLM(knn.model, knn.subwords.tokenizer, line_end=knn.subwords.pieces[knn.subwords.line_end])
