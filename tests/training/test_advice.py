"""What errors of a training advise can be followed: the settings are those that its kind of model reads."""

import re

import pytest

import distlm.finetune.job
import distlm.models.awd_lstm.job
from distlm.config.load import leaf_fields
from distlm.models.registry import kind
from distlm.training.update import CALMER

OF = {
    "transformer_lm": CALMER, "hf": CALMER, "awd_lstm": distlm.models.awd_lstm.job._CALMER,
    "plm": distlm.finetune.job._CALMER,
}  # fmt: skip


@pytest.mark.parametrize("name", OF)
def test_a_training_that_diverges_names_settings_of_its_kind(name: str) -> None:
    named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", OF[name])
    assert len(named) >= 2 and set(named) <= leaf_fields(kind(name).config).keys()
