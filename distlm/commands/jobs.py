"""Jobs of runs: the verbs of the launchers, `distlm submit` as `python -m launchers.submit` and so on.

The launchers stand above this package, so they are found by name, and only when one of them is asked for. A wheel has
them in a folder of its own (distlm/installed.py), so their place comes first on the path.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

from distlm.commands.shared import Add
from distlm.errors import EXIT_DONE
from distlm.installed import tree
from distlm.runtime.ranks.world import World

_VERBS = {
    ("submit", "submit"): "submit the stages of a recipe, each after the one before it",
    ("status", "show"): "say what runs are doing: jobs, finished stages, progress, time left",
    ("logs", "show"): "print or follow the logs of a run's ranks",
    ("cancel", "cancel"): "end the jobs of runs",
    ("requeue", "requeue"): "let the jobs of runs start again",
    ("deepspeed", "train"): "train through the `deepspeed` launcher, over hosts or in a Slurm job",
    ("site", "tell"): "the cluster's settings: write a site file, print settings, sbatch flags or set-up lines",
}
"""(launchers.MODULE, its function) → what it does."""


def add_verbs(add: Add) -> None:
    """submit, status, logs, cancel, requeue, deepspeed, site."""
    for (name, function), summary in _VERBS.items():
        run = partial(_run, name, function)
        add(name, summary, run, takes=None, arguments=partial(_add_arguments, name), alone=True)


def _module(name: str) -> ModuleType:
    if (folder := str(tree())) not in sys.path:
        sys.path.insert(0, folder)
    return import_module(f"launchers.{name}")


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    _module(name).add_arguments(parser)


def _run(name: str, function: str, options: argparse.Namespace, _world: World) -> int:
    run: Callable[[argparse.Namespace], int] = getattr(_module(name), function)
    try:
        return run(options)
    except BrokenPipeError:
        # `... | head`: nobody reads on.
        sys.stderr.close()
        return EXIT_DONE
