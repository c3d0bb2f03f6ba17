"""Stages of a kNN run in this process, and copies of run directories."""

import shutil
from collections.abc import Callable
from pathlib import Path

from store_support import tiny_config

from distlm.config.schema import RunConfig
from distlm.runtime.stage import Stage, open_stage


def in_stage(name: str, config: RunConfig, function: Callable[[Stage], dict]) -> dict:
    """Run a stage function on one rank in this process."""
    with open_stage(name, config) as stage:
        return function(stage)


def copy_run(source: RunConfig, to: Path, *extra: str) -> RunConfig:
    """A copy of a run directory, with other settings on top."""
    shutil.copytree(source.run_dir, to)
    return tiny_config(to, Path(source.data.text_dir), extra)
