"""What a submitted job runs: the verbs of a stage in this process, and the hand-over to submitit when it was stopped.

Imported before submitit has installed its signal handlers, so nothing heavy is imported here.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from distlm.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE
from distlm.runtime.ranks.world import World, resolve_world

KILL_WAIT_S = 60
"""How long the other ranks wait to be killed after rank 0 asked for the requeue."""


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

    def __call__(self) -> dict[str, object]:
        """Run the verbs. Returns the stage and its world; raises StageFailed.

        A stopped stage does not return: rank 0 has the job requeued, and every rank leaves without a result.
        """
        world = self._begin()
        for words in self.verbs:
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
            owner="submitit",
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
            _log(f"{where}; requeue: submitit owns it, the guard allows {self.max_same_start} without progress")
            if executor == "slurm" and shutil.which("scontrol") is None:
                # Said now: at the time limit it would be too late to do anything about it.
                _log(
                    f"WARNING: no scontrol on {world.node}: this job cannot requeue itself. When it is stopped it ends "
                    f"with exit code {EXIT_STOPPED} after a checkpoint; submit the same command again then"
                )
        return world

    def _hand_over(self, rank: int) -> NoReturn:
        """After the collective save: rank 0 calls submitit's own handler, which checkpoints, requeues and exits."""
        executor = _executor()
        if executor is None:
            # Debug: there is nobody to start it again.
            raise SystemExit(EXIT_STOPPED)
        if rank != 0:
            _wait_for_the_end(KILL_WAIT_S if executor == "slurm" else 0)
        if executor == "slurm" and shutil.which("scontrol") is None:
            _log("stopped after a checkpoint; no scontrol here to requeue: submit the same command again")
            raise SystemExit(EXIT_STOPPED)
        try:
            # The StopFlag has put submitit's handler back when the stage ended.
            signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        except (subprocess.SubprocessError, OSError) as error:
            if getattr(error, "returncode", 0) < 0:
                # Slurm took the request, and ended scontrol with the rest of the step before it could say so.
                _log("stopped after a checkpoint; requeued")
                raise SystemExit(EXIT_STOPPED) from error
            _log(f"stopped after a checkpoint; the requeue was refused ({error}): submit the same command again")
            raise SystemExit(EXIT_STOPPED) from error
        raise StageFailed("stopped after a checkpoint, and submitit did not requeue; submit the same command again")

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
    """slurm, local, or None in the debug executor, which runs the task inside `launchers.submit`."""
    if "SUBMITIT_DEBUG_JOB_ID" in os.environ:
        return None
    return os.environ.get("SUBMITIT_EXECUTOR")


def _job_id() -> str:
    """Slurm's own id, also of an array element: the batch script's guard knows the job by it."""
    return os.environ["SLURM_JOB_ID"] if _executor() == "slurm" else JobEnvironment().job_id


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _wait_for_the_end(seconds: float) -> NoReturn:
    """Leave without a result, which would mean success: when Slurm ends the step for the requeue, or after `seconds`.

    Leaving at once could end the whole step (PMIx aborts it) before rank 0 has asked for the requeue.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(EXIT_STOPPED))
    time.sleep(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_STOPPED)


def _log(text: str) -> None:
    print(f"launchers: {text}", file=sys.stderr, flush=True)
