"""What a submitted job runs: the verbs of a stage in this process, and the hand-over to submitit when it was stopped.

Imported before submitit has installed its signal handlers, so nothing heavy is imported here.
"""

import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from distlm.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, DistlmError
from distlm.runtime.ranks.world import World, resolve_world

KILL_WAIT_S = 60
"""How long the other ranks wait to be killed after rank 0 asked for the requeue."""
SILENT_S = 30.0
"""How long rank 0 asks a Slurm that does not answer; the batch script goes on asking, with no rank left to wait."""
STOP = "stop"
"""File beside submitit's that ends local jobs: `distlm submit` was told to stop, so none asks to start again."""
OWNER = "task"
"""Who asks for the requeue, in the record of restarts."""


class StageFailed(RuntimeError):
    """The stage ended with an error, which is in the log above; its text becomes submitit's record of the job."""


@dataclass(frozen=True)
class StageTask:
    """One rank of one stage. Pickled by submitit: plain values only."""

    stage: str
    verbs: tuple[str, ...]
    recipe: str
    """The resolved configuration, a file in the run directory."""
    overrides: tuple[str, ...]
    ranks: int
    max_same_start: int
    again: int = 0
    """How often the job may come back after a preemption that ends it."""

    def __call__(self) -> dict[str, object]:
        """Run the verbs. Returns the stage and its world; raises StageFailed.

        A stopped stage does not return: rank 0 has the job requeued, and every rank leaves without a result.
        """
        world = self._begin()
        for words in self.verbs:
            _leave_if_told()
            code = run_verb([*words.split(), self.recipe, *self.overrides], self.ranks)
            if code == EXIT_STOPPED:
                self._hand_over(world.rank)
            if code != EXIT_DONE:
                raise StageFailed(f"distlm {words} ended with exit code {code}; see the log above")
        if world.rank == 0 and not any(word.startswith("launch.share=") for word in self.overrides):
            self._require_marker()
        return {"stage": self.stage, "world": str(world)}

    def checkpoint(self) -> DelayedSubmission | None:
        """submitit asks on rank 0, before it requeues: the same again, or None when the guard says no."""
        from distlm.config.load import load_config
        from launchers.guard import check_restart

        refusal = check_restart(
            self.stage,
            load_config(self.recipe, self.overrides),
            job=_job_id(),
            owner=OWNER,
            restarts=_restarts(),
            max_same_start=self.max_same_start,
        )
        if refusal is not None:
            _log(refusal)
            return None
        return DelayedSubmission(self)

    def _begin(self) -> World:
        world = resolve_world()
        _log(f"{self.stage}: {world}")
        executor = _executor()
        if world.rank == 0 and executor is not None:
            where = f"job {_job_id()}, start {_restarts() + 1}"
            owner = "submitit" if executor != "slurm" else "this task" if _has_scontrol() else "the batch script"
            _log(f"{where}; requeue: {owner} owns it, the guard allows {self.max_same_start} without progress")
        if executor == "slurm" and _restarts():
            self._end_if_cancelled()
        return world

    def _end_if_cancelled(self) -> None:
        """A requeue that Slurm took a moment before `distlm cancel` brought the job back."""
        from distlm.config.load import load_config
        from distlm.runtime.rundir import RunDir
        from launchers.jobs import say_cancelled, was_cancelled

        job = _job_id()
        if was_cancelled(RunDir.of(load_config(self.recipe, self.overrides)), job):
            say_cancelled(job)
            raise StageFailed(f"job {job} was cancelled")

    def _hand_over(self, rank: int) -> NoReturn:
        """After the collective save: rank 0 has the job queued again, the others leave with it."""
        executor = _executor()
        if executor is None:
            # Debug: there is nobody to start it again.
            raise SystemExit(EXIT_STOPPED)
        _leave_if_told()
        if executor == "slurm":
            ended = JobEnvironment().paths.folder / f"{_job_id()}_{_restarts()}_ended"
            if rank != 0:
                _wait_for_the_end(KILL_WAIT_S, ended)
            self._queue_again(ended)
        if rank != 0:
            _wait_for_the_end(0)
        # The StopFlag has put submitit's handler back when the stage ended.
        signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        raise StageFailed("stopped after a checkpoint, and submitit did not requeue; submit the same command again")

    def _queue_again(self, ended: Path) -> NoReturn:
        """Rank 0 under Slurm: ask for the requeue, and tell the other ranks by the file `ended` that this is done."""
        from distlm.config.load import load_config
        from launchers.again import queue_again
        from launchers.stages.slurm import SlurmSilent

        try:
            if not _has_scontrol():
                raise SlurmSilent("no scontrol here")
            words = queue_again(
                self.stage, load_config(self.recipe, self.overrides), owner=OWNER, again=self.again,
                max_same_start=self.max_same_start, patience_s=SILENT_S,
            ).words  # fmt: skip
        except SlurmSilent as error:
            words = f"the batch script asks for the requeue ({error})"
        except DistlmError as error:
            raise StageFailed(str(error)) from error
        finally:
            ended.touch()
        _log(f"stopped after a checkpoint; {words}")
        raise SystemExit(EXIT_STOPPED)

    def _require_marker(self) -> None:
        from distlm.config.load import load_config
        from distlm.runtime.rundir import RunDir
        from launchers.stages.graph import SPECS

        config = load_config(self.recipe, self.overrides)
        if not SPECS[self.stage].finished(config, RunDir.of(config)):
            raise StageFailed(f"{self.stage} ended with 0 but left no completion marker in {config.run_dir}")


def run_verb(arguments: list[str], ranks: int) -> int:
    """One `distlm` command in this process; its exit code. submitit's own exits pass through.

    The environment is put back: a stage's rendezvous variables would be another launcher's to the next one.
    """
    from distlm.cli import main

    before = dict(os.environ)
    os.environ["DISTLM_RANKS"] = str(ranks)
    try:
        main(arguments)
    except SystemExit as end:
        code = EXIT_DONE if end.code is None else end.code
        if code not in (EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED):
            raise
        return int(code)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return EXIT_DONE


def _executor() -> str | None:
    """slurm, local, or None in the debug executor, which runs the task inside `distlm submit`."""
    if "SUBMITIT_DEBUG_JOB_ID" in os.environ:
        return None
    return os.environ.get("SUBMITIT_EXECUTOR")


def _job_id() -> str:
    return JobEnvironment().job_id


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _has_scontrol() -> bool:
    """Whether this process can ask Slurm. In a container image it often cannot."""
    return shutil.which("scontrol") is not None


def _leave_if_told() -> None:
    """Leave without a result where `distlm submit --cluster local` was told to stop."""
    if _executor() == "local" and (JobEnvironment().paths.folder / STOP).exists():
        _log("stopped; the same command continues")
        _wait_for_the_end(0)


def _wait_for_the_end(seconds: float, ended: Path | None = None) -> NoReturn:
    """Leave without a result, which would mean success: when Slurm ends the step for the requeue, or after `seconds`.

    The file `ended` says that rank 0 has asked for it, or will not.

    Leaving at once could end the whole step (PMIx aborts it) before rank 0 has asked for the requeue.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(EXIT_STOPPED))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (ended is not None and ended.exists()):
        time.sleep(0.2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_STOPPED)


def _log(text: str) -> None:
    print(f"launchers: {text}", file=sys.stderr, flush=True)
