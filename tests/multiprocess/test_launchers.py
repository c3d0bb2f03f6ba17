"""`distlm train` under mpirun, torchrun, the deepspeed launcher and the variables of srun: the same losses."""

import json
import subprocess
import sys

import pytest
from support import ENVIRONMENT, TINY, distlm, write_text

from distlm.config.load import load_config
from distlm.pipeline import STEPS, stage_command

pytestmark = pytest.mark.multiprocess


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_every_launcher_trains_the_same_model(tmp_path):
    text = write_text(tmp_path / "text")
    shared = [*TINY, "train.updates=3", "train.save_every=0", "train.valid_every=0", "data.source=folder"]
    shared += [f"data.text_dir={text}", f"data.tokens_dir={tmp_path / 'tokens'}", "launch.ranks=2"]
    distlm("data", "prepare", "demo", *shared, f"run_dir={tmp_path / 'prepare'}")
    train = next(step for step in STEPS if step.words == "train")
    found = {}
    for launcher in ("mpirun", "torchrun", "deepspeed"):
        words = [*shared, f"launch.launcher={launcher}", f"run_dir={tmp_path / launcher}"]
        command = stage_command(train, load_config("demo", words), "demo", words)
        assert launcher in command[0]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{launcher}\n{done.stdout}\n{done.stderr}"
        found[launcher] = losses(tmp_path / launcher)
    assert len(found["mpirun"]) == 3
    assert found["mpirun"] == found["torchrun"] == found["deepspeed"]


def test_the_variables_of_an_srun_step_are_enough(tmp_path):
    """Two processes with the variables that srun sets, without MPI: no Slurm is needed for this path."""
    text = write_text(tmp_path / "text")
    words = [*TINY, "train.updates=2", "train.save_every=0", "train.valid_every=0", "data.source=folder"]
    words += [f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}"]
    distlm("data", "prepare", "demo", *words)
    ranks = []
    for rank in range(2):
        step = {
            "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "distlm", "train", "demo", *words]
        ranks.append(subprocess.Popen(command, env={**ENVIRONMENT, **step}, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert len(losses(tmp_path / "run")) == 2
