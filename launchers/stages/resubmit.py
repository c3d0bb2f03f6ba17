"""Submits a job of `distlm submit` once more, under a new id: from the files that its first submission left."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.rundir import RunDir
from launchers.jobs import Submission, record_job
from launchers.stages import slurm
from launchers.stages.dispatch import clean_environment

_DEPENDENCY = re.compile(r"^#SBATCH --dependency=.*\n", re.MULTILINE)


def resubmit(run: RunDir, found: Submission, after: Sequence[str], follows: str = "") -> str:
    """Submit and record the job of `found` (or its whole array) again; the new id.

    `after`: ids of the jobs that must end well first. `follows`: JobLine's. Raises DistlmError where the files of the
    first submission are gone, and when Slurm refuses.
    """
    folder = Path(found.log).parent
    script = folder / f"{found.job}_submission.sh"
    tasks = sorted(folder.glob(f"{found.job}_submitted.pkl")) or sorted(folder.glob(f"{found.job}_*_submitted.pkl"))
    if not script.is_file() or not tasks:
        raise DistlmError(f"{script}: the files of job {found.job} are gone; submit the same command again")
    text = _DEPENDENCY.sub("", script.read_text("utf-8"))
    if after:
        text = text.replace("\n#SBATCH", f"\n#SBATCH --dependency=afterok:{':'.join(after)}\n#SBATCH", 1)
    new = folder / f"again-{os.getpid()}-{found.job}.sh"
    new.write_text(text, "utf-8")
    job = slurm.submit(new, clean_environment(os.environ))
    # The job waits for its files under the new id, as after every submission of submitit.
    new.rename(folder / f"{job}_submission.sh")
    for task in tasks:
        shutil.copyfile(task, folder / task.name.replace(found.job, job, 1))
    log = Path(found.log)
    record_job(
        run, found.stage, job, found.owner, found.nodes, front="slurm", name=found.name, after=list(after),
        log=str(log.with_name(log.name.replace(found.job, job, 1))), **({"follows": follows} if follows else {}),
    )  # fmt: skip
    return job
