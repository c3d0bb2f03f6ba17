"""Fine-tuning goes on from the checkpoint that pretraining left in the same run directory, and does what a plain loop
over Hugging Face's model does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.finetune import finetune_config, hugging_face, write_sst2
from support.plm import memory_of, plm_config, tiny_shards
from torch import Tensor

from distlm.data.order import rows_for_update
from distlm.errors import DistlmError
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.model import TaskModel
from distlm.finetune.source import open_source
from distlm.finetune.stage import run_finetune
from distlm.finetune.tasks.glue import TASKS, read_glue
from distlm.runtime.files import read_json
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train

PRETRAINING = ["memory.kind=resm", "train.updates=6", "train.lr=0.01"]


def write_task(folder: Path) -> Path:
    """SST-2 of the words of the shards."""
    random = np.random.default_rng(3)
    (folder / "SST-2").mkdir(parents=True)
    for split, count in (("train", 48), ("dev", 16)):
        rows = [f"w{1 + i % 2} w{random.integers(3, 20)}\t{i % 2}" for i in range(count)]
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", "utf-8")
    return folder


def test_after_pretraining(tmp_path: Path) -> None:
    shards, run = tiny_shards(tmp_path), tmp_path / "run"
    with open_stage("train", plm_config(shards, run, *PRETRAINING)) as stage:
        run_train(stage)
    settings = [
        f"finetune.data_dir={write_task(tmp_path / 'glue')}", "finetune.length=24", "finetune.seeds=[1]",
        "finetune.epochs=1", "finetune.memory=frozen", "finetune.keep_models=true",
    ]  # fmt: skip
    with open_stage("finetune", plm_config(shards, run, *PRETRAINING, *settings)) as stage:
        found: dict[str, Any] = run_finetune(stage)
    assert 0 <= found["accuracy"] <= 1 and found["majority"] == 0.5
    before, after = memory_of(run, 3), memory_of(run / "finetune" / "SST-2-frozen" / "seed-1", 3)
    assert torch.equal(before["values"], after["values"])
    # Other settings of the pretraining are those of another run.
    other = plm_config(shards, run, *PRETRAINING, "train.seed=5", *settings)
    with pytest.raises(DistlmError, match=r"train\.seed: 1 there, 5 now"), open_stage("finetune", other):
        pass


@pytest.mark.parametrize(("dropout", "setting"), [(0.0, -1), (0.3, 0)])
def test_a_plain_loop_over_hugging_faces_model_ends_the_same(tmp_path: Path, dropout: float, setting: float) -> None:
    """Without dropout, the checkpoint's own or ours: their model, torch's AdamW, one row after another, no padding."""
    import transformers

    model = hugging_face(tmp_path / "hf", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    data = tmp_path
    write_sst2(data, train=40, dev=10)
    config = finetune_config(
        tmp_path / "run", data, f"finetune.checkpoint={model}", "finetune.micro_rows=4", "finetune.rows_per_update=8",
        "finetune.weight_decay=0.1", "finetune.clip_norm=0.5", "finetune.warmup=0.2", "finetune.lr=0.01",
        f"finetune.dropout={setting}",
    )  # fmt: skip
    with open_stage("finetune", config) as stage:
        run_finetune(stage)
    epochs = read_json(tmp_path / "run" / "finetune" / "SST-2" / "seed-1" / "result.json", "result")["epochs"]
    source = open_source(config.finetune, tmp_path, tmp_path)
    torch.manual_seed(1)
    start = TaskModel(TaskModelConfig(source.backbone, {}, 1, "labels", 2, "SST-2"), source.vocabulary)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    theirs.load_state_dict({
        name: value if "pooler" in name or "classifier" in name else source.weights[f"hf.{name}"]
        for name, value in ((n.removeprefix("hf."), v) for n, v in start.named_parameters())
    }, strict=False)  # fmt: skip
    theirs.bert.pooler.load_state_dict(
        {n: source.weights[f"hf.bert.pooler.{n}"] for n in ("dense.weight", "dense.bias")}
    )
    splits = read_glue(TASKS["SST-2"], config.finetune)

    def losses(split: str, numbers: list[int]) -> Tensor:
        found = []
        for number in numbers:
            tokens = torch.tensor([source.tokenizer.encode(splits[split].first[number]).ids])
            label = torch.tensor([splits[split].labels[number]])
            found.append(theirs(input_ids=tokens, labels=label).loss)
        return torch.stack(found)

    decayed = [p for n, p in theirs.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    others = [p for n, p in theirs.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    for update in range(10):
        rate = 0.01 * update / 2 if update < 2 else 0.01 * (10 - update) / 8
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses("train", rows_for_update(1, update, 8, 40).tolist()).mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        if update in (4, 9):
            with torch.no_grad():
                assert epochs[update // 5]["loss"] == pytest.approx(
                    float(losses("dev", list(range(10))).mean()), rel=1e-4
                )
