"""Fine-tuning goes on from the checkpoint that pretraining left in the same run directory, with its tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plm_support import memory_of, plm_config, tiny_shards

from distlm.config.plm import MemoryConfig
from distlm.errors import DistlmError
from distlm.memory.exchange import Exchange
from distlm.memory.files import load_table
from distlm.memory.table import ValueTable
from distlm.runtime.stage import open_stage
from distlm.training.finetune import run_finetune
from distlm.training.loop import run_train

PRETRAINING = ["memory.kind=resm", "memory.stale=catch_up", "train.updates=6", "train.lr=0.01"]


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
        found = run_finetune(stage)
    assert 0 <= found["accuracy"] <= 1 and found["majority"] == 0.5
    # What stale slots had yet to move they have moved, and then stayed.
    (checkpoint,) = run.glob("checkpoints/step-*")
    own = memory_of(run / "finetune" / "SST-2-frozen" / "seed-1", 3)
    config = MemoryConfig(stale="catch_up", sub_keys=8, values="zero")
    table = ValueTable(config, 32, 3, 1, Exchange.alone())
    load_table(table, checkpoint, 3)
    assert (table.missed(torch.arange(64)) > 0).any()
    before = table.values.clone()
    table.settle()
    assert torch.equal(own["values"], table.values) and not torch.equal(before, table.values)
    # Other settings of the pretraining are those of another run.
    other = plm_config(shards, run, *PRETRAINING, "train.seed=5", *settings)
    with pytest.raises(DistlmError, match=r"train\.seed: 1 there, 5 now"), open_stage("finetune", other):
        pass
