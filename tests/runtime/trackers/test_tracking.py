"""train.trackers around a stage: who shows what, and what is refused or left off."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from support.config import config_of
from support.foreign.trackers import scalars

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.errors import UsageError
from distlm.pipeline import run_pipeline
from distlm.runtime import lock
from distlm.runtime.lock import only_writer
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stage import open_stage
from distlm.runtime.trackers import tracking


def config(run: Path, *trackers: str) -> RunConfig:
    return config_of("demo", [f"run_dir={run}", f"train.trackers=[{','.join(trackers)}]"])


def test_every_stage_of_a_run_is_shown_and_trackers_never_lock_it(tmp_path: Path) -> None:
    with open_stage("train", config(tmp_path)) as stage:
        stage.run.metrics.write("train", {"train/loss": 3.0}, step=1)
    with open_stage("index", config(tmp_path, "tensorboard")) as stage:
        stage.run.metrics.write("index add", {"rows": 7})
    with open_stage("knn", config(tmp_path)):
        pass
    assert scalars(tmp_path / "tensorboard" / "train") == {"train/loss": [(1, 3.0)]}
    assert scalars(tmp_path / "tensorboard" / "index add") == {"rows": [(0, 7.0)]}


def test_unknown_trackers_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"train\.trackers"):
        load_config("demo", ["train.trackers=[mlflow]"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("folder_here", [False, True])
def test_a_package_that_is_not_there_is_refused_before_work(
    name: str, folder_here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name in the working directory is no package."""
    found = ModuleSpec(name, None) if folder_here else None
    monkeypatch.setattr(tracking, "find_spec", lambda _name: found)
    said = f"{name} is not installed: pip install {name}, or leave it out"
    with pytest.raises(UsageError, match=said), open_stage("train", config(tmp_path / "run", name)):
        raise AssertionError("no work")
    with pytest.raises(UsageError, match=f"pip install {name}"):
        run_pipeline(config(tmp_path / "run", name), "demo", [])
    assert not (tmp_path / "run").exists()


def test_a_package_that_cannot_be_imported_is_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distlm.runtime.trackers.tensorboard", None)
    with open_stage("train", config(tmp_path, "tensorboard")) as stage:
        stage.run.metrics.write("train", {"train/loss": 3.0}, step=1)
    assert "train.trackers: tensorboard is left off: ModuleNotFoundError" in capsys.readouterr().err


def test_of_two_processes_of_a_run_one_keeps_a_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    held = only_writer(tmp_path / "tensorboard", SingleComm(), "keeping the view of tensorboard")
    with held, open_stage("train", config(tmp_path, "tensorboard")) as stage:
        stage.run.metrics.write("train", {"train/loss": 3.0}, step=1)
    assert "train.trackers: tensorboard is left off in this process" in capsys.readouterr().err
    assert not list((tmp_path / "tensorboard").glob("*/*"))
