"""`distlm finetune`: it learns, with the memory's values updated or frozen; it resumes; its results and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.finetune import BAD, FILLER, GOOD, finetune_config, hugging_face, lines, pretrained, run, write_sst2
from support.foreign.trackers import scalars

from distlm.errors import DistlmError, Stopped
from distlm.finetune.job import FinetuneJob, train_config
from distlm.finetune.plan import plan_finetune
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.files import load_table
from distlm.memory.values.table import ValueTable
from distlm.models.plm.config import FinetuneConfig, PlmTraining
from distlm.optim.schedule import learning_rate
from distlm.runtime.plan import StagePlan
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stage import open_stage
from distlm.training.dsconfig import load_ds_config
from distlm.training.microbatch import MicroBatchPlan

LEARN = ("finetune.epochs=4", "finetune.lr=0.01")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sst2(tmp_path / "glue")


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    return found


def tables(folder: Path) -> dict[str, torch.Tensor]:
    """FILE/TENSOR of all memory files in the newest checkpoint below a folder."""
    newest = sorted(folder.glob("checkpoints/step-*"))[-1]
    return {
        f"{path.name}/{name}": value
        for path in sorted(newest.glob("memory-*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_it_learns_from_a_hugging_face_encoder(tmp_path: Path, data: Path) -> None:
    model = hugging_face(tmp_path / "hf", initializer_range=0.2)
    given = (f"finetune.checkpoint={model}", "finetune.seeds=[1,2,3]", "train.trackers=[tensorboard]", *LEARN)
    summary = run(finetune_config(tmp_path / "run", data, *given))
    assert summary["accuracy"] > 0.75 > summary["majority"] == 0.55
    folder = tmp_path / "run" / "finetune" / "SST-2"
    assert scalars(folder / "seed-2" / "tensorboard" / "train")["train/loss"]
    assert scalars(tmp_path / "run" / "tensorboard" / "finetune")["stage/seconds"]
    found = results_of(folder)
    each = [found["seeds"][seed]["last"]["accuracy"] for seed in ("1", "2", "3")]
    assert found["median"]["accuracy"] == summary["accuracy"] == sorted(each)[1]
    assert found["rows"] == {"train": 96, "dev": 40} and found["memory"] == {} and found["memory_values"] is None
    epochs = found["seeds"]["1"]["epochs"]
    # 96 rows are 6 updates of 16.
    assert [epoch["update"] for epoch in epochs] == [6, 12, 18, 24]
    best = found["seeds"]["1"]["best_epoch"]["accuracy"]
    assert best == max(epoch["accuracy"] for epoch in epochs)
    rates = [line["train/lr"] for line in lines(folder / "seed-1" / "metrics.jsonl") if "train/lr" in line]
    assert all(0 <= rate <= 0.01 for rate in rates)
    # Only the results are kept.
    assert not list(folder.glob("seed-*/checkpoints/step-*"))
    # Nothing is left to do; a further seed is done alone.
    before = (folder / "seed-1" / "metrics.jsonl").read_bytes()
    # As a kill between the result and the removal leaves it.
    (folder / "seed-1" / "checkpoints" / "step-00000024").mkdir(parents=True)
    run(finetune_config(tmp_path / "run", data, *given, "finetune.seeds=[1,4]"))
    assert (folder / "seed-1" / "metrics.jsonl").read_bytes() == before
    assert list(results_of(folder)["seeds"]) == ["1", "2", "3", "4"]
    assert not list(folder.glob("seed-*/checkpoints/step-*"))


@pytest.mark.parametrize("kind", ["pkm", "resm"])
@pytest.mark.parametrize("values", ["updated", "frozen"])
def test_it_learns_with_a_memory(kind: str, values: str, tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained", kind)
    given = (f"finetune.checkpoint={source}", f"finetune.memory={values}", "finetune.keep_models=true", *LEARN)
    summary = run(finetune_config(tmp_path / "run", data, *given))
    assert summary["accuracy"] > 0.75
    folder = tmp_path / "run" / "finetune" / ("SST-2" if values == "updated" else "SST-2-frozen")
    before, after = tables(source), tables(folder / "seed-1")
    values_before, values_after = (
        {name: value for name, value in found.items() if name.endswith("/values")} for found in (before, after)
    )
    assert values_before.keys() == values_after.keys() and len(values_before) == 2
    for name, value in values_before.items():
        assert torch.equal(value, values_after[name]) == (values == "frozen")
    # What the queries of the new text are like is learnt in any case.
    assert not any(torch.equal(before[n], after[n]) for n in before if n.endswith("running_mean"))
    moved = [float(after[name].abs().max()) for name in after if name.endswith("exp_avg")]
    # The pretraining's moments, uniform in [0, 1], are forgotten.
    assert all(largest < 0.5 for largest in moved) and bool(moved) == (values == "updated")
    found = results_of(folder)
    assert found["memory_values"] == values and list(found["memory"]) == ["1", "2"]
    for layer in found["memory"].values():
        for when in ("before", "after"):
            measures = layer[when]
            assert 0 < measures["top1_mu"] <= measures["mu"] <= 1 and measures["kl_u"] >= 0 and measures["kl_w"] >= 0
            assert measures["labels"].keys() == {"1|0"} and 0 <= measures["labels"]["1|0"]["iou"] <= 1
    # At the end of each epoch they are logged, those of labels under the same names; the last are the seed's result.
    *_, last = (line for line in lines(folder / "seed-1" / "metrics.jsonl") if "dev/accuracy" in line)
    after_two = found["seeds"]["1"]["memory"]["2"]["after"]
    assert last["memory/2/dev/top1_mu"] == after_two["top1_mu"]
    assert {name: last[f"memory/2/dev/labels/1|0/{name}"] for name in ("kl", "iou")} == after_two["labels"]["1|0"]
    # What it tells apart, it looks up apart.
    assert found["memory"]["2"]["after"]["labels"]["1|0"]["kl"] > found["memory"]["2"]["before"]["labels"]["1|0"]["kl"]


def test_what_stale_slots_had_yet_to_move_they_move_as_the_pretraining_would(tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained", stale="catch_up", lr=0.01)
    given = ("finetune.memory=frozen", "finetune.keep_models=true", "finetune.memory_lr=0.5", "finetune.epochs=1")
    run(finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}", *given))
    table = ValueTable(MemoryConfig(stale="catch_up", lr=0.01, sub_keys=8, values="zero"), 32, 2, 1, Exchange.alone())
    load_table(table, source / "checkpoints" / "step-00000007", 2)
    owed = table.values.clone()
    table.settle()
    after = tables(tmp_path / "run" / "finetune" / "SST-2-frozen" / "seed-1")
    (values,) = (value for name, value in after.items() if "memory-02" in name and name.endswith("/values"))
    assert torch.equal(values, table.values) and not torch.equal(values, owed)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_it_learns_in_half_precision_with_fp32_values(precision: str, tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained")
    half = (f"finetune.precision={precision}", "finetune.keep_models=true")
    summary = run(finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}", *half, *LEARN))
    assert summary["accuracy"] > 0.75
    after = tables(tmp_path / "run" / "finetune" / "SST-2" / "seed-1")
    moved = [(value, tables(source)[name]) for name, value in after.items() if name.endswith("/values")]
    # Steps of 1e-3 and less, which half precision would round away.
    assert all(value.dtype == torch.float32 and 1e-4 < (value - old).abs().max() < 0.05 for value, old in moved)


def test_measures_of_use_are_those_of_the_reads(tmp_path: Path, data: Path) -> None:
    """Counted anew, row by row, without padding, with the pretrained model."""
    from distlm.finetune.source import open_source
    from distlm.finetune.tasks.glue import TASKS, read_glue
    from distlm.memory import measures
    from distlm.models.plm.config import FinetuneConfig
    from distlm.models.plm.io import load_plm

    source = pretrained(tmp_path / "pretrained")
    summary = finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}", "finetune.epochs=1")
    run(summary)
    found = results_of(tmp_path / "run" / "finetune" / "SST-2")["memory"]["2"]["before"]
    model, _ = load_plm(source / "checkpoints" / "step-00000007")
    config = FinetuneConfig(checkpoint=str(source))
    tokenizer = open_source(config, tmp_path, source / "shards").tokenizer
    dev = read_glue(TASKS["SST-2"], FinetuneConfig(data_dir=str(data)))["dev"]
    counts = {0: np.zeros(64), 1: np.zeros(64)}
    reads = np.zeros(64)
    for text, label in zip(dev.first, dev.labels.tolist(), strict=True):
        tokens = torch.tensor([tokenizer.encode(text).ids])
        mask = torch.ones_like(tokens).bool()
        counted = mask.clone()
        counted[:, [0, -1]] = False
        with torch.no_grad(), model.rows.set(None, mask, counted), model.memories[2].measure() as usage:
            model(tokens)
        counts[label] += usage.counts().top1.numpy()
        reads += usage.counts().reads.numpy()
    assert found["mu"] == measures.used_share(reads)
    assert found["top1_mu"] == measures.used_share(counts[0] + counts[1])
    assert found["kl_u"] == pytest.approx(measures.divergence_from_uniform(reads))
    assert found["labels"]["1|0"]["kl"] == pytest.approx(measures.class_divergence(counts[1], counts[0]))
    assert found["labels"]["1|0"]["iou"] == pytest.approx(measures.intersection_over_union(counts[1], counts[0]))


@pytest.mark.parametrize("values", ["updated", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_as_one_that_was_not(values: str, tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained")
    given = (
        f"finetune.checkpoint={source}", f"finetune.memory={values}", "finetune.seeds=[1,2]", "finetune.micro_rows=8",
        "finetune.name=x",
    )  # fmt: skip
    whole = finetune_config(tmp_path / "whole", data, *given)
    run(whole)
    stops = 0
    for _ in range(9):
        try:
            run(finetune_config(tmp_path / "parts", data, *given, "finetune.max_updates_this_run=7"))
            break
        except Stopped as stop:
            assert "run the same command again" in str(stop)
            stops += 1
    # 12 updates for each seed.
    assert stops == 2
    one, other = (results_of(tmp_path / name / "finetune" / "x") for name in ("whole", "parts"))
    for seed in ("1", "2"):
        for name in ("epochs", "memory", "data_fingerprint"):
            assert one["seeds"][seed][name] == other["seeds"][seed][name]
    assert one["median"] == other["median"]


def test_a_kept_model_is_a_source_and_a_model(tmp_path: Path, data: Path) -> None:
    from distlm.finetune.source import load_task_model

    source = pretrained(tmp_path / "pretrained")
    kept = ("finetune.keep_models=true", "finetune.memory=frozen", *LEARN)
    run(finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}", *kept))
    folder = tmp_path / "run" / "finetune" / "SST-2-frozen" / "seed-1"
    model, tokenizer = load_task_model(next(folder.glob("checkpoints/step-*")))
    right = 0
    for line in (data / "SST-2" / "dev.tsv").read_text("utf-8").splitlines()[1:]:
        text, label = line.split("\t")
        tokens = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad(), model.rows.set(None, torch.ones_like(tokens).bool()):
            right += int(model(tokens, torch.zeros_like(tokens)).argmax()) == int(label)
    found = results_of(folder.parent)
    assert right / 40 == found["median"]["accuracy"] > 0.75
    # The next fine-tuning starts where this one ended: it knows the words already.
    again = ("finetune.epochs=1", "finetune.lr=0.003")
    assert run(finetune_config(tmp_path / "next", data, f"finetune.checkpoint={folder}", *again))["accuracy"] > 0.6


def test_all_kinds_of_task(tmp_path: Path) -> None:
    """Three labels with two dev sets, a number, answers: each ends with its metrics."""
    model = hugging_face(tmp_path / "hf", initializer_range=0.2)
    random = np.random.default_rng(0)
    folder = tmp_path / "glue"
    (folder / "MNLI").mkdir(parents=True)
    labels = ("entailment", "neutral", "contradiction")
    for name, count in (("train", 48), ("dev_matched", 12), ("dev_mismatched", 11)):
        rows = [f"{GOOD[i % 3]}\t{BAD[i % 2]}\t{labels[i % 3]}" for i in random.permutation(count)]
        text = "\n".join(["sentence1\tsentence2\tgold_label", *rows])
        (folder / "MNLI" / f"{name}.tsv").write_text(text, "utf-8")
    (folder / "STS-B").mkdir()
    for name, count in (("train", 40), ("dev", 13)):
        rows = [f"{GOOD[i % 6]}\t{FILLER[i % 4]}\t{(i % 6) * 0.9:.3f}" for i in random.permutation(count)]
        (folder / "STS-B" / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]), "utf-8")
    given = (f"finetune.checkpoint={model}", "finetune.epochs=6", "finetune.lr=0.01")
    found = run(finetune_config(tmp_path / "run", folder, *given, "finetune.task=MNLI"))
    assert found["accuracy"] > 0.8 and found["accuracy_mismatched"] > 0.8 and found["majority"] < 0.5
    found = run(finetune_config(tmp_path / "run", folder, *given, "finetune.task=STS-B"))
    assert found["pearson"] > 0.8 and found["spearman"] > 0.8 and found["majority"] == 0.0


def test_it_learns_to_answer(tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "hf", initializer_range=0.2)
    random = np.random.default_rng(0)
    folder = tmp_path / "squad"
    folder.mkdir()
    for split, count in (("train", 80), ("dev", 20)):
        paragraphs = []
        for number in range(count):
            words = list(random.choice(FILLER, int(random.integers(10, 40))))
            place = int(random.integers(len(words)))
            words[place:place] = [str(random.choice(GOOD))]
            context = " ".join(words)
            answer = {"text": words[place], "answer_start": context.index("good")}
            asked = [{"id": f"{split}{number}", "question": "bad1?", "answers": [answer]}]
            paragraphs.append({"context": context, "qas": asked})
        tree = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}-v1.1.json").write_text(json.dumps(tree), "utf-8")
    given = (f"finetune.checkpoint={model}", "finetune.epochs=6", "finetune.lr=0.01", "finetune.stride=12")
    found = run(finetune_config(tmp_path / "run", folder, *given, "finetune.task=SQuAD"))
    assert found["exact_match"] > 0.8 and found["f1"] >= found["exact_match"] and found["majority"] < 0.5


def test_other_settings_and_data_are_refused(tmp_path: Path, data: Path) -> None:
    model = hugging_face(tmp_path / "hf")
    given = (f"finetune.checkpoint={model}", "finetune.epochs=1")
    run(finetune_config(tmp_path / "run", data, *given))
    with pytest.raises(DistlmError, match=r"finetune\.lr: 0\.003 there, 0\.01 now.*finetune\.name="):
        run(finetune_config(tmp_path / "run", data, *given, "finetune.lr=0.01"))
    write_sst2(tmp_path / "glue", train=90)
    with pytest.raises(DistlmError, match=r"finetune\.data: "):
        run(finetune_config(tmp_path / "run", data, *given))
    # Under a name of its own it is another one.
    run(finetune_config(tmp_path / "run", data, *given, "finetune.lr=0.01", "finetune.name=other"))


def test_bad_input_is_refused_with_one_clear_error(tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained")
    from_source = f"finetune.checkpoint={source}"

    def refused(message: str, *given: str) -> None:
        with pytest.raises(DistlmError, match=message):
            run(finetune_config(tmp_path / "run", data, *given))
        assert not (tmp_path / "run" / "finetune").exists()

    refused(
        r"finetune\.micro_rows=5 does not divide finetune\.rows_per_update=16", from_source, "finetune.micro_rows=5"
    )
    refused(r"finetune\.length=128: \S+ takes rows of at most 64 tokens", from_source, "finetune.length=128")
    refused(r"no RTE/train\.tsv in it", from_source, "finetune.task=RTE")
    other = tmp_path / "vocab.txt"
    pieces = (source / "shards" / "tokenizer" / "vocab.txt").read_text("utf-8").splitlines()
    other.write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]) + "\n", "utf-8")
    refused(r"vocab\.txt: vocabulary mismatch: not the vocabulary that", from_source, f"finetune.tokenizer={other}")
    shutil.move(source / "shards", tmp_path / "elsewhere")
    refused(r"no tokenizer at .*; set finetune\.tokenizer to the vocab\.txt", from_source)
    found = f"finetune.tokenizer={tmp_path / 'elsewhere' / 'tokenizer'}"
    (file,) = source.glob("checkpoints/*/memory-02-*")
    file.rename(tmp_path / "memory")
    refused(r"memory-02-\S+: damaged \(missing, .*copy the whole checkpoint folder", from_source, found)
    (tmp_path / "memory").rename(file)
    file.write_bytes(file.read_bytes()[:100])
    refused(r"memory-02-\S+: damaged \(100 bytes, ", from_source, found)


def test_what_is_not_set_is_table_3() -> None:
    glue = train_config(FinetuneConfig(task="CoLA").with_defaults(), seed=2, rows=8551)
    # 10 epochs of 8551 rows by 32: the last update begins an eleventh.
    assert (glue.lr, glue.weight_decay, glue.updates, glue.warmup_updates, glue.seed) == (2e-5, 0.1, 2673, 160, 2)
    config = FinetuneConfig(task="SQuAD", memory="frozen").with_defaults()
    squad = train_config(config, seed=1, rows=88524)
    assert (squad.lr, squad.weight_decay, squad.updates, squad.warmup_updates) == (5e-5, 0.01, 8300, 498)
    assert (config.length, config.stride, config.name) == (384, 128, "SQuAD-frozen")
    # The rate rises from 0 to its peak and falls to 0.
    rates = [learning_rate(glue, update) for update in (0, 80, 160, 2673)]
    assert rates == pytest.approx([0, 1e-5, 2e-5, 0])
    own = FinetuneConfig(task="SQuAD", lr=1e-4, epochs=1, weight_decay=0.0, name="mine").with_defaults()
    assert (own.lr, own.epochs, own.weight_decay, own.name) == (1e-4, 1, 0.0, "mine")


def test_the_plan_counts_updates_and_memory(tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained")
    plan = plan_finetune(finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}"), 2)
    assert "SST-2: 1 seeds, each 12 updates of 16 rows (2 epochs of 96; 40 rows of dev)" in plan.work
    frozen = plan_finetune(
        finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}", "finetune.memory=frozen"), 2
    )
    assert plan.disk_bytes - frozen.disk_bytes == 2 * 8 * 2 * 64 * 32
    with pytest.raises(
        DistlmError,
        match=r"3 ranks do not divide it; set \S+rows_per_update=15 and \S+micro_rows=15; or start 2 ranks",
    ):
        plan_finetune(finetune_config(tmp_path / "run", data, f"finetune.checkpoint={source}"), 3)


def test_the_plan_counts_activations_and_what_a_save_holds(tmp_path: Path, data: Path) -> None:
    def planned(*more: str, ranks: int = 1) -> StagePlan:
        # No model is there yet: BERT-base is assumed.
        settings = (f"finetune.checkpoint={tmp_path / 'none'}", "finetune.rows_per_update=32", "finetune.length=128")
        return plan_finetune(finetune_config(tmp_path / "run", data, *settings, *more), ranks)

    # Of 32 rows of 128 tokens; three kinds of attention weights, which are kept for dropout alone.
    weights = 12 * 3 * 12 * 128
    activations = 4 * 32 * 128 * (12 * (12 * 768 + 3 * 3072) + weights)
    states, saved = 110_000_000 * 4 * 6, 110_000_000 * 4 * 2
    whole = planned()
    assert whole.device_bytes == pytest.approx(states + activations, rel=0.1)
    assert whole.memory_bytes == whole.device_bytes and whole.host_bytes == saved
    assert whole.device_bytes - planned("finetune.micro_rows=8").device_bytes == activations * 3 // 4
    assert whole.device_bytes - planned("finetune.dropout=0").device_bytes == 4 * 32 * 128 * weights
    # Few rows at a time: a save needs more.
    few = planned("finetune.micro_rows=2")
    assert few.memory_bytes - few.device_bytes == saved - activations // 16


def test_offload_is_planned_and_advised_by_its_own_settings(tmp_path: Path, data: Path) -> None:
    source = pretrained(tmp_path / "pretrained")
    settings = [f"finetune.checkpoint={source}", "finetune.deepspeed=zero2-offload"]
    away = plan_finetune(finetune_config(tmp_path / "run", data, *settings), 2)
    kept = plan_finetune(finetune_config(tmp_path / "run", data, settings[0], "finetune.deepspeed=zero2"), 2)
    assert "ZeRO 2 (optimizer in the host's memory)" in away.work and "host" not in kept.work
    assert away.host_bytes > kept.host_bytes and 0 < away.device_bytes < kept.device_bytes
    # Without an engine: of what it takes to say it.
    job = object.__new__(FinetuneJob)
    job.deepspeed, job.comm = load_ds_config("zero1"), SingleComm()
    job.train, job.micro = PlmTraining(micro_blocks=32), MicroBatchPlan(32, 1, 1)
    said = job.needs_less()
    assert said.startswith("Set finetune.micro_rows below 32 (") and "another finetune.name" in said
    assert "finetune.deepspeed=zero1-offload" in said and "train." not in said


def test_a_refused_start_leaves_the_directory_free(tmp_path: Path, data: Path) -> None:
    config = finetune_config(tmp_path / "run", data, f"finetune.checkpoint={tmp_path / 'nowhere'}")
    with pytest.raises(DistlmError), open_stage("finetune", config) as stage:
        from distlm.finetune.stage import run_finetune

        run_finetune(stage)
    assert not (tmp_path / "run" / "configs" / "finetune.yaml").exists()
