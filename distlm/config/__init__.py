"""Typed configuration: dataclasses (schema), recipe files (recipes/*.yaml), loading and checking (load)."""

from distlm.config.load import load_config, parse_overrides, recipe_names
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
