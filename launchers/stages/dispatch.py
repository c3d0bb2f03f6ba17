"""Where jobs go: Slurm, submitit's local executor, or this process. The only place that submits."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from distlm.errors import DistlmError, Stopped
from distlm.runtime.child import listens, until_told_twice
from distlm.runtime.ranks.said import cause_in
from distlm.runtime.rundir import RunDir
from distlm.runtime.stop import StopFlag
from launchers.jobs import record_job, submissions, with_states
from launchers.stages import slurm
from launchers.stages.graph import SPECS, Job
from launchers.stages.render import Plan, executor
from launchers.task import STOP, StageFailed, StageTask

# What srun, mpirun, torchrun and submitit tell their ranks; SLURM_CONF says which Slurm to ask.
_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "TORCHELASTIC_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
          "GROUP_RANK", "ROLE_RANK", "DISTLM_RANKS")  # fmt: skip
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")


def tasks_of(plan: Plan, job: Job) -> list[StageTask]:
    """The callables of a job: one, or one for each share."""
    shares: list[tuple[str, ...]] = [(f"launch.share={number}/{job.shares}",) for number in range(job.shares)] or [()]
    limits = plan.site.max_same_start, plan.site.again
    return [StageTask(job.stage, job.verbs, str(plan.recipe), share, job.ranks, *limits) for share in shares]


def clean_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what a job or a launcher around this process put there: it would be taken for the new job's own."""
    return {
        name: value
        for name, value in env.items()
        if name in _KEPT or not (name.startswith(_PREFIXES) or name in _NAMES)
    }


def submit_slurm(plan: Plan) -> dict[str, str]:
    """Submit all jobs; name → Slurm's job id. When one is refused, those before it are cancelled: all or nothing.

    Raises DistlmError with sbatch's own words.
    """
    ids: dict[str, str] = {}
    with _environment(clean_environment(os.environ)):
        for job in plan.jobs:
            after = [ids[name] for name in job.after]
            made = executor(plan, job, after)
            try:
                ids[job.name] = made.submit_array(tasks_of(plan, job))[0].job_id.partition("_")[0]
            except (FailedJobError, FailedSubmissionError) as error:
                if ids:
                    slurm.cancel(list(ids.values()))
                words = (str(error).strip().splitlines() or ["no reason given"])[-1]
                raise DistlmError(
                    f"sbatch refused {job.name}: {words}; nothing is left submitted. Check partition, account, limits "
                    "and GPUs in the site file (distlm site show)"
                ) from error
            _record(plan, job, ids[job.name], "slurm", after)
    return ids


def submitted_before(run: RunDir) -> list[str]:
    """Ids of this run directory's Slurm jobs that still wait or run, whoever submitted them."""
    return [before.job for before, jobs in with_states(submissions(run)) if before.job and any(j.active for j in jobs)]


def run_local(plan: Plan) -> None:
    """The jobs one after another through submitit's local executor.

    A stop signal is handed on to the ranks, which save; a second Ctrl-C ends them. Raises DistlmError when one fails,
    Stopped when something is left to do after a stop, KeyboardInterrupt at a second Ctrl-C.
    """
    env = clean_environment(os.environ) | plan.site.env
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONSAFEPATH": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(plan.code), *filter(None, [env.get("PYTHONPATH")])])
    with _environment(env), until_told_twice() as stop:
        for job in plan.jobs:
            if stop.reason is not None:
                raise Stopped(f"{job.name}: not begun; run the same command again to continue")
            made = submitit.LocalExecutor(plan.folder, max_num_timeout=1_000_000)
            made.update_parameters(
                tasks_per_node=job.resources.tasks_per_node, gpus_per_node=job.resources.gpus_per_node,
                timeout_min=job.resources.time, signal_delay_s=plan.site.signal_lead_s, stderr_to_stdout=True,
            )  # fmt: skip
            with _apart_from_the_terminal():
                started = made.submit_array(tasks_of(plan, job))
            for one in started:
                _record(plan, job, one.job_id, "local", [])
                log = log_of(plan, job, one.job_id, "local")
                print(f"{job.name}: {job.ranks} rank(s), process {one.job_id}; log {log}", flush=True)
            _await(plan, job, started, stop)


def run_debug(plan: Plan) -> None:
    """The jobs one after another in this process, one rank; at a terminal an error opens the debugger.

    Raises DistlmError when one fails; SystemExit(75) when one was stopped.
    """
    for job in plan.jobs:
        for task in tasks_of(plan, job):
            with _environment(clean_environment(os.environ) | plan.site.env):
                one = submitit.DebugExecutor(plan.folder).submit(task)
                os.environ["SUBMITIT_DEBUG_JOB_ID"] = one.job_id
                try:
                    # submitit's own way to the result stops in pdb, which without a terminal only hides the error.
                    one.result() if sys.stdin.isatty() else one.submission().result()
                except StageFailed as error:
                    raise DistlmError(f"{job.name}: {error}") from error


def log_of(plan: Plan, job: Job, job_id: str, front: str) -> Path:
    """Log of the job's rank 0 (of the first share)."""
    # submitit makes an array only of two tasks and more, and locally never.
    element = "_0" if front == "slurm" and job.shares > 1 else ""
    return plan.folder / f"{job_id}{element}_0_log.out"


@contextmanager
def _apart_from_the_terminal() -> Iterator[None]:
    """What is started in the block gets no Ctrl-C and no SIGHUP, at which submitit kills the ranks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await(plan: Plan, job: Job, started: Sequence[submitit.Job[Any]], stop: StopFlag) -> None:
    try:
        while not all(one.done() for one in started):
            if stop.reason is not None:
                _tell(plan, started)
            time.sleep(0.1)
    except KeyboardInterrupt:
        for one in started:
            for process in _processes(one):
                with suppress(psutil.Error):
                    process.kill()
        raise
    run = RunDir.of(plan.config)
    for one in started:
        left = [rank for rank in range(job.ranks) if not one.task(rank).paths.result_pickle.exists()]
        if len(left) == job.ranks and stop.reason is not None:
            raise Stopped(f"{job.name}: stopped; run the same command again to continue")
        # A result of every rank, and the stage's own marker: no exit code is trusted.
        if left or one.exception():
            logs = [plan.folder / f"{one.job_id}_{rank}_log.out" for rank in range(job.ranks)]
            raise DistlmError(f"stage {job.name} failed; {_why(logs)}")
    if not job.shares and not SPECS[job.stage].finished(plan.config, run):
        raise DistlmError(f"stage {job.name} ended without an error but left no completion marker in {run.root}")


def _tell(plan: Plan, started: Sequence[submitit.Job[Any]]) -> None:
    """SIGTERM to every rank that listens; call it until they have ended.

    Some may not have been started yet: they see the file. To those that know it already it is nothing new.
    """
    (plan.folder / STOP).touch()
    for one in started:
        for rank in _processes(one)[1:]:
            with suppress(psutil.Error):
                if listens(rank.pid):
                    rank.send_signal(signal.SIGTERM)


def _processes(one: submitit.Job[Any]) -> list[psutil.Process]:
    """submitit's process that started the ranks of a local job, and the ranks; none when it has ended."""
    if one.done():
        return []
    try:
        first = psutil.Process(int(one.job_id))
        return [first, *first.children()]
    except psutil.NoSuchProcess:
        return []


def _why(logs: Sequence[Path]) -> str:
    """The error that is the cause of a failure in the logs of its ranks, else what the first of them ends with."""
    log, said = cause_in(logs)
    if said:
        return f"{log}: {said}"
    lines = logs[0].read_text("utf-8", "replace").splitlines() if logs[0].exists() else []
    return "\n".join([f"{logs[0]} ends with:", *(f"  {line}" for line in lines[-8:])])


def _record(plan: Plan, job: Job, job_id: str, front: str, after: list[str]) -> None:
    record_job(
        RunDir.of(plan.config), job.stage, job_id, "submitit", str(job.resources.nodes), front=front,
        name=job.name, ranks=job.ranks, shares=job.shares, after=after, log=str(log_of(plan, job, job_id, front)),
    )  # fmt: skip


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """os.environ is `env` for the block: submitit hands on its own environment."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
