"""Runs the prepare stage in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import write_text

from distlm.config import DataConfig, LaunchConfig, RunConfig
from distlm.data.prepare import PrepareSummary, run_prepare
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import open_stage

Prepare = Callable[..., PrepareSummary]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with {train,valid,test}.txt."""
    return write_text(tmp_path / "text")


@pytest.fixture
def folder(text: Path) -> list[str]:
    """The settings that name it."""
    return ["data.source=folder", f"data.text_dir={text}"]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., RunConfig]:
    """`configure("data.min_count=2", run="other")`: a configuration with its own run directory."""

    def build(*overrides: str, run: str = "run") -> RunConfig:
        # Not through load_config: its checks take a second, and these tests build many.
        data = DataConfig(source="demo")
        for override in overrides:
            key, _, value = override.removeprefix("data.").partition("=")
            setattr(data, key, type(getattr(data, key))(value))
        return RunConfig(run_dir=str(tmp_path / run), data=data, launch=LaunchConfig(threads=1))

    return build


@pytest.fixture
def prepare(configure: Callable[..., RunConfig]) -> Prepare:
    """Run the stage; takes what `configure` takes."""

    def act(*overrides: str, run: str = "run") -> PrepareSummary:
        with open_stage("prepare", configure(*overrides, run=run), World(0, 1, 0, 1, "here", "single")) as stage:
            return run_prepare(stage)

    return act
