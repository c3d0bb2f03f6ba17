"""Opens the views of train.trackers around a stage."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

from distlm.config.load import config_tree
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, Stopped, UsageError
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import MetricsFile, followed
from distlm.runtime.progress import say
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.trackers.follower import Follower, View


def require_trackers(config: RunConfig) -> None:
    """UsageError for a tracker whose package is not installed."""
    for name in config.train.trackers:
        found = find_spec(name)
        # A folder of that name in the working directory is found, too, and has no origin.
        if found is None or found.origin is None:
            raise UsageError(
                f"train.trackers=[{','.join(config.train.trackers)}]: {name} is not installed: pip install {name}, or "
                "leave it out"
            )


@contextmanager
def tracking(config: RunConfig, record: MetricsFile | None, title: str) -> Iterator[None]:
    """For the block, the views of train.trackers show `record`; None (ranks above 0): nothing is shown.

    `title` is the run's name where a tracker shows one. A tracker that fails, or that another process of this run
    keeps, is left off with a line.
    """
    if record is None or not config.train.trackers:
        yield
        return
    with ExitStack() as held:
        views = (_opened(name, config, record, title) for name in dict.fromkeys(config.train.trackers))
        follower = Follower(record.path, [view for view in views if view is not None and _held(view, held)])
        follower.update()
        failed = True
        try:
            with followed(follower.told):
                yield
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            follower.close(failed)


def _opened(name: str, config: RunConfig, record: MetricsFile, title: str) -> View | None:
    folder = record.path.parent / name
    try:
        if name == "tensorboard":
            from distlm.runtime.trackers.tensorboard import TensorBoardView

            return TensorBoardView(folder)
        # Its reports of its own errors go over the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        from distlm.runtime.trackers.wandb import WandbView

        return WandbView(folder, title, config_tree(config))
    except Exception as error:
        say(f"train.trackers: {name} is left off: {type(error).__name__}: {error}")
        return None


def _held(view: View, held: ExitStack) -> bool:
    """Whether this process is the one that keeps the view; of shares that run at once one is."""
    try:
        held.enter_context(only_writer(view.folder, SingleComm(), f"keeping the view of {view.name}"))
    except DistlmError as error:
        say(f"train.trackers: {view.name} is left off in this process: {error}")
        return False
    return True
