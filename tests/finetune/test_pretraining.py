"""A fine-tuning takes from its run's record what belongs to the pretraining, whatever recipe is named."""

import shutil
from pathlib import Path

import pytest
from support.config import run_of
from support.finetune import settings, write_sst2
from support.plm import memory_of, plm_config, tiny_shards

from distlm.cli import main
from distlm.config.load import config_tree, load_config
from distlm.finetune.pretraining import as_pretrained
from distlm.models.plm.config import PlmRun
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train

RECORDED = ["memory.kind=resm", "memory.positions=[2,3]", "train.updates=3", "train.seed=5", "plm.init_from=/gone"]


def record(run: Path, *stages: str) -> None:
    config = load_config("plm-small", [*RECORDED, f"run_dir={run}", "shards.row_tokens=32"])
    for stage in stages:
        RunDir(run).open_stage(config, stage)
    if "train" in stages:
        RunDir(run).checkpoint(3).mkdir(parents=True)


def test_what_the_pretraining_recorded_goes_before_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record(tmp_path, "shard", "train")
    given = load_config("plm-small", [f"run_dir={tmp_path}", "finetune.task=RTE", "memory.columns=2", "train.seed=5"])
    found, before = (run_of(PlmRun, one) for one in (as_pretrained(given), given))
    assert (found.memory.kind, found.train.updates, found.plm.init_from, found.shards.row_tokens) == (
        "resm", 3, "/gone", 32,
    )  # fmt: skip
    # What does not decide the checkpoint stays as it is asked for.
    assert (found.finetune.task, found.memory.columns) == ("RTE", 2)
    assert before.memory.kind == "none"
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory.kind='resm' (not 'none')" in line and "train.updates=3 (not 1500)" in line and "seed" not in line
    RunDir(tmp_path).refuse_other_config(found, "finetune")


def test_shards_alone_are_recorded_where_the_training_is_elsewhere(tmp_path: Path) -> None:
    record(tmp_path, "shard")
    found = run_of(PlmRun, as_pretrained(load_config("plm-small", [f"run_dir={tmp_path}"])))
    assert (found.shards.row_tokens, found.memory.kind) == (32, "none")


@pytest.mark.parametrize("recipe", ["demo", "plm-small"])
def test_a_run_that_was_not_pretrained_in_changes_nothing(recipe: str, tmp_path: Path) -> None:
    if recipe == "demo":
        RunDir(tmp_path).open_stage(load_config("demo", [f"run_dir={tmp_path}"]), "train")
    given = load_config("plm-small", [f"run_dir={tmp_path}"])
    assert config_tree(as_pretrained(given)) == config_tree(given)


def test_the_run_directory_or_any_recipe_with_it_is_fine_tuned(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = tiny_shards(tmp_path), tmp_path / "run"
    with open_stage("train", plm_config(shards, run, "memory.kind=resm", "train.updates=2", "train.seed=5")) as stage:
        run_train(stage)
    data = write_sst2(tmp_path, train=16, dev=8)
    own = [
        word
        for word in settings(run, data, "finetune.epochs=1", "finetune.length=24")
        if not word.startswith("run_dir=")
    ]
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)

    def finetune(*words: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(["finetune", *words, *own])
        assert end.value.code == 0, capfd.readouterr().err

    finetune("plm-base", f"run_dir={run}", "finetune.keep_models=true")
    assert f"as {run} was pretrained: train.seed=5 (not 1)" in capfd.readouterr().err
    assert memory_of(run / "finetune" / "SST-2" / "seed-1", 3)
    monkeypatch.chdir(tmp_path)
    finetune("moved", "finetune.name=other")
    assert "was pretrained" not in capfd.readouterr().err
    assert (moved / "finetune" / "other" / "results.json").exists() and not (run / "finetune" / "other").exists()
    assert run_of(PlmRun, load_config("moved")).finetune.name == "other" and load_config("moved").train.seed == 5
