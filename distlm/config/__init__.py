"""Typed configuration: dataclasses (schema), recipe files (recipes/*.yaml), loading and checking (load)."""

from distlm.config.load import load_config, parse_overrides, recipe_names
from distlm.config.schema import (
    AwdConfig,
    DataConfig,
    DatastoreConfig,
    IndexConfig,
    KnnConfig,
    LaunchConfig,
    LstmConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AwdConfig",
    "DataConfig",
    "DatastoreConfig",
    "IndexConfig",
    "KnnConfig",
    "LaunchConfig",
    "LstmConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "parse_overrides",
    "recipe_names",
]
