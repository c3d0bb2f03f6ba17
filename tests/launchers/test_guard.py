"""The restart-loop guard: marks move with durable progress, and a mark that stands still ends the loop."""

import json

import pytest
from support.manifest import write_complete_manifest

from distlm.config.load import load_config
from distlm.datastore.records import UnitsFile
from distlm.index.records import CodesRecord
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir
from launchers.guard import MARKS, check_restart
from launchers.jobs import record_job


def checkpoint(run, step):
    write_json(run / "checkpoints" / f"step-{step:08d}" / "complete.json", {})


def asked(run, job="7", stage="train", limit=2):
    config = load_config("demo", [f"run_dir={run}"])
    return check_restart(stage, config, job=job, owner="test", restarts=0, max_same_start=limit)


def test_restarts_that_get_further_go_on_for_ever(tmp_path):
    for step in range(10):
        checkpoint(tmp_path, step)
        assert asked(tmp_path) is None


def test_restarts_that_bring_nothing_end(tmp_path):
    checkpoint(tmp_path, 3)
    assert asked(tmp_path) is None and asked(tmp_path) is None
    refusal = asked(tmp_path)
    assert refusal is not None and "'step-00000003'" in refusal and "job 7" in refusal and "\n" not in refusal
    # A checkpoint without its marker is none; another job, and progress, start anew.
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    assert asked(tmp_path) is not None
    assert asked(tmp_path, job="8") is None
    checkpoint(tmp_path, 5)
    assert asked(tmp_path) is None


def test_the_record_says_who_asked_and_where_it_was(tmp_path):
    asked(tmp_path)
    path = tmp_path / "launch" / "attempts-train.jsonl"
    line = json.loads(path.read_text("utf-8"))
    assert line["time"] > 0
    del line["time"]
    assert line == {"format": 1, "job": "7", "restarts": 0, "owner": "test", "mark": "no checkpoint",
                    "preempted": False}  # fmt: skip
    path.write_text('{"job": "7", "ma', "utf-8")  # cut short by a kill
    assert asked(tmp_path) is None


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("prepare", "tokens/meta.json"),
        ("shard", "shards/train-00000.tar"),
        ("train", "checkpoints/step-00000001/complete.json"),
        ("datastore", "datastore/.shard-00000.json"),
        ("datastore", "datastore/manifest.json"),
        ("index-train", "index/INDEX/.kmeans-3.npy"),
        ("index-train", "index/INDEX/template.json"),
        ("index-add", "index/INDEX/parts/part-00000.json"),
        ("index-merge", "index/INDEX/index.json"),
        ("search", "neighbours/LABEL/valid/found/unit-00000/unit.json"),
        ("search", "neighbours/LABEL/test/rescore/group-000-shard-00000.npy"),
        ("search", "neighbours/LABEL/test/unit-00003/unit.json"),
        ("search", "cache/test/unit-00000.npy"),
        ("evaluate", "tuned/LABEL.json"),
        ("evaluate", "results/LABEL.json"),
    ],
)
def test_a_unit_of_every_stage_moves_its_mark(tmp_path, stage, file):
    config = load_config("demo", [f"run_dir={tmp_path}"])
    run = RunDir.of(config)
    before = MARKS[stage](config, run)
    if file == "datastore/manifest.json":
        write_complete_manifest(tmp_path / "datastore")
    else:
        write_json(tmp_path / file.replace("INDEX", run.index.name).replace("LABEL", run.label), {})
    assert MARKS[stage](config, run) != before


def test_units_within_a_shard_move_the_mark(tmp_path):
    config = load_config("demo", [f"run_dir={tmp_path}"])
    run = RunDir.of(config)
    marks = set()
    for done in (0, 1, 2):
        UnitsFile(store="s", unit_rows=9, done={f"0/{n}": ["k", "v"] for n in range(done)}).write(
            run.datastore / ".units.json"
        )
        CodesRecord(key="k", done={f"0/{n}": "c" for n in range(done)}).write(run.index / "parts/.codes-1-of-2.json")
        marks |= {MARKS["datastore"](config, run), MARKS["index-add"](config, run)}
    assert marks == {f"0 {what}{units}" for what in ("shards", "parts") for units in ("", ", 1 units", ", 2 units")}


def test_a_cancelled_job_does_not_start_again_until_it_may(tmp_path):
    run = RunDir(tmp_path)
    record_job(run, "train", "7", "submitit", "1", cancelled=True)
    assert "`distlm cancel` ended job 7" in str(asked(tmp_path))
    assert "`distlm cancel` ended job 7_3" in str(asked(tmp_path, job="7_3"))
    assert asked(tmp_path, job="77") is None
    record_job(run, "train", "7", "submitit", "1", cancelled=False)
    assert asked(tmp_path) is None
