"""What errors of a training advise can be followed: the settings are those that its kind of model reads."""

import re

import pytest

import distlm.finetune.job
import distlm.models.awd_lstm.job
from distlm.config.load import leaf_fields
from distlm.models.registry import kind
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
