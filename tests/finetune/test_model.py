"""Models with the head of a task: the same numbers as Hugging Face's, and what a fine-tuning starts from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finetune import hugging_face, vocabulary

from distlm.data.shards.wordpiece import WordPiece
from distlm.errors import DistlmError
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.model import TaskModel
from distlm.finetune.source import Source, open_source, start_from_source
from distlm.models.plm.config import FinetuneConfig
from distlm.models.plm.model import with_dropout
from distlm.models.row_dropout import RowDropout, row_keys

FAMILIES = ("bert", "roberta", "distilbert")


def source_of(folder: Path, **settings: Any) -> Source:
    config = FinetuneConfig(checkpoint=str(folder), **settings)
    return open_source(config, folder.parent / "run", folder.parent / "shards")


def build(source: Source, head: Any = "labels", labels: int = 3) -> TaskModel:
    torch.manual_seed(7)
    model = TaskModel(TaskModelConfig(source.backbone, source.memory, 1, head, labels, "t"), source.vocabulary)
    start_from_source(model, source)
    return model.eval()


def some_rows(vocabulary_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, types and mask [3, 9], with padding in two rows."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, vocabulary_size, (3, 9), generator=generator)
    types = torch.zeros_like(tokens)
    types[:, 5:] = 1
    mask = torch.ones_like(tokens).bool()
    mask[1, 6:] = mask[2, 3:] = False
    return tokens.masked_fill(~mask, 0), types, mask


@pytest.mark.parametrize("head", ["labels", "span"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropout_of_ones_own_is_everywhere(family: str, head: Any, tmp_path: Path) -> None:
    source = source_of(hugging_face(tmp_path / "hf", family))
    places = {}
    for p in (None, 0.0, 0.3):
        backbone = source.backbone if p is None else with_dropout(source.backbone, p)
        model = TaskModel(TaskModelConfig(backbone, {}, 1, head, 2, "t"), source.vocabulary)
        places[p] = {name: module.p for name, module in model.named_modules() if isinstance(module, RowDropout)}
    assert places[None].keys() == places[0.0].keys() == places[0.3].keys() and min(places[None].values()) >= 0.1
    assert set(places[0.0].values()) == {0.0} and set(places[0.3].values()) == {0.3}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_hugging_faces_heads(family: str, tmp_path: Path) -> None:
    import transformers

    source = source_of(hugging_face(tmp_path / "hf", family))
    tokens, types, mask = some_rows(source.vocabulary)
    given = {"token_type_ids": types} if family != "distilbert" else {}
    heads = {
        "labels": transformers.AutoModelForSequenceClassification,
        "span": transformers.AutoModelForQuestionAnswering,
    }
    for head, theirs in heads.items():
        labels = 2 if head == "span" else 3
        ours = build(source, head, labels)
        reference = theirs.from_pretrained(tmp_path / "hf", num_labels=labels).eval()
        own = dict(ours.named_parameters())
        assert {f"hf.{name}" for name, _ in reference.named_parameters()} == set(own)
        # The heads are fresh on both sides.
        reference.load_state_dict({name: own[f"hf.{name}"] for name, _ in reference.named_parameters()}, strict=False)
        with torch.no_grad(), ours.rows.set(None, mask):
            scores = ours(tokens, types)
        output = reference(input_ids=tokens, attention_mask=mask.long(), **given)
        wanted = output.logits if head == "labels" else torch.stack((output.start_logits, output.end_logits), -1)
        torch.testing.assert_close(
            scores[mask] if head == "span" else scores, wanted[mask] if head == "span" else wanted
        )


def test_the_encoder_is_the_checkpoints_and_the_head_depends_on_the_seed(tmp_path: Path) -> None:
    source = source_of(hugging_face(tmp_path / "hf"))
    first = dict(build(source).named_parameters())
    torch.manual_seed(8)
    other = TaskModel(TaskModelConfig(source.backbone, {}, 1, "labels", 3, "t"), source.vocabulary)
    start_from_source(other, source)
    for name, value in other.named_parameters():
        same = torch.equal(value, first[name])
        assert same == (name.startswith("hf.bert.") or name.endswith("classifier.bias")), name
    assert source.weights.keys() <= first.keys()


def test_a_checkpoint_without_pooler_gets_a_fresh_one(tmp_path: Path) -> None:
    import transformers

    folder = hugging_face(tmp_path / "hf")
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    shutil.rmtree(folder)
    vocabulary(folder)
    model.save_pretrained(folder)
    source = source_of(folder)
    assert not [name for name in source.weights if "pooler" in name]
    torch.manual_seed(1)
    one = TaskModel(TaskModelConfig(source.backbone, {}, 1, "labels", 2, "t"), source.vocabulary)
    before = one.hf.bert.pooler.dense.weight.clone()
    start_from_source(one, source)
    assert torch.equal(one.hf.bert.pooler.dense.weight, before)


def test_a_checkpoint_in_half_precision_becomes_fp32(tmp_path: Path) -> None:
    import transformers

    folder = hugging_face(tmp_path / "hf")
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    source = source_of(folder)
    assert "float16" in str(source.backbone["dtype"])
    assert {value.dtype for value in build(source).parameters()} == {torch.float32}


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = hugging_face(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layer.1." not in name}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(DistlmError, match=r"hf\.bert\.encoder\.layer\.1\.\S+ is missing there"):
        build(source_of(folder))


def test_dropout_of_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    source = source_of(hugging_face(tmp_path / "hf"))
    model = build(source).train()
    tokens, types, mask = some_rows(source.vocabulary)
    keys = row_keys(1, 4, range(3))
    with torch.no_grad():
        with model.rows.set(keys, mask):
            together = model(tokens, types)
        for row in range(3):
            part = slice(row, row + 1)
            with model.rows.set(keys[part], mask[part]):
                torch.testing.assert_close(model(tokens[part], types[part]), together[part])


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"finetune\.checkpoint is empty, and \S+run has no checkpoint"):
        open_source(FinetuneConfig(), tmp_path / "run", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistlmError, match=r"empty: neither a run directory or checkpoint of distlm, nor"):
        source_of(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(DistlmError, match=r"run: a run directory without a complete checkpoint"):
        source_of(tmp_path / "run")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt")
    with pytest.raises(DistlmError, match=r"gpt: a gpt2; bert, distilbert and roberta are known"):
        source_of(tmp_path / "gpt")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf")
    pieces = WordPiece.load(folder, True).pieces
    other = WordPiece((*pieces, *(f"more{i}" for i in range(200))), True)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other", 64)
    with pytest.raises(DistlmError, match=rf"vocabulary mismatch: a tokenizer of {len(pieces) + 200} pieces"):
        source_of(folder, tokenizer=str(tmp_path / "other"))
    for path in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / path).unlink()
    with pytest.raises(DistlmError, match=r"set finetune\.tokenizer to the folder of the tokenizer"):
        source_of(folder)
    assert source_of(folder, tokenizer=str(vocabulary_folder(tmp_path))).vocabulary == len(pieces)


def vocabulary_folder(tmp_path: Path) -> Path:
    vocabulary(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"
