"""Ranks that start through a wrapper, as in a container image: `python:` and `srun:` of the site file.

The wrapper here makes of the node what an image is to the ranks: another environment, with no command of Slurm in it.
"""

import sys
from pathlib import Path

import pytest
from support.slurm import ON_TWO, REQUEUED, logged, long_training, script, wait_for_updates
from support.slurm.cluster import Slurm
from support.slurm.submitted import SITE, said, submit
from support.train import tiny_tokens

IMAGE = """#!/bin/sh
# What `exec apptainer exec --nv --bind /shared image.sif python "$@"` would do.
mkdir -p {empty}
echo "in the image: rank $SLURM_PROCID, label $IN_SRUN" >&2
PATH={empty} exec {python} "$@"
"""


@pytest.mark.slow
def test_stopped_ranks_in_an_image_are_requeued_by_the_script_around_them(slurm: Slurm, tmp_path: Path) -> None:
    tokens, wrapper = tiny_tokens(tmp_path), tmp_path / "python-in-image"
    wrapper.write_text(IMAGE.format(empty=tmp_path / "empty", python=sys.executable), "utf-8")
    wrapper.chmod(0o755)
    more = f"python: {wrapper}\nsrun: ['--export=ALL,IN_SRUN=from the site']\n"
    runs = {name: tmp_path / name for name in ("submit", "script")}
    site = tmp_path / "site.yaml"
    site.write_text(SITE + more, "utf-8")
    jobs = {
        "submit": submit(slurm, runs["submit"], tokens, "train", "--nodes=2", site=more)["train"],
        "script": slurm.sbatch(*ON_TWO, script("train"), *long_training(runs["script"], tokens), DISTLM_SITE=str(site)),
    }
    for name, sign in (("submit", "USR2"), ("script", "USR1")):
        wait_for_updates(slurm, jobs[name], runs[name], 3)
        slurm.signal(jobs[name], sign)
    for name, job in jobs.items():
        slurm.done(job)
        words = said(slurm, runs[name], job) + slurm.output(job)
        assert slurm.restarts(job) == 1 and REQUEUED in words, words
        assert len(logged(runs[name])) == 100
        for rank in range(2):
            assert f"in the image: rank {rank}, label from the site" in words
    assert "requeue: the batch script owns it" in said(slurm, runs["submit"], jobs["submit"])
