"""sbatch scripts and the placement of ranks as text: nothing here touches the cluster."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from distlm.config.schema import RunConfig
from distlm.errors import EXIT_ERROR, EXIT_USAGE
from launchers.site import Site
from launchers.stages.graph import Job

_NEVER_GIVE_UP = 1_000_000
"""submitit counts time limits and stops at its maximum; whether a job starts again is the guard's decision."""
_FINAL = (0, EXIT_ERROR, EXIT_USAGE)
"""Exit codes of a step that is not run again, as in slurm/common.sh. Any other: a rank was killed or crashed (128 and
the signal, what MPI ends with when a peer is gone, or EXIT_STOPPED of the ranks left over)."""


class Scripts(submitit.SlurmExecutor):
    """submitit's Slurm executor, which can also show its scripts where there is no Slurm."""

    def __init__(self, folder: Path, python_words: Sequence[str] = ()) -> None:
        # A USR1 or USR2 that comes before Python has its handlers would kill the task; ignored signals stay ignored.
        python = f'sh -c \'trap "" USR1 USR2; exec "$@"\' sh {shlex.join(python_words or [sys.executable])}'
        super().__init__(folder, max_num_timeout=_NEVER_GIVE_UP, python=python)

    @classmethod
    def name(cls) -> str:
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self, shares: int = 0) -> str:
        """The script that the next submission would hand to sbatch."""
        # submitit makes no array of one.
        if shares < 2:
            return self._make_submission_file_text(self._submitit_command_str, "")
        try:
            self.parameters["map_count"] = shares
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            del self.parameters["map_count"]


@dataclass(frozen=True)
class Plan:
    """All that a submission needs."""

    config: RunConfig
    site: Site
    jobs: tuple[Job, ...]
    recipe: Path
    """The resolved configuration, which the jobs read."""
    folder: Path
    """submitit's files of this submission."""
    code: Path
    """First on the jobs' Python path."""
    cwd: Path
    """Where it was submitted: the site's and the recipe's relative paths are below it."""


def executor(plan: Plan, job: Job, after: Sequence[str]) -> Scripts:
    """The executor of one job. `after`: ids of the jobs that must have ended well."""
    made = Scripts(plan.folder, plan.site.python_words())
    made.update_parameters(**parameters(plan, job, after))
    return made


def parameters(plan: Plan, job: Job, after: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters of one job, in Slurm's names; None: not given."""
    site, recipe = plan.site, str(plan.recipe)
    wanted = job.resources
    limits = [f"--max-same-start={site.max_same_start}", f"--again={site.again}"]
    again = [sys.executable, "-m", "launchers.again", *limits, job.stage, recipe]
    # The job itself says where it runs: `distlm requeue` may submit it again from another folder.
    options: dict[str, Any] = {"requeue": True, "chdir": str(plan.cwd), **site.account_flags(job.stage)}
    # The first jobs wait for others beside the chain, and the rest for them.
    if conditions := [f"afterok:{':'.join(after)}"] if after else site.after:
        # Without the second, a job whose predecessor failed stays in the queue for ever.
        options |= {"dependency": ",".join(conditions), "kill-on-invalid-dep": "yes"}
    for flag in wanted.extra:
        name, equals, value = flag.removeprefix("--").partition("=")
        options[name] = value if equals else True
    return {
        "job_name": f"{plan.config.name}-{job.name}",
        "time": wanted.time,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks_per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "gpus_per_node": wanted.gpus if wanted.gpus_per_node else None,
        "mem": wanted.mem or None,
        "signal_delay_s": site.signal_lead_s,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": options,
        "setup": [
            *site.setup_lines(),
            # A folder named distlm where the job was submitted must not shadow the code it was submitted with.
            f"export PYTHONPATH={shlex.quote(str(plan.code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        ],
        "srun_args": [
            f"--mpi={site.mpi}",
            # A rank that ends must not kill the others in their last save. A lost one is noticed and named by them
            # within lost_after_s; srun ends what hangs after that.
            "--kill-on-bad-exit=0",
            f"--wait={plan.config.launch.lost_after_s + 30}",
            # Slurm 22.05 to 23.02 do not inherit it from sbatch.
            f"--cpus-per-task={wanted.cpus_per_task}",
            *site.srun,
        ],
        "teardown": [
            "code=$?",
            f"case $code in {'|'.join(map(str, _FINAL))}) ;; *)",
            "  # A rank died, or Slurm did not answer rank 0: this script asks for the requeue instead.",
            '  echo "launchers: the ranks ended with exit code $code; requeue: this batch script owns it"',
            "  trap '' TERM  # Slurm now ends this shell and all it started, though there is a line left to say",
            f"  {shlex.join(again)} ;;",
            "esac",
            "exit $code",
        ],
    }


def placement(job: Job) -> str:
    """Which rank runs on which node with which GPU, as text."""
    wanted = job.resources
    each = (
        f", array of {job.shares}" if job.shares else ": all that it has work for" if job.stage == "index-merge" else ""
    )
    lines = [f"{job.name}: {job.ranks} rank(s) on {wanted.nodes} node(s){each}; distlm {' + '.join(job.verbs)}"]
    for node in range(wanted.nodes):
        ranks = range(node * wanted.tasks_per_node, (node + 1) * wanted.tasks_per_node)
        pairs = (
            f"rank {rank}: {f'GPU {local}' if local < wanted.gpus_per_node else 'CPU'}"
            for local, rank in enumerate(ranks)
        )
        lines.append(f"  node {node}  {', '.join(pairs)}")
    return "\n".join(lines)
