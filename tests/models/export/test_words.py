"""Models over words as transformers has them: ids as in the token files, generation, padding, labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from support import distlm
from support.shared import made_once
from support.store import ready_run

from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.models.export.words import save_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(base: Path) -> None:
        config = ready_run(base)
        distlm("export", "hf", config.run_dir, "--out", str(base / "hf"))

    return made_once(tmp_path_factory, "exported-transformer", make)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)


def test_a_file_has_the_ids_of_its_token_file(folder: Path, tokenizer: Any) -> None:
    tokens = TokenFiles.open(folder / "run" / "tokens")
    for split in ("valid", "test"):
        text = (folder / "text" / f"{split}.txt").read_text("utf-8")
        assert tokenizer(text, add_special_tokens=False).input_ids == tokens.split(split).tolist()
        assert tokenizer(text).input_ids == [Dictionary.EOS, *tokens.split(split).tolist()]
    assert len(tokenizer) == len(tokens.dictionary)


def test_words_are_split_as_in_preparing(tmp_path: Path) -> None:
    dictionary = Dictionary(["a", "b", "<unk>b"], [3, 2, 1])
    save_words(dictionary, tmp_path, 100)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "a b",
        "a\tb\u00a0a\x1cb\x85a\u2003b",
        "a<unk>b <unk> <unk>b ab",
        "  a  \n\n b",
        "",
        "a</s>b a\r\n<pad>",
    ):
        lines = text.split("\n")
        wanted = [i for line in lines for i in [*(dictionary.encode(w) for w in line.split()), Dictionary.EOS]][:-1]
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted, text
    # Only what the data may not hold is read as the special word.
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [Dictionary.EOS]


def slow(model: Any, ids: list[int], words: int) -> list[int]:
    for _ in range(words):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_generation_is_that_of_a_slow_loop_padding_or_not(model: Any, tokenizer: Any) -> None:
    texts = ["w1 w2 w3 w0 w9", "w2", "w4 w4"]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    assert given["attention_mask"][1].tolist() == [0, 0, 0, 0, 1, 1]
    made = model.generate(**given, max_new_tokens=5, do_sample=False)
    beams = model.generate(**given, max_new_tokens=5, do_sample=False, num_beams=3)
    for row, text in enumerate(texts):
        ids = tokenizer(text).input_ids
        assert made[row, 6 - len(ids) :].tolist() == slow(model, ids, 5)
        alone = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, num_beams=3)
        assert beams[row, 6 - len(ids) :].tolist() == alone[0].tolist()


def test_padding_on_either_side_changes_nothing(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("w1 w2 w3").input_ids
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
        for left, right in ((2, 0), (0, 3), (1, 2)):
            row = torch.tensor([[1] * left + ids + [1] * right])
            mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])
            found = model(row, attention_mask=mask).logits[0, left : left + len(ids)]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_the_labels(model: Any, tokenizer: Any) -> None:
    given = tokenizer(["w1 w2 w3 w0", "w5 w1 w2 w2"], return_tensors="pt")
    labels = given.input_ids.clone()
    labels[1, 3:] = -100
    found = model(**given, labels=labels)
    wanted = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)
    found.loss.backward()


def test_batches_of_one_update_add_up_to_its_loss(model: Any, tokenizer: Any) -> None:
    """As transformers' Trainer accumulates: it gives the number of labels, and divides nothing itself."""
    given = tokenizer(["a b a b", "b a a b", "a a b b"], return_tensors="pt")
    labels = given.input_ids.clone()
    labels[1, 2:] = -100
    count = (labels[:, 1:] != -100).sum()

    def gradients(*parts: slice) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            more = {} if len(parts) == 1 else {"num_items_in_batch": count}
            model(given.input_ids[part], labels=labels[part], **more).loss.backward()
        return [value.grad.clone() for value in model.parameters() if value.grad is not None]

    torch.testing.assert_close(gradients(slice(0, 1), slice(1, 2), slice(2, 3)), gradients(slice(0, 3)))
    assert model.model.embedding.embedding_0.grad is model.model.softmax.embedding_0.grad is not None
    model.zero_grad()
    assert model(**given, logits_to_keep=1).logits.shape[1] == 1


def test_it_is_saved_and_loaded_by_transformers(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    given = tokenizer("w1 w2", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
    # One tensor, not two of one value.
    assert again.model.embedding.embedding_0 is again.model.softmax.embedding_0
