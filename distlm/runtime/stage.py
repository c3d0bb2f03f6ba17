"""What every stage is handed: the world, the collectives, the stop flag and the run directory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distlm.config.recipe import RUN_CONFIG
from distlm.config.schema import RunConfig
from distlm.errors import Busy, DistlmError, Stopped
from distlm.runtime.alive import watching
from distlm.runtime.checked import Written, require_whole
from distlm.runtime.files import atomic_path
from distlm.runtime.progress import record_progress, say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.ranks.comm import Comm, SingleComm, open_comm
from distlm.runtime.ranks.cores import rank_cores
from distlm.runtime.ranks.world import World, resolve_world
from distlm.runtime.rundir import RunDir
from distlm.runtime.stop import StopFlag
from distlm.runtime.trackers.tracking import require_trackers, tracking
from distlm.system_errors import told


@dataclass(frozen=True)
class Stage:
    """Context of a running stage. `comm` is collective; `stop` must be checked at unit boundaries."""

    name: str
    config: RunConfig
    world: World
    comm: Comm
    stop: StopFlag
    run: RunDir

    def require_whole(self, root: Path, files: Sequence[Written], alone: bool = False) -> None:
        """Compare the files below `root` with their checksums, unless launch.verify=false; see checked.require_whole.
        Collective; `alone`: this rank reads all of them, and the others need not call it."""
        if self.config.launch.verify:
            require_whole(SingleComm() if alone else self.comm, root, files, self.name)


@contextmanager
def open_stage(name: str, config: RunConfig, world: World | None = None) -> Iterator[Stage]:
    """Resolve the world, join the other ranks, claim the run directory (rank 0) and listen for stop signals.

    `name` is a key of rundir.STAGES. A refusal on rank 0 is raised on every rank. Raises Stopped when a signal came
    before there was work.
    """
    world = world or resolve_world()
    set_threads(config.launch.threads, world)
    with StopFlag(world.rank) as stop:
        comm = _join(world, stop)
        run = RunDir.of(config)
        latest, own = run.root / RUN_CONFIG, run.root / "configs" / f"{name}.yaml"
        before = {path: _text(path) for path in (latest, own)} if world.rank == 0 else {}
        # A run directory that is the recipe: its config.yaml may change between two ranks' reading, so rank 0's holds.
        config = rank0_first(comm, lambda: _claim(run, config, name))
        run = RunDir.of(config)
        say(f"{name}: {world}", world.rank)
        record = run.metrics if world.rank == 0 else None
        with (
            watching(run.root, world, comm, config.launch.lost_after_s),
            record_progress(record),
            tracking(config, record, config.name),
        ):
            try:
                if stop.agreed(comm):
                    raise Stopped(f"{name}: stopped before its first unit of work; run the same command again")
                with told(run.root):
                    yield Stage(name, config, world, comm, stop, run)
            except DistlmError as error:
                # A refused setting must not lock the directory against its correction, nor be the next start's.
                # Where a full disk does not allow it, the error says that already.
                with suppress(OSError, DistlmError):
                    if world.rank == 0 and not isinstance(error, Stopped):
                        _put_back(latest, before[latest])
                with suppress(OSError, DistlmError):
                    if world.rank == 0 and isinstance(error, Busy):
                        # They are the settings of the run that works here.
                        _put_back(own, before[own])
                    elif world.rank == 0:
                        run.withdraw_stage(config, name)
                raise
            finally:
                if record is not None:
                    record.say_lost()
        comm.close()


def _join(world: World, stop: StopFlag) -> Comm:
    try:
        return open_comm(world)
    except DistlmError as error:
        if stop.reason is None:
            raise
        # The same signal may have ended the others before they could listen.
        raise Stopped(f"stopped by {stop.reason} before all ranks had joined; run the same command again") from error


def _claim(run: RunDir, config: RunConfig, name: str) -> RunConfig:
    require_trackers(config)
    run.open_stage(config, name)
    return config


def _text(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


def _put_back(path: Path, before: str | None) -> None:
    """Recorded settings as they were before a stage that failed; they stay where there were none."""
    if before is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(before, "utf-8")


def set_threads(threads: int, world: World) -> int:
    """Give this rank `threads` CPU threads (0: its cores) before numeric libraries load."""
    count = threads or rank_cores(world)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return count
