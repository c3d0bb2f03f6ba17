"""Runs that `launchers.submit` brings to the real Slurm, and the launchers' other commands on them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.slurm import long_training
from support.slurm.cluster import Slurm

SITE = "gpus_per_node: 0\ncpus_per_task: 1\nmem: 200M\ntime: 120\nmpi: none\n"


def tool(slurm: Slurm, name: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m launchers.NAME WORDS`."""
    return slurm.run(sys.executable, "-m", f"launchers.{name}", *words, check=check)


def submit(slurm: Slurm, run: Path, tokens: Path, stages: str, *words: str, site: str = "") -> dict[str, str]:
    """Submit stages of a run whose training takes seconds; name → job id. `site`: more lines for the site file."""
    file = run.with_name(f"{run.name}-site.yaml")
    file.write_text(SITE + site, "utf-8")
    tool(slurm, "submit", *long_training(run, tokens), f"--site={file}", f"--stages={stages}", *words)
    jobs = jobs_of(run)
    slurm.jobs += jobs.values()
    return jobs


def jobs_of(run: Path) -> dict[str, str]:
    """Name → id of the newest job."""
    return {line["name"]: line["job"] for line in recorded(run) if "name" in line}


def recorded(run: Path) -> list[dict[str, Any]]:
    """Lines of launch/jobs.jsonl."""
    return [json.loads(line) for line in (run / "launch" / "jobs.jsonl").read_text("utf-8").splitlines()]


def said(slurm: Slurm, run: Path, job: str) -> str:
    """What a job of submit wrote, of all its ranks."""
    return "\n".join(file.read_text("utf-8") for file in sorted(run.glob(f"launch/submitit/*/{job}_*_log.out")))
