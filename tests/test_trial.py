"""`distlm plan --measure`: a recipe is run in small, and its plans rest on what that took."""

import json
from pathlib import Path

import pytest
from support import distlm, write_text

from distlm.config.load import load_config
from distlm.errors import EXIT_DONE
from distlm.pipeline import STEPS, plan_step, steps_of
from distlm.runtime import speeds
from distlm.trial import run as trial
from distlm.trial.made_up import write_made_up


def test_made_up_text_has_the_words_and_tokens_that_are_asked_for(tmp_path: Path) -> None:
    write_made_up(tmp_path / "a", 500, {"train": 4000, "valid": 300})
    train = (tmp_path / "a" / "train.txt").read_text("utf-8")
    assert len(set(train.split())) == 500 and len({*"".join(train.split())}) > 20, "letters, for sub-words"
    assert len(train.split()) + train.count("\n") == pytest.approx(4000, rel=0.05)
    valid = (tmp_path / "a" / "valid.txt").read_text("utf-8")
    assert {*valid.split()} <= {*train.split()} and "\n\n" in train
    write_made_up(tmp_path / "b", 500, {"train": 4000, "valid": 300})
    assert (tmp_path / "b" / "train.txt").read_text("utf-8") == train


SMALL = {
    "demo": [
        "model.layers=1", "model.width=32", "model.heads=2", "model.ffn_width=64", "model.cutoffs=[]",
        "data.max_words=300", "train.updates=100000", "launch.ranks=2", "datastore.block=128",
    ],
    "awd-lstm-small": [
        "lstm.width=16", "lstm.hidden_width=16", "data.max_words=300", "awd.epochs=2000", "launch.ranks=1",
    ],
    "plm-small": [
        "plm.layers=1", "plm.width=32", "plm.heads=2", "plm.ffn_width=64", "shards.vocabulary_size=300",
        "train.updates=100000", "launch.ranks=1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if name != "demo" else ()) for name in SMALL]
)
def test_a_recipe_is_tried_in_small_and_its_plan_says_so(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "speeds.json"
    monkeypatch.setenv(speeds.VARIABLE, str(kept))
    monkeypatch.setattr(trial, "_PLANNED_S", 1.0)
    monkeypatch.setattr(speeds, "LEAST_S", 0.0)
    overrides = [f"run_dir={tmp_path / 'runs' / 'mine'}", *SMALL[recipe]]
    if recipe != "demo":
        text = write_text(tmp_path / "text")
        overrides.append(f"{'shards' if recipe.startswith('plm') else 'data'}.text_dir={text}")
    config = load_config(recipe, overrides)
    before = sorted(tmp_path.iterdir())
    assert trial.try_in_small(config, recipe, overrides) == EXIT_DONE
    shown = capfd.readouterr()
    assert "trying train in small" in shown.err and not shown.out, "the stages' own lines are not shown"
    stages = {one["stage"] for one in json.loads(kept.read_text("utf-8"))["stages"]}
    assert stages == {step.words for step in steps_of(config)} & {*trial.TRIED} and "train" in stages
    for stage in stages:
        assert any("as these settings" in note for note in plan_step(STEPS[stage], config).notes)
    assert sorted(path for path in tmp_path.iterdir() if path != kept) == before, "nothing is left behind"
    assert trial.try_in_small(config, recipe, overrides) == EXIT_DONE
    assert "trying" not in capfd.readouterr().err, "what is known is not tried again"


def test_a_trial_that_fails_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(speeds.VARIABLE, str(tmp_path / "speeds.json"))
    words = [f"run_dir={tmp_path / 'run'}", *SMALL["demo"], "train.lr=1e30"]
    failed = distlm("plan", "demo", *words, "--measure", check=False)
    assert failed.returncode == 1
    assert "`distlm train` failed when tried in small" in failed.stderr and "train.lr" in failed.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
