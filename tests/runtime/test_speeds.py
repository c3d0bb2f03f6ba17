"""What stages took is kept, and plans of later ones rest on it."""

import json
from pathlib import Path

import pytest
from support import write_text

from distlm.config.load import load_config
from distlm.pipeline import STEPS, plan_step
from distlm.runtime import speeds
from distlm.runtime.plan import machine_flops, rank_flops
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.speeds import SpeedKey, corrected, kept_flops, machine, measured, remember


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "below" / "speeds.json"
    monkeypatch.setenv(speeds.VARIABLE, str(path))
    return path


def test_a_plan_is_corrected_by_what_the_same_took(path: Path) -> None:
    mine = SpeedKey("train", "hf", "a", 2)
    assert corrected(mine, 50.0) == (50.0, "") and not measured(mine)
    remember(mine, planned_s=10, worked_s=30, start_s=4, flops=1e9)
    seconds, why = corrected(mine, 50.0)
    assert seconds == pytest.approx(4 + 50 * 30 / 10) and "these settings on 2 ranks" in why and measured(mine)
    # Of another model of the kind, of other ranks; not of another kind, stage or machine.
    other = SpeedKey("train", "hf", "b", 4)
    assert corrected(other, 50.0)[0] == seconds and "other settings" in corrected(other, 1)[1]
    assert not measured(other)
    assert corrected(SpeedKey("datastore write", "hf", "a", 2), 50.0) == (54.0, ""), "its start is like another stage's"
    assert corrected(SpeedKey("train", "plm", "a", 2), 50.0) == (50.0, "")
    remember(other, planned_s=10, worked_s=10, start_s=6, flops=1e9)
    assert corrected(SpeedKey("train", "hf", "a", 4), 50.0)[0] == seconds, (
        "the same settings count more than the same ranks"
    )
    assert corrected(SpeedKey("train", "hf", "c", 4), 50.0)[0] == pytest.approx(6 + 50)
    remember(mine, planned_s=10, worked_s=10, start_s=5, flops=1e9)
    assert corrected(mine, 50.0)[0] == pytest.approx(5 + 50), "the newest of the same"
    remember(mine, planned_s=3, worked_s=30, start_s=5, flops=1e9)
    assert corrected(mine, 50.0)[0] == pytest.approx(5 + 50), "a much shorter one says less"
    assert len(json.loads(path.read_text("utf-8"))["stages"]) == 2


def test_plans_count_with_one_rate_of_the_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured in a blink: another number each time would undo what was learned with the first."""
    assert kept_flops() is None
    remember(SpeedKey("train", "hf", "a", 2), planned_s=10, worked_s=30, start_s=4, flops=7e9)
    remember(SpeedKey("train", "hf", "b", 2), planned_s=10, worked_s=30, start_s=4, flops=9e9)
    assert kept_flops() == 7e9
    machine_flops.cache_clear()
    assert machine_flops() == 7e9
    cores = usable_cores()
    assert rank_flops(0, cores) == pytest.approx(7e9 / cores), "ranks share the machine"
    assert rank_flops(1, 64) == pytest.approx(7e9 / cores), "as many threads as each is given"
    assert rank_flops(0, cores + 1) == 7e9, "more ranks than cores are on other machines"
    assert rank_flops(4 * cores, 1) == 7e9
    machine_flops.cache_clear()


def test_short_stages_and_files_that_cannot_be_used_change_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = SpeedKey("train", "hf", "a", 2)

    def keep(planned: float = 10, worked: float = 30) -> None:
        remember(mine, planned_s=planned, worked_s=worked, start_s=4, flops=1e9)

    keep(planned=1, worked=2)
    keep(planned=0, worked=50)
    assert not path.exists()
    path.parent.mkdir()
    path.write_text("{", "utf-8")
    assert corrected(mine, 50.0) == (50.0, "") and kept_flops() is None
    keep()
    assert corrected(mine, 50.0)[0] > 100
    (tmp_path / "file").touch()
    monkeypatch.setenv(speeds.VARIABLE, str(tmp_path / "file" / "speeds.json"))
    keep()
    monkeypatch.setenv(speeds.VARIABLE, "")
    keep()
    assert corrected(mine, 50.0) == (50.0, "") and kept_flops() is None


def test_speeds_of_before_are_forgotten(path: Path) -> None:
    """Plans of format 1 gave each rank all cores: their factors are of other plans."""
    path.parent.mkdir()
    entry = {"stage": "train", "machine": machine(), "kind": "hf", "settings": "a", "ranks": 2}
    path.write_text(json.dumps({"format": 1, "stages": [{**entry, "planned_s": 10, "took_s": 34, "at": 1}]}), "utf-8")
    assert corrected(SpeedKey("train", "hf", "a", 2), 50.0) == (50.0, "")


def test_only_so_many_are_kept(path: Path) -> None:
    for number in range(speeds._MOST + 5):
        remember(SpeedKey("train", "hf", str(number), 1), planned_s=10, worked_s=20, start_s=1, flops=1e9)
    kept = [one["settings"] for one in json.loads(path.read_text("utf-8"))["stages"]]
    assert len(kept) == speeds._MOST and kept[-1] == str(speeds._MOST + 4)


def test_the_plan_of_a_stage_says_what_its_time_rests_on(path: Path, tmp_path: Path) -> None:
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    before = plan_step(STEPS["train"], config)
    assert before.seconds and not any("took here before" in note for note in before.notes)
    remember(SpeedKey("train", config.model.kind, "other", 2), before.seconds, 3 * before.seconds, 4.0, machine_flops())
    after = plan_step(STEPS["train"], config)
    assert after.seconds == pytest.approx(4 + 3 * before.seconds, rel=1e-3)
    assert any("took here before" in note for note in after.notes)
    assert "cores" in machine()


@pytest.mark.parametrize("recipe", ["plm-small", "awd-lstm-small"])
def test_every_kind_of_model_has_plans(recipe: str, path: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    name = "shards" if recipe.startswith("plm") else "data"
    config = load_config(recipe, [f"run_dir={tmp_path / 'run'}", f"{name}.text_dir={text}"])
    remember(SpeedKey("train", config.model.kind, "other", 2), 10.0, 30.0, 4.0, 1e10)
    assert any("took here before" in note for note in plan_step(STEPS["train"], config).notes)
