"""What errors of a training advise can be followed: the settings are those that its kind of model reads, and another
folder is asked for, because none of them may change under a checkpoint."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lstm import lstm_config
from support.plm import plm_config, tiny_shards
from support.train import tiny_config, tiny_tokens

import distlm.models.awd_lstm.stream_loss
from distlm.config.load import leaf_fields
from distlm.config.schema import RunConfig
from distlm.errors import Diverged
from distlm.finetune.job import FinetuneJob
from distlm.memory.values.gradient import ValueGradient
from distlm.models.awd_lstm.job import LstmJob
from distlm.models.plm.job import PlmJob
from distlm.models.registry import kind
from distlm.runtime.stage import open_stage
from distlm.training.blocks.job import BlocksJob
from distlm.training.loop import run_train
from distlm.training.validate import Validator

JOBS = [
    ("transformer_lm", BlocksJob), ("hf", BlocksJob), ("plm", PlmJob), ("awd_lstm", LstmJob), ("plm", FinetuneJob)
]  # fmt: skip


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_a_training_that_diverges_names_settings_of_its_kind(name: str, job: Any) -> None:
    named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", job.CALMER)
    assert len(named) >= 2 and set(named) <= leaf_fields(kind(name).config).keys()
    assert job.CALMER.endswith(("another run_dir=", "another finetune.name="))


@pytest.mark.parametrize(
    ("job", "rate"),
    [
        (PlmJob, "train.lr or memory.lr"), (BlocksJob, "train.lr or memory.lr"),
        (FinetuneJob, "finetune.lr or finetune.memory_lr"),
    ],
)  # fmt: skip
def test_a_memory_has_a_rate_of_its_own(job: Any, rate: str) -> None:
    with_memory, without = (
        SimpleNamespace(memories=of, RATE_OF_VALUES=job.RATE_OF_VALUES, CALMER=job.CALMER) for of in ({1: 1}, {})
    )
    told = job.calmer(with_memory)
    assert told == job.CALMER.replace(rate.partition(" ")[0], rate) and job.calmer(without) == job.CALMER
    assert set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", told)) <= leaf_fields(kind("plm").config).keys()


def diverge(config: RunConfig) -> str:
    with pytest.raises(Diverged) as caught, open_stage("train", config) as stage:
        run_train(stage)
    assert caught.value.shared
    return str(caught.value)


def test_wherever_numbers_are_lost_the_advice_is_the_training_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, shards = tiny_tokens(tmp_path / "words"), tiny_shards(tmp_path / "shards")
    end = "and start with another run_dir= (the checkpoints here are from before)"
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "_score", lambda *_: math.nan)
        said = diverge(tiny_config(tokens, tmp_path / "blocks", "train.valid_every=3"))
        assert said == f"update 3: the validation loss is nan; {BlocksJob.CALMER.partition(' and ')[0]} {end}"
    with monkeypatch.context() as patch:
        patch.setattr(distlm.models.awd_lstm.stream_loss, "stream_loss", lambda *_: math.inf)
        said = diverge(lstm_config(tokens, tmp_path / "lstm", "awd.log_interval=2"))
        assert said == f"update 2: the validation loss is inf; lower train.lr or train.clip_norm, {end}"
    with monkeypatch.context() as patch:
        patch.setattr(ValueGradient, "not_finite", lambda _: torch.ones(()).double())
        said = diverge(plm_config(shards, tmp_path / "memory", "memory.kind=resm"))
    assert said.startswith("update 0: the gradient of the memory's values in layer ")
    assert "lower train.lr or memory.lr, raise" in said and said.endswith(end)
