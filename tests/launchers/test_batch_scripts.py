"""The scripts in slurm/ run by bash, with stand-ins for Slurm's commands and Python that note how they were called."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.deadline import DEADLINE_S

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
SEVERAL = ("run", "search", "evaluate", "finetune")
"""Scripts that ask launchers.pending for their steps."""
STAND_INS = {
    "scontrol": """
echo asked >>"$AT/asked"
[ "$(wc -l <"$AT/asked")" -gt "$SILENT" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }
echo "   Command=$COMMAND demo"
""",
    "sleep": "",
    "squeue": "echo RUNNING",
    "srun": """
trap 'told=yes' USR1
words=$*; echo "${words##*-m distlm }" >>"$AT/steps"
[ -z "$SIGNAL_IN_STEP" ] || {
  kill -USR1 "$BATCH"
  # As ranks do, which end after they were told.
  until [ -n "${told:-}" ]; do /bin/sleep 0.05; done
  /bin/sleep 0.1
}
""",
    "python": """
case "$*" in
  *launchers.site*) echo 'SLURM_MPI_TYPE=none PYTHON=(python) SRUN=()' ;;
  *launchers.pending*) [ -z "$SIGNAL_BEFORE" ] || kill -USR1 "$BATCH"; printf %s "$PENDING" ;;
  *launchers.again*) echo "$*" >>"$AT/again" ;;
esac
""",
}
Job = Callable[..., tuple[int, str]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """`job(stage, VARIABLE=...)`: the script's exit code and all that it said. Its words are `demo seed=1`."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (commands / name).chmod(0o755)
    array = {
        "ARRAY_JOB_ID": "7",
        "ARRAY_TASK_ID": "0",
        "ARRAY_TASK_MIN": "0",
        "ARRAY_TASK_MAX": "0",
        "ARRAY_TASK_COUNT": "1",
    }

    def run(stage: str, **more: str) -> tuple[int, str]:
        about = {"JOB_ID": "7", "JOB_NAME": "job", "NTASKS": "2", "JOB_NUM_NODES": "1", "JOB_NODELIST": "node1"}
        about |= array if stage.endswith("-array") else {}
        env = {
            **{f"SLURM_{name}": value for name, value in about.items()}, "PATH": f"{commands}:/usr/bin:/bin",
            "AT": str(tmp_path), "COMMAND": str(SCRIPTS / f"{stage}.sbatch"), "SILENT": "0",
            "PENDING": "train all train\n", "SIGNAL_BEFORE": "", "SIGNAL_IN_STEP": "", **more,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", 'export BATCH=$$; exec bash "$@"', "bash", SCRIPTS / f"{stage}.sbatch", "demo", "seed=1"],
            cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


def noted(folder: Path, name: str) -> list[str]:
    """Calls that a stand-in noted."""
    return (folder / name).read_text("utf-8").splitlines() if (folder / name).exists() else []


def test_the_scripts_begin_alike() -> None:
    """So what is shown of one of them here holds for all."""
    found = set()
    for path in SCRIPTS.glob("*.sbatch"):
        text = path.read_text("utf-8")
        found.add(text[text.index("\n# Slurm runs a copy of this file") : text.index("/common.sh")])
    assert len(found) == 1


def test_a_slurm_that_does_not_answer_at_first_is_asked_again(job: Job, tmp_path: Path) -> None:
    code, said = job("datastore-array", SILENT="3")
    assert (code, len(noted(tmp_path, "asked")), len(noted(tmp_path, "steps"))) == (0, 4, 1), said


def test_one_that_never_answers_is_asked_for_a_quarter_of_an_hour(job: Job, tmp_path: Path) -> None:
    code, said = job("train", SILENT="9", SECONDS="900")
    assert (code, noted(tmp_path, "steps")) == (75, []) and "submit the same command again" in said


def test_without_the_scripts_own_folder_nothing_runs(job: Job, tmp_path: Path) -> None:
    """`sbatch <slurm/train.sbatch`; a file of the same name in the folder of the job is another one."""
    (tmp_path / "common.sh").write_text("touch another", "utf-8")
    code, said = job("train", COMMAND="(null)")
    assert (code, noted(tmp_path, "steps")) == (1, []) and "common.sh: No such file" in said
    assert not (tmp_path / "another").exists()


def test_a_complete_run_is_done(job: Job, tmp_path: Path) -> None:
    code, said = job("run", PENDING="")
    assert (code, noted(tmp_path, "steps")) == (0, []) and said.endswith("run: done\n")


@pytest.mark.parametrize(("stage", "verb"), [("search", "knn search"), ("finetune", "finetune")])
def test_a_stage_that_the_recipe_has_not_is_left_to_its_verb_to_refuse(
    job: Job, stage: str, verb: str, tmp_path: Path
) -> None:
    job(stage, PENDING="")
    assert noted(tmp_path, "steps") == [f"{verb} demo seed=1"]


@pytest.mark.parametrize("stage", SEVERAL)
def test_a_stop_before_the_first_step_or_between_two_starts_no_step(job: Job, stage: str, tmp_path: Path) -> None:
    two = "train all train\nevaluate one report\n"
    assert job(stage, PENDING=two, SIGNAL_BEFORE="yes")[0] == 75 and noted(tmp_path, "steps") == []
    assert job(stage, PENDING=two, SIGNAL_IN_STEP="yes")[0] == 75 and noted(tmp_path, "steps") == ["train demo seed=1"]
    stages = ("train", "evaluate") if stage == "run" else (stage, stage)
    assert noted(tmp_path, "again") == [f"-m launchers.again {each} demo seed=1" for each in stages]


def test_a_stop_in_the_last_step_that_is_done_leaves_nothing_to_do(job: Job, tmp_path: Path) -> None:
    assert job("run", SIGNAL_IN_STEP="yes")[0] == 0
    assert noted(tmp_path, "again") == []


def test_a_stop_that_came_before_the_step_was_known_reaches_it() -> None:
    text = (SCRIPTS / "common.sh").read_text("utf-8")
    await_ = text[text.index("await() {") : text.index("finish() {")]
    waiting = f"STOPPED=USR1\n{await_}\nsleep 600 &\nawait $!"
    done = subprocess.run(["bash", "-c", waiting], env={"PATH": os.defpath}, timeout=DEADLINE_S)
    assert done.returncode == 128 + 10
