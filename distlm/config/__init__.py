"""Typed configuration: the common sections (schema, training), recipe files (recipes/*.yaml), loading and checking.

The sections of a kind of model lie with it: distlm/models/KIND/config.py.
"""

from distlm.config.load import load_config, parse_overrides
from distlm.config.recipe import recipe_names
from distlm.config.schema import (
    DataConfig,
    DatastoreConfig,
    IndexConfig,
    KnnConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "DatastoreConfig",
    "IndexConfig",
    "KnnConfig",
    "LaunchConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "parse_overrides",
    "recipe_names",
]
