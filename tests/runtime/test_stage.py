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
from distlm.runtime.rundir import RunDir
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


MADE = {
    "prepare": ("tokens/meta.json", "data.min_count=7"),
    "shard": ("shards/.plan.json", "shards.row_tokens=32"),
    "train": ("checkpoints/step-00000003/complete.json", "train.lr=0.5"),
    "datastore": ("datastore/manifest.json", "datastore.block=8"),
    "index": ("index/one/template.json", "datastore.block=8"),
    "knn": ("neighbours/one/valid/plan.json", "knn.block=8"),
}
"""Stage → the first of its files that its settings decide, and another value of one of them. A fine-tuning compares its
own (finetune/NAME)."""


@pytest.mark.parametrize("stage", MADE)
def test_a_killed_start_without_files_refuses_no_settings(stage: str, tmp_path: Path) -> None:
    """Its settings stay recorded when it is killed, or another rank than 0 runs out of memory."""
    recipe = "plm-small" if stage == "shard" else "demo"
    made, other = MADE[stage]
    own, others = (config_of(recipe, [f"run_dir={tmp_path}", *more]) for more in ((), (other,)))
    RunDir.of(own).open_stage(own, stage)
    lock = tmp_path / made.partition("/")[0] / ".lock"
    lock.parent.mkdir()
    lock.touch()
    RunDir.of(others).refuse_other_config(others, stage)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).touch()
    with pytest.raises(DistlmError, match=f"{other.partition('=')[0]}: .* there, .* now"):
        RunDir.of(others).refuse_other_config(others, stage)


def test_files_in_a_folder_of_their_own_refuse_other_settings(tmp_path: Path) -> None:
    own = config(tmp_path / "run", f"datastore.folder={tmp_path / 'store'}")
    RunDir.of(own).open_stage(own, "datastore")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    with pytest.raises(DistlmError, match=r"datastore\.block: .* there, 8 now"):
        RunDir.of(own).refuse_other_config(config(tmp_path / "run", "datastore.block=8"), "datastore")


def test_a_busy_folder_keeps_the_settings_of_its_owner(tmp_path: Path) -> None:
    """The owner has no checkpoint yet, so its settings refuse none."""
    other = config(tmp_path, "train.lr=0.5")
    with open_stage("train", config(tmp_path)), pytest.raises(Busy), open_stage("train", other):
        raise Busy("another run is training here")
    assert load_config(str(tmp_path / "configs" / "train.yaml")).train.lr == 0.003


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
