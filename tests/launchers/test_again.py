"""Whether a job asks to be queued again, with a made-up scontrol: every answer that the real one has given.

tests/slurm/test_cancelled.py, test_chain.py and test_silent.py show the same on a real Slurm.
"""

import json
import re
from pathlib import Path

import pytest

from distlm.config.load import dump_config, load_config
from launchers import again as module
from launchers import pending
from launchers.stages import slurm

RUNNING = "JobId=7 JobState=RUNNING Restarts=0 PreemptTime=None"
ENDING = "JobId=7 JobState=COMPLETING Restarts=0 PreemptTime=None"
PREEMPTED = "JobId=7 JobState=COMPLETING Restarts=0 PreemptTime=2026-11-30T06:28:50"
REQUEUED = "JobId=7 JobState=COMPLETING Restarts=1"
SILENT = "slurm_load_jobs error: Socket timed out on send/recv operation"
REFUSED = "Requested operation is presently disabled for job 7"


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """`launchers.again` in job 7, which Slurm shows as it is told: (exit code, what it said, was it requeued)."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(load_config("demo", [f"run_dir={tmp_path / 'run'}"])), "utf-8")
    for name, value in (("PATH", f"{tmp_path}:/usr/bin:/bin"), ("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(slurm, "_PAUSE_S", 0.01)

    def ask(*shown: str, requeue: str = "", again: int = 0, limit: int = 3) -> tuple[object, str, bool]:
        for old in tmp_path.glob("answer-*"):
            old.unlink()
        for number, text in enumerate(shown):
            (tmp_path / f"answer-{number}").write_text(text, "utf-8")
        program = f"""#!/bin/sh
cd {tmp_path}
if [ "$1" = requeue ]; then
  touch requeued; [ -z "{requeue}" ] || {{ echo "{requeue}" >&2; exit 1; }}
  exit 0
fi
[ "$4" = 7 ] || {{ echo "asked for $4" >&2; exit 1; }}
asked=$(cat asked 2>/dev/null || echo 0)
[ -e answer-$asked ] || asked=$((asked - 1))
echo $((asked + 1)) >asked
case $(cat answer-$asked) in JobId*) cat answer-$asked ;; *) cat answer-$asked >&2; exit 1 ;; esac
"""
        (tmp_path / "scontrol").write_text(program, "utf-8")
        (tmp_path / "scontrol").chmod(0o755)
        (tmp_path / "asked").unlink(missing_ok=True)
        (tmp_path / "requeued").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as end:
            module.main([f"--max-same-start={limit}", f"--again={again}", "train", str(recipe)])
        return end.value.code, capsys.readouterr().err, (tmp_path / "requeued").exists()

    return ask


def test_a_job_that_runs_is_requeued(job):
    code, said, requeued = job(RUNNING)
    assert (code, requeued) == (0, True) and "requeued by this batch script; it continues" in said


@pytest.mark.parametrize("shown", [(ENDING,), (RUNNING, ENDING)], ids=["before", "while the guard was asked"])
def test_a_cancelled_one_is_not(job, shown):
    code, said, requeued = job(*shown)
    assert (code, requeued) == (75, False) and "not requeued: cancelled or out of time" in said


def test_what_slurm_has_requeued_itself_is_left_alone(job):
    code, said, requeued = job(REQUEUED)
    assert (code, requeued) == (0, False) and "requeued from outside" in said


def test_a_preempted_one_comes_back_as_often_as_the_site_says(job):
    code, said, requeued = job(PREEMPTED)
    assert (code, requeued) == (75, False) and "`again: N` in the site file lets jobs come back" in said
    assert [job(PREEMPTED, again=2)[2] for _ in range(3)] == [True, True, False]
    assert "it came back 2 times already" in job(PREEMPTED, again=2)[1]


def test_a_silent_slurm_is_asked_again_and_not_for_ever(job, monkeypatch):
    code, said, requeued = job(SILENT, SILENT, RUNNING)
    assert (code, requeued) == (0, True) and said.count("Socket timed out") == 1
    assert "asking again for 15 min" in said
    monkeypatch.setattr(slurm, "ASK_FOR_S", 0.1)
    code, said, requeued = job(SILENT)
    assert (code, requeued) == (75, False) and "submit the same command again" in said


def test_a_refused_requeue_says_what_to_do(job):
    code, said, _ = job(RUNNING, requeue=REFUSED)
    assert code == 75 and "requeue refused: submit the same command again" in said and REFUSED in said


@pytest.mark.parametrize("limits", [{"limit": 0}, {"again": -1}], ids=["limit", "again"])
def test_limits_below_the_site_files_are_refused(job, limits: dict[str, int]):
    code, said, requeued = job(RUNNING, **limits)
    assert (code, requeued) == (2, False) and re.search("must be at least (1, not 0|0, not -1)", said)


@pytest.mark.parametrize(("limit", "again", "site"), [(None, 2, 0), (3, None, 5)])
def test_an_option_that_is_given_counts_and_the_site_file_for_the_other(limit, again, site, tmp_path, monkeypatch):
    file, asked = tmp_path / "site.yaml", {}
    file.write_text(f"max_same_start: 4\nagain: {site}\n", "utf-8")
    monkeypatch.setattr(module, "queue_again", lambda *_, **limits: asked.update(limits) or module.Outcome(True, ""))
    options = [f"--max-same-start={limit}"] * (limit is not None) + [f"--again={again}"] * (again is not None)
    with pytest.raises(SystemExit):
        module.main([f"--site={file}", *options, "train", "demo"])
    assert (asked["max_same_start"], asked["again"]) == (
        4 if limit is None else limit,
        site if again is None else again,
    )


def test_settings_may_stand_before_the_recipe(tmp_path, monkeypatch, capsys):
    """As they may before that of the stage, which has run with the same words of sbatch's command."""
    asked = []

    def queued(stage, config, **_):
        asked.append(config.run_dir)
        return module.Outcome(True, "")

    monkeypatch.setattr(module, "queue_again", queued)
    words = [f"run_dir={tmp_path}", "demo", "train.updates=9"]
    with pytest.raises(SystemExit) as end:
        module.main(["train", *words])
    assert (end.value.code, asked) == (0, [str(tmp_path)])
    pending.main(["--stage=train", *words])
    assert capsys.readouterr().out == "train all train\n"


def test_the_guard_ends_it_with_an_error(job, tmp_path: Path):
    assert [job(RUNNING, limit=1)[0] for _ in range(2)] == [0, 1]
    lines = (tmp_path / "run" / "launch" / "attempts-train.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["owner"] for line in lines] == ["batch script"] * 2
