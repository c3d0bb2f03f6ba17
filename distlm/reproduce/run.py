"""Running an experiment: its commands in order, several at once where asked; each resumes or says it is complete."""

import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from distlm.analysis.tables import NothingFinished, nothing_finished
from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError, UsageError
from distlm.pipeline import stage_environment, verb_command
from distlm.reproduce.calls import record_call
from distlm.reproduce.experiment import Experiment, Item
from distlm.reproduce.results import REPRODUCE, write_results
from distlm.runtime import metrics
from distlm.runtime.child import end_all, start_stage, tell_ranks, until_told_twice, verdict, waited_for_s
from distlm.runtime.progress import format_seconds, say
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.rundir import RunDir
from distlm.verbs import STAGE_VERBS

_LOOK_EVERY_S = 0.2
_TUNED_ON = "valid"
_STAGES = {"run": "knn", **{verb.words: verb.stage for verb in STAGE_VERBS}}
"""Verb → the last stage that it runs."""


@dataclass
class _Running:
    item: Item
    process: subprocess.Popen[str]
    env: dict[str, str]
    began: float


def plan_experiment(experiment: Experiment) -> str:
    """Every command, as a user can type it, in order."""
    return "\n".join([f"{experiment.title}; {len(experiment.items)} commands:", *map(command_line, experiment.items)])


def command_line(item: Item) -> str:
    """The command of an item as text."""
    return f"distlm {shlex.join(item.words)}"


def run_experiment(experiment: Experiment, at_once: int = 1) -> int:
    """Run every command that is not finished, up to `at_once` at a time, then write and print the tables.

    The output of commands goes to the terminal when they run one by one, else to logs/NAME.log. Returns an exit
    code: 75 when a command was stopped after a checkpoint (the same command continues it). Raises DistlmError when one
    fails, after those under way are done; before any runs, for settings that its tables cannot take or that are others
    than those of what lies in a run's folder.
    """
    # A mistake in the settings of the last command is found before the first one runs for hours.
    configs = {item.name: load_config(item.recipe, item.settings) for item in experiment.items}
    _check(experiment, configs)
    record_call(experiment)
    waiting, running, done = list(experiment.items), list[_Running](), set[str]()
    failed: list[Item] = []
    stopped, began = False, time.monotonic()
    with ExitStack() as environments, until_told_twice() as stop, _ending(running):
        while running or (waiting and not failed and not stopped):
            ready = [item for item in waiting if done.issuperset(item.after)]
            while ready and len(running) < at_once and not (failed or stopped or stop.reason):
                item = ready.pop(0)
                waiting.remove(item)
                number = len(experiment.items) - len(waiting)
                running.append(_start(experiment, item, number, configs[item.name], at_once, environments))
            if stop.reason is not None:
                stopped = True
                for entry in running:
                    tell_ranks(entry.process.pid)
            for entry, processor_s in _ended(running):
                running.remove(entry)
                _record(entry.item, processor_s)
                code, took = verdict(entry.process.returncode, entry.env, stop), time.monotonic() - entry.began
                if code == EXIT_DONE:
                    done.add(entry.item.name)
                    say(f"{entry.item.name}: done in {format_seconds(took)}")
                elif code == EXIT_STOPPED:
                    stopped = True
                    say(f"{entry.item.name}: stopped after {format_seconds(took)}")
                else:
                    failed.append(entry.item)
                    say(f"{entry.item.name}: failed with exit code {code}")
            time.sleep(_LOOK_EVERY_S)
    if failed:
        where = f"in {_log(experiment, failed[0])}" if at_once > 1 else "above"
        raise DistlmError(f"{failed[0].name} failed; its output is {where}. Alone: {command_line(failed[0])}")
    if len(done) < len(experiment.items):
        say("stopped; run the same command again to continue")
        return EXIT_STOPPED
    say(f"all {len(experiment.items)} commands done in {format_seconds(time.monotonic() - began)}")
    try:
        print(write_tables(experiment), flush=True)
    except NothingFinished:
        # With --only there may be none that a table has.
        say(f"{experiment.root}: nothing for the tables yet")
    return EXIT_DONE


def write_tables(experiment: Experiment) -> str:
    """Write the tables, figures and results.json of what is finished, into the experiment's folder; the tables as text.

    Raises DistlmError when nothing is.
    """
    if not experiment.root.is_dir():
        raise nothing_finished(experiment.root)
    text: str = import_module(experiment.paper).write_tables(experiment.root)
    return f"{text}\nas data: {write_results(experiment)}"


def _check(experiment: Experiment, configs: Mapping[str, RunConfig]) -> None:
    """Raises DistlmError for what would be found when hours are spent, or once the call is on record."""
    for config in configs.values():
        if config.knn.splits[0] != _TUNED_ON:
            raise UsageError(
                f"knn.splits=[{','.join(config.knn.splits)}]: the tables compare what was tuned on {_TUNED_ON} and "
                f"measured there; put it first, e.g. 'knn.splits=[{_TUNED_ON}]'"
            )
    paper = import_module(experiment.paper)
    if hasattr(paper, "check_settings"):
        paper.check_settings(configs)
    for item in experiment.items:
        config = configs[item.name]
        RunDir.of(config).refuse_other_config(config, _STAGES[item.verb])


def _start(
    experiment: Experiment, item: Item, number: int, config: RunConfig, at_once: int, environments: ExitStack
) -> _Running:
    log = _log(experiment, item)
    say(f"[{number}/{len(experiment.items)}] {command_line(item)}" + (f" > {log}" if at_once > 1 else ""))
    ranks = config.launch.ranks if any(verb.ranks for verb in STAGE_VERBS if verb.words == item.verb) else 1
    settings = item.settings
    if at_once > 1 and not config.launch.threads:
        # Commands under way share the cores.
        settings = (*settings, f"launch.threads={share_of_cores(config.launch.ranks * at_once)}")
    command = verb_command(item.verb, config, item.recipe, settings, ranks)
    environment = environments.enter_context(stage_environment(config))
    if at_once == 1:
        return _Running(item, start_stage(command, environment), environment, time.monotonic())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = start_stage(command, environment, stdout=stream, stderr=subprocess.STDOUT)
    return _Running(item, process, environment, time.monotonic())


def _ended(running: list[_Running]) -> Iterator[tuple[_Running, float]]:
    """Those that have ended, with the processor time of all their processes, in seconds."""
    for entry in [*running]:
        before = waited_for_s()
        if entry.process.poll() is not None:
            yield entry, waited_for_s() - before


def _record(item: Item, processor_s: float) -> None:
    """In its run's metrics, so that those of all its starts add up."""
    if item.folder.is_dir():
        RunDir(item.folder).metrics.write(REPRODUCE, {metrics.PROCESSOR_SECONDS: round(processor_s, 3)})


def _log(experiment: Experiment, item: Item) -> Path:
    return experiment.root / "logs" / f"{item.name}.log"


@contextmanager
def _ending(running: list[_Running]) -> Iterator[None]:
    """An exception, as a second Ctrl-C is, ends every command under way."""
    try:
        yield
    except BaseException:
        for entry in running:
            end_all(entry.process)
        raise
