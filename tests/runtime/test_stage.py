"""What a stage leaves in config.yaml, which is the recipe of whoever names the run directory."""

from pathlib import Path
from typing import Any

import pytest
from support.config import config_of

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.errors import Busy, DistlmError, Stopped, UsageError
from distlm.runtime import stage as module
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import open_stage


def config(run: Path, *overrides: str) -> RunConfig:
    return config_of("demo", [f"run_dir={run}", *overrides])


def test_the_latest_stage_s_settings_are_the_run_s(tmp_path: Path) -> None:
    with open_stage("prepare", config(tmp_path, "knn.k=300")):
        pass
    with open_stage("train", config(tmp_path, "train.lr=0.5", "knn.k=301")):
        pass
    found = load_config(str(tmp_path))
    assert (found.train.lr, found.knn.k) == (0.5, 301)


@pytest.mark.parametrize(
    ("error", "kept"), [(DistlmError, False), (UsageError, False), (Busy, False), (Stopped, True), (KeyError, True)]
)
def test_a_stage_that_fails_leaves_the_settings_before_it(error: type[Exception], kept: bool, tmp_path: Path) -> None:
    """One that was stopped, or broke in the middle, goes on with the same settings."""
    with open_stage("prepare", config(tmp_path)):
        pass
    with pytest.raises(error), open_stage("train", config(tmp_path, "train.lr=0.5")):
        raise error("no")
    assert load_config(str(tmp_path)).train.lr == (0.5 if kept else 0.003)


def test_a_first_stage_that_fails_leaves_its_settings(tmp_path: Path) -> None:
    with pytest.raises(DistlmError), open_stage("prepare", config(tmp_path, "train.lr=0.5")):
        raise DistlmError("no")
    assert load_config(str(tmp_path)).train.lr == 0.5


def test_all_ranks_have_the_settings_that_rank_0_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stage may write config.yaml between two ranks' reading of it."""

    class OfRank0(SingleComm):
        rank = 1

        def bcast(self, value: Any) -> Any:
            return None, config(tmp_path, "train.lr=0.5")

    monkeypatch.setattr(module, "open_comm", lambda _world: OfRank0())
    world = World(rank=1, size=2, local_rank=1, local_size=2, node="here", source="mpi")
    with open_stage("train", config(tmp_path), world) as stage:
        assert stage.config.train.lr == 0.5
