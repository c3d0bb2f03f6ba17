"""What errors of a training advise can be followed: the settings are those that its kind of model reads."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

import distlm.finetune.job
import distlm.models.awd_lstm.job
from distlm.config.load import leaf_fields
from distlm.finetune.job import FinetuneJob
from distlm.models.plm.job import PlmJob
from distlm.models.registry import kind
from distlm.training.blocks.job import BlocksJob
from distlm.training.update import CALMER


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("transformer_lm", CALMER), ("hf", CALMER), ("plm", CALMER), ("awd_lstm", distlm.models.awd_lstm.job._CALMER),
        ("plm", distlm.finetune.job._CALMER),
    ],
)  # fmt: skip
def test_a_training_that_diverges_names_settings_of_its_kind(name: str, advice: str) -> None:
    named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", advice)
    assert len(named) >= 2 and set(named) <= leaf_fields(kind(name).config).keys()


@pytest.mark.parametrize(
    ("job", "advice", "rate"),
    [
        (PlmJob, CALMER, "train.lr or memory.lr"), (BlocksJob, CALMER, "train.lr or memory.lr"),
        (FinetuneJob, distlm.finetune.job._CALMER, "finetune.lr or finetune.memory_lr"),
    ],
)  # fmt: skip
def test_a_memory_has_a_rate_of_its_own(job: Any, advice: str, rate: str) -> None:
    with_memory, without = (SimpleNamespace(memories=of, RATE_OF_VALUES=job.RATE_OF_VALUES) for of in ({1: 1}, {}))
    told = job.calmer(with_memory, advice)
    assert told == advice.replace(rate.partition(" ")[0], rate) and job.calmer(without, advice) == advice
    assert set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", told)) <= leaf_fields(kind("plm").config).keys()
