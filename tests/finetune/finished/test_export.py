"""`distlm export finetuned`: transformers' own classes read it and give the same logits; a memory comes along."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import distlm
from support.finetune import (
    evaluate,
    finetune_config,
    hugging_face,
    pretrained,
    run,
    sentences,
    settings,
    vocabulary,
    write_sst2,
)  # fmt: skip

from distlm.errors import DistlmError
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.finished.export import save_task_model
from distlm.finetune.model import TaskModel
from distlm.finetune.source import load_task_model, open_finetuned, open_source, start_from_source
from distlm.models.plm.config import FinetuneConfig
from distlm.models.plm.export import from_pretrained
from distlm.runtime.files import read_json

HEADS: dict[str, tuple[Any, int, str]] = {
    "labels": (transformers.AutoModelForSequenceClassification, 3, "MNLI"),
    "number": (transformers.AutoModelForSequenceClassification, 1, "STS-B"),
    "span": (transformers.AutoModelForQuestionAnswering, 2, "SQuAD"),
}
PAIRS = [("good1 word2", "bad1"), ("word3", "word4 word5 word6 good2")]


def logits(output: Any, head: str) -> torch.Tensor:
    return torch.stack((output.start_logits, output.end_logits), -1) if head == "span" else output.logits


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_transformers_reads_it_and_gives_equal_logits(family: str, head: Any, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", family, initializer_range=0.2)
    source = open_source(FinetuneConfig(checkpoint=str(folder)), tmp_path, tmp_path)
    theirs, labels, task = HEADS[head]
    torch.manual_seed(7)
    ours = TaskModel(TaskModelConfig(source.backbone, {}, 1, head, labels, task), source.vocabulary).eval()
    start_from_source(ours, source)
    save_task_model(ours, source.tokenizer, tmp_path / "out")
    model = theirs.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = tokenizer([one for one, _ in PAIRS], [two for _, two in PAIRS], padding=True, return_tensors="pt")
    for row, pair in enumerate(PAIRS):
        kept = given["attention_mask"][row].bool()
        assert given["input_ids"][row][kept].tolist() == source.tokenizer.encode(*pair).ids
    types = given.get("token_type_ids", torch.zeros_like(given["input_ids"]))
    mask = given["attention_mask"].bool()
    with torch.no_grad(), ours.rows.set(None, mask):
        found, wanted = logits(model(**given), head), ours(given["input_ids"], types)
    # Of a span only tokens count.
    where = mask if head == "span" else ...
    torch.testing.assert_close(found[where], wanted[where], rtol=0, atol=1e-5)
    if head == "labels":
        assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    # It comes back as what it was.
    again, _ = load_task_model(tmp_path / "out")
    assert (again.config.head, again.config.labels, again.config.task) == (head, labels, task)
    with torch.no_grad(), again.rows.set(None, mask):
        assert torch.equal(again(given["input_ids"], types)[where], wanted[where])


def test_the_command_exports_the_model_that_was_kept(tmp_path: Path) -> None:
    data, model = write_sst2(tmp_path / "glue"), hugging_face(tmp_path / "hf", initializer_range=0.2)
    given = (f"finetune.checkpoint={model}", "finetune.seeds=[1,2]", "finetune.epochs=1", "finetune.keep_models=true")
    run(finetune_config(tmp_path / "run", data, *given))
    words = ["export", "finetuned", "plm-base", *settings(tmp_path / "run", data, *given), "--out"]
    choose = distlm(*words, str(tmp_path / "out"), check=False)
    assert choose.returncode == 2 and "has seed-1, seed-2; name one of them" in choose.stderr
    distlm("export", "hf", *words[2:], str(tmp_path / "out"), "--seed", "2", "--finetuned", "SST-2")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    result = read_json(tmp_path / "run" / "finetune" / "SST-2" / "seed-2" / "result.json", "")
    assert f"{result['last']['accuracy']:.4f}" in card and "seed 2" in card
    seed = tmp_path / "run" / "finetune" / "SST-2" / "seed-2"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [text for text, _ in sentences(40, 2)]
    with torch.no_grad():
        found = theirs(**tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
    told = np.load(seed / "predictions" / "dev" / "SST-2.logits.npy")
    np.testing.assert_allclose(found.numpy(), told, rtol=0, atol=1e-5)
    # An exported model is evaluated like a kept one.
    summary = evaluate(finetune_config(tmp_path / "new", data, f"finetune.checkpoint={tmp_path / 'out'}"))
    predictions = tmp_path / "new" / "finetune" / "SST-2" / "predictions" / "dev"
    assert (predictions / "SST-2.logits.npy").read_bytes() == (
        seed / "predictions" / "dev" / "SST-2.logits.npy"
    ).read_bytes()
    assert summary["accuracy"] == np.mean([int(row.argmax()) == label for row, (_, label) in zip(
        told, sentences(40, 2), strict=True)])  # fmt: skip
    full = distlm(*words, str(tmp_path / "out"), "--seed", "2", check=False)
    assert full.returncode == 1 and "out: not empty" in full.stderr
    none = distlm(*words, str(tmp_path / "no"), "finetune.name=other", check=False)
    assert none.returncode == 1 and "finetune/other: no fine-tuned model was kept there" in none.stderr


def test_a_memory_comes_along(tmp_path: Path) -> None:
    data, source = write_sst2(tmp_path / "glue"), pretrained(tmp_path / "pretrained")
    given = (f"finetune.checkpoint={source}", "finetune.epochs=1", "finetune.keep_models=true")
    run(finetune_config(tmp_path / "run", data, *given))
    seed = tmp_path / "run" / "finetune" / "SST-2" / "seed-1"
    model, tokenizer = load_task_model(seed)
    save_task_model(model, tokenizer, tmp_path / "out")
    evaluate(finetune_config(tmp_path / "new", data, f"finetune.checkpoint={tmp_path / 'out'}"))
    for name in ("SST-2.tsv", "SST-2.logits.npy"):
        found = tmp_path / "new" / "finetune" / "SST-2" / "predictions" / "dev" / name
        assert found.read_bytes() == (seed / "predictions" / "dev" / name).read_bytes()
    # It is a source: encoder and memory, and the head of another task.
    again = open_source(FinetuneConfig(checkpoint=str(tmp_path / "out")), tmp_path, tmp_path)
    kept = dict(model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in again.weights.items())
    assert kept.keys() - again.weights.keys() == {"hf.classifier.weight", "hf.classifier.bias"}
    run(finetune_config(tmp_path / "next", data, f"finetune.checkpoint={tmp_path / 'out'}", "finetune.epochs=1"))
    values = load_file(tmp_path / "out" / "model.safetensors")["bert.encoder.layer.1.output.memory.values.0"]
    assert torch.equal(values, model.memories[2].table.values)
    with pytest.raises(DistlmError, match=r"out: a fine-tuned model .* predicts no masked tokens"):
        from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "distlm.json").unlink()
    with pytest.raises(DistlmError, match=r"distlm\.json: missing beside config\.json; copy the whole folder"):
        evaluate(finetune_config(tmp_path / "third", data, f"finetune.checkpoint={tmp_path / 'out'}"))


def test_a_head_of_another_task_is_a_fresh_one(tmp_path: Path) -> None:
    model = TaskModel(TaskModelConfig(_tiny(), {}, 1, "labels", 3, "MNLI"), 97)
    tokenizer = vocabulary(tmp_path / "v").tokenizer()
    save_task_model(model, tokenizer, tmp_path / "out")
    source = open_source(FinetuneConfig(checkpoint=str(tmp_path / "out")), tmp_path, tmp_path)
    other = TaskModel(TaskModelConfig(source.backbone, {}, 1, "labels", 2, "RTE"), source.vocabulary)
    start_from_source(other, source)
    assert torch.equal(other.hf.bert.pooler.dense.weight, model.hf.bert.pooler.dense.weight)
    # A kept model has its head with it.
    kept = dataclasses.replace(source, weights=dict(model.named_parameters()))
    start_from_source(other, kept)
    with pytest.raises(DistlmError, match=r"hf\.classifier\.weight is \[3, 32\] there, \[2, 32\] by"):
        start_from_source(other, kept, whole=True)


@pytest.mark.parametrize("name", ["mnli", "MNLI", None])
def test_labels_in_another_order_are_refused(name: str | None, tmp_path: Path) -> None:
    model = TaskModel(TaskModelConfig(_tiny(), {}, 1, "labels", 3, "MNLI"), 97)
    save_task_model(model, vocabulary(tmp_path / "v").tokenizer(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**read_json(path, ""), "finetuning_task": name}), "utf-8")
    config = FinetuneConfig(task="MNLI", checkpoint=str(tmp_path / "out"))
    found = open_finetuned(config).task
    assert found is not None and found.task == ("MNLI" if name else "")
    tree = read_json(path, "")
    for others in (["contradiction", "entailment", "neutral"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]):
        tree["id2label"] = {str(number): label for number, label in enumerate(others)}
        path.write_text(json.dumps(tree), "utf-8")
        with pytest.raises(DistlmError, match=rf"its labels are numbered {', '.join(others)}"):
            open_finetuned(config)


def _tiny() -> dict[str, Any]:
    return {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 0,
    }  # fmt: skip
