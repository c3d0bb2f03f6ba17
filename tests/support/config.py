"""Configurations of tests: parsing the settings takes a tenth of a second, so those that differ in folders alone are
parsed once."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

from distlm.config.load import load_config
from distlm.config.schema import RunConfig

PLACES = (
    "run_dir", "data.text_dir", "data.tokens_dir", "datastore.checkpoint", "finetune.checkpoint", "finetune.data_dir",
    "shards.folder", "shards.text_dir",
)  # fmt: skip
"""Settings that are a path, and are checked where it is opened."""


C = TypeVar("C", bound=RunConfig)


def config_of(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """What load_config gives."""
    split = [word.partition("=")[::2] for word in overrides]
    others = tuple(word for word, (key, _) in zip(overrides, split, strict=True) if key not in PLACES)
    config = copy.deepcopy(_parsed(recipe, others))
    for key, value in split:
        if key in PLACES:
            section, _, name = key.rpartition(".")
            setattr(getattr(config, section) if section else config, name, value)
    return config


def run_of(kind: type[C], config: RunConfig) -> C:
    """That configuration, which is of runs of this kind of model."""
    assert isinstance(config, kind)
    return config


@cache
def _parsed(recipe: str, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(recipe, overrides)
