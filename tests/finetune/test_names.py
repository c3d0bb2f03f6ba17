"""Errors of the training's own code, in fine-tuning: the settings that they name are those that fine-tuning reads."""

import dataclasses
from pathlib import Path

import pytest
from support.finetune import finetune_config, hugging_face, write_sst2

from distlm.errors import DistlmError
from distlm.finetune.names import finetune_name, finetune_names
from distlm.finetune.plan import plan_finetune
from distlm.models.plm.config import FinetuneConfig


def test_names() -> None:
    text = "train.precision=fp16: the gradients overflow; lower train.lr, or train in fp32"
    assert finetune_name(text) == "finetune.precision=fp16: the gradients overflow; lower finetune.lr, or train in fp32"
    assert (
        finetune_name("train.blocks_per_update, train.micro_blocks") == "finetune.rows_per_update, finetune.micro_rows"
    )
    # Both share them; and a file is no setting.
    assert finetune_name("set train.trackers; train.json, train.tsv") == "set train.trackers; train.json, train.tsv"


def test_every_name_is_a_setting_of_fine_tuning() -> None:
    from distlm.finetune.names import _OTHERS

    assert set(_OTHERS.values()) <= {field.name for field in dataclasses.fields(FinetuneConfig)}


def test_an_error_keeps_what_it_is() -> None:
    before = DistlmError("lower train.lr")
    before.shared = True
    with pytest.raises(DistlmError, match=r"^lower finetune\.lr$") as caught, finetune_names():
        raise before
    assert caught.value is before and caught.value.shared


def test_a_plan_names_them(tmp_path: Path) -> None:
    model, data = hugging_face(tmp_path / "hf"), write_sst2(tmp_path / "glue")
    config = finetune_config(tmp_path / "run", data, f"finetune.checkpoint={model}", "finetune.deepspeed=zero9")
    with pytest.raises(DistlmError, match=r"^finetune\.deepspeed=zero9: no such DeepSpeed configuration.*; known: "):
        plan_finetune(config, 1)
