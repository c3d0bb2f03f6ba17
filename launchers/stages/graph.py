"""The stages of a recipe as jobs with dependencies: pure data, from the configuration, the site and what is finished.

prepare (or shard) → train → datastore → index-train → index-add → index-merge → search → evaluate → finetune. The
datastore and index-add are one MPI job each, or an array of independent shares and the job that completes the stage
after them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from distlm.config.schema import RunConfig
from distlm.datastore.manifest import read_manifest
from distlm.errors import UsageError
from distlm.finetune.finished.state import require_ranks
from distlm.index.layout import IndexFolder
from distlm.models.registry import kind
from distlm.pipeline import STEPS, steps_of
from distlm.runtime.rundir import RunDir
from launchers.site import ONE_NODE, SERIAL, STAGES, Resources, Site, check_stage

Finished = Callable[[RunConfig, RunDir], bool]


def _step(words: str) -> Finished:
    return STEPS[words].finished


def _merged(config: RunConfig, run: RunDir) -> bool:
    return _step("index build")(config, run)


def _template(config: RunConfig, run: RunDir) -> bool:
    return IndexFolder(run.index).template_json.exists() or _merged(config, run)


def _added(config: RunConfig, run: RunDir) -> bool:
    if _merged(config, run):
        return True
    if not _step("datastore write")(config, run):
        return False
    shards = read_manifest(run.datastore).shards
    return all(IndexFolder(run.index).part_json(shard.index).exists() for shard in shards)


def _all(*verbs: str) -> Finished:
    """Every one of these steps that the configuration asks for is finished."""
    return lambda config, run: all(step.finished(config, run) for step in steps_of(config) if step.words in verbs)


def _finetuned(config: RunConfig, run: RunDir) -> bool:
    return _step("finetune")(config, run) and run.report.exists()


def _evaluated(config: RunConfig, run: RunDir) -> bool:
    return _all("evaluate", "knn tune", "knn evaluate")(config, run) and run.report.exists()


@dataclass(frozen=True)
class StageSpec:
    """What a stage runs, and how to see that it is finished."""

    verbs: tuple[str, ...]
    """Verbs of `distlm`, one after another."""
    finished: Finished
    """The completion marker is there: no exit code is trusted."""
    shares: bool = False
    """Its units can be done by independent jobs (launch.share)."""
    optional: tuple[str, ...] = ()
    """Verbs that only some configurations ask for."""

    def verbs_of(self, config: RunConfig) -> tuple[str, ...]:
        """The verbs that this configuration needs, in order; none: it does without this stage."""
        order = [step.words for step in steps_of(config)]
        # The three steps of the index are one in `distlm run`; the report needs something to report.
        wanted = [*order, *(["index train", "index add", "index merge"] if "index build" in order else [])]
        verbs = sorted({*self.verbs, *self.optional} & {*wanted}, key=wanted.index)
        return (*verbs, "report") if verbs and "report" in self.verbs else tuple(verbs)


SPECS: dict[str, StageSpec] = {
    "prepare": StageSpec(("data prepare",), _step("data prepare")),
    "shard": StageSpec(("data shard",), _step("data shard")),
    "train": StageSpec(("train",), _step("train")),
    "datastore": StageSpec(("datastore write",), _step("datastore write"), shares=True),
    "index-train": StageSpec(("index train",), _template),
    "index-add": StageSpec(("index add",), _added, shares=True),
    "index-merge": StageSpec(("index merge",), _merged),
    "search": StageSpec(("knn search",), _all("knn search", "knn cache"), optional=("knn cache",)),
    "evaluate": StageSpec(("knn tune", "knn evaluate", "report"), _evaluated, optional=("evaluate",)),
    "finetune": StageSpec(("finetune", "report"), _finetuned),
}
"""By stage name, in order."""


@dataclass(frozen=True)
class Job:
    """One submission: a job, or an array of `shares` jobs."""

    name: str
    """The stage, or STAGE-shares for an array before it."""
    stage: str
    verbs: tuple[str, ...]
    resources: Resources
    """nodes and tasks_per_node are this job's (each element's)."""
    after: tuple[str, ...] = ()
    """Names of the jobs that must have ended well."""
    shares: int = 0
    """Elements of the array (0: no array)."""

    @property
    def ranks(self) -> int:
        """Ranks of the job, or of one element."""
        return self.resources.nodes * self.resources.tasks_per_node


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, above the site file; None: as the site says."""

    nodes: int | None = None
    ranks: int | None = None
    array: int | None = None
    time: int | None = None
    """Minutes."""


def choose_stages(text: str, array: int | None = None) -> tuple[str, ...]:
    """Stages named in "train,datastore" or "train..index-merge", in order; empty: all.

    Raises UsageError for unknown ones, and when none of them can be the `array` that is asked for.
    """
    chosen = set() if text else set(STAGES)
    for part in text.split(",") if text else []:
        first, dots, last = part.partition("..")
        start = STAGES.index(check_stage(first, "--stages")) if first or not dots else 0
        end = (STAGES.index(check_stage(last, "--stages")) if last else len(STAGES) - 1) if dots else start
        chosen |= set(STAGES[start : end + 1])
    if array is not None and not any(SPECS[stage].shares for stage in chosen):
        able = ", ".join(stage for stage, spec in SPECS.items() if spec.shares)
        raise UsageError(f"--array {array}: none of these stages can be an array ({able} can)")
    return tuple(stage for stage in STAGES if stage in chosen)


def pending_stages(config: RunConfig, chosen: Iterable[str] = STAGES) -> tuple[str, ...]:
    """The chosen stages that the configuration asks for and that are not finished in the run directory."""
    run, asked = RunDir.of(config), [stage for stage in chosen if SPECS[stage].verbs_of(config)]
    return tuple(stage for stage in asked if not SPECS[stage].finished(config, run))


def build_graph(config: RunConfig, site: Site, stages: Sequence[str], wish: Wish | None = None) -> tuple[Job, ...]:
    """The jobs of those of `stages` that the configuration asks for, in order, each after the one before it.

    Raises UsageError when ranks do not divide over nodes, DistlmError when the batch does not divide over the ranks.
    """
    wish = wish or Wish()
    jobs: list[Job] = []
    for stage in stages:
        if not (verbs := SPECS[stage].verbs_of(config)):
            continue
        jobs += _jobs(stage, verbs, site, wish, tuple(job.name for job in jobs[-1:]))
        if stage == "train":
            kind(config.model.kind).require_ranks(config, jobs[-1].ranks)
        elif stage == "finetune":
            require_ranks(config, jobs[-1].ranks)
    return tuple(jobs)


def _jobs(stage: str, verbs: tuple[str, ...], site: Site, wish: Wish, after: tuple[str, ...]) -> list[Job]:
    spec, wanted = SPECS[stage], site.resources(stage)
    if wish.time is not None:
        wanted = replace(wanted, time=wish.time)
    if wanted.time * 60 <= site.signal_lead_s:
        raise UsageError(
            f"stage {stage}: time limit of {wanted.time} min, and the ranks are told {site.signal_lead_s} s before it; "
            "give more time, or less signal_lead_s in the site file"
        )
    if wanted.array and not spec.shares:
        raise UsageError(f"site: stages.{stage}.array={wanted.array}: this stage has no shares; remove the line")
    shares = (wanted.array if wish.array is None else wish.array) if spec.shares else 0
    if not shares:
        return [Job(stage, stage, verbs, wanted if stage in SERIAL else _place(stage, wanted, wish), after)]
    # A share is one process; what completes the stage only reads what the shares left.
    one = replace(wanted, nodes=1, tasks_per_node=1, gpus_per_node=min(wanted.gpus_per_node, 1))
    array = Job(f"{stage}-shares", stage, verbs, one, after, shares)
    return [array, Job(stage, stage, verbs, one, (array.name,))]


def _place(stage: str, wanted: Resources, wish: Wish) -> Resources:
    """The wished ranks over nodes, as many on each."""
    nodes, ranks = wish.nodes, wish.ranks
    if stage in ONE_NODE:
        # What the site file says of the stage holds; the wish is for stages whose work is spread over nodes.
        nodes = wanted.nodes
        ranks = None if ranks is None else min(ranks, nodes * wanted.tasks_per_node)
    if nodes is None:
        nodes = wanted.nodes if ranks is None else ceil(ranks / wanted.tasks_per_node)
    if ranks is None:
        ranks = nodes * wanted.tasks_per_node
    if ranks % nodes:
        fitting = max(ranks // nodes * nodes, nodes)
        raise UsageError(
            f"stage {stage}: {ranks} ranks do not divide over {nodes} nodes; use --ranks {fitting} or --ranks "
            f"{ceil(ranks / nodes) * nodes}, or another --nodes"
        )
    tasks = ranks // nodes
    if 0 < wanted.gpus_per_node < tasks:
        raise UsageError(
            f"stage {stage}: {tasks} ranks on a node of {wanted.gpus_per_node} GPUs, and a rank needs its own; use at "
            f"most --ranks {nodes * wanted.gpus_per_node} or more --nodes (gpus_per_node in the site file)"
        )
    # A GPU without a rank would be paid for and idle.
    return replace(wanted, nodes=nodes, tasks_per_node=tasks, gpus_per_node=min(wanted.gpus_per_node, tasks))
