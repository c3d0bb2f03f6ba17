"""What stages took is kept, and plans of later ones rest on it."""

import json
from pathlib import Path

import pytest
from support import write_text

from distlm.config.load import load_config
from distlm.pipeline import STEPS, plan_step
from distlm.runtime import speeds
from distlm.runtime.speeds import START_S, corrected, machine, remember


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "below" / "speeds.json"
    monkeypatch.setenv(speeds.VARIABLE, str(path))
    return path


def test_a_plan_is_corrected_by_what_the_same_took(path: Path) -> None:
    assert corrected("train", "hf", "a", 2, 50.0) == (50.0, "")
    remember("train", "hf", "a", 2, planned_s=10, took_s=34)
    seconds, why = corrected("train", "hf", "a", 2, 50.0)
    assert seconds == pytest.approx(START_S + 50 * 30 / 10) and "these settings on 2 ranks" in why
    # Of another model of the kind, of other ranks; not of another kind, stage or machine.
    assert (
        corrected("train", "hf", "b", 4, 50.0)[0] == seconds
        and "other settings" in corrected("train", "hf", "b", 4, 1)[1]
    )
    for stage, kind in (("datastore write", "hf"), ("train", "plm")):
        assert corrected(stage, kind, "a", 2, 50.0) == (50.0, "")
    remember("train", "hf", "b", 4, planned_s=10, took_s=14)
    assert corrected("train", "hf", "a", 4, 50.0)[0] == seconds, "the same settings count more than the same ranks"
    assert corrected("train", "hf", "c", 4, 50.0)[0] == pytest.approx(START_S + 50)
    remember("train", "hf", "a", 2, planned_s=10, took_s=14)
    assert corrected("train", "hf", "a", 2, 50.0)[0] == pytest.approx(START_S + 50), "the newest of the same"
    assert len(json.loads(path.read_text("utf-8"))["stages"]) == 2


def test_short_stages_and_files_that_cannot_be_used_change_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember("train", "hf", "a", 2, planned_s=1, took_s=5)
    remember("train", "hf", "a", 2, planned_s=0, took_s=50)
    assert not path.exists()
    path.parent.mkdir()
    path.write_text("{", "utf-8")
    assert corrected("train", "hf", "a", 2, 50.0) == (50.0, "")
    remember("train", "hf", "a", 2, planned_s=10, took_s=34)
    assert corrected("train", "hf", "a", 2, 50.0)[0] > 100
    (tmp_path / "file").touch()
    monkeypatch.setenv(speeds.VARIABLE, str(tmp_path / "file" / "speeds.json"))
    remember("train", "hf", "a", 2, planned_s=10, took_s=34)
    monkeypatch.setenv(speeds.VARIABLE, "")
    remember("train", "hf", "a", 2, planned_s=10, took_s=34)
    assert corrected("train", "hf", "a", 2, 50.0) == (50.0, "")


def test_only_so_many_are_kept(path: Path) -> None:
    for number in range(speeds._MOST + 5):
        remember("train", "hf", str(number), 1, planned_s=10, took_s=20)
    kept = [one["settings"] for one in json.loads(path.read_text("utf-8"))["stages"]]
    assert len(kept) == speeds._MOST and kept[-1] == str(speeds._MOST + 4)


def test_the_plan_of_a_stage_says_what_its_time_rests_on(path: Path, tmp_path: Path) -> None:
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    before = plan_step(STEPS["train"], config)
    assert before.seconds and not any("took here before" in note for note in before.notes)
    remember("train", config.model.kind, "other", 2, before.seconds, START_S + 3 * before.seconds)
    after = plan_step(STEPS["train"], config)
    assert after.seconds and after.seconds > 2 * before.seconds
    assert any("took here before" in note for note in after.notes)
    assert "cores" in machine()


@pytest.mark.parametrize("recipe", ["plm-small", "awd-lstm-small"])
def test_every_kind_of_model_has_plans(recipe: str, path: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    name = "shards" if recipe.startswith("plm") else "data"
    config = load_config(recipe, [f"run_dir={tmp_path / 'run'}", f"{name}.text_dir={text}"])
    remember("train", config.model.kind, "other", 2, 10.0, 34.0)
    assert any("took here before" in note for note in plan_step(STEPS["train"], config).notes)
