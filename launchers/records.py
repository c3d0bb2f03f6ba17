"""What the launchers write for each other and for later commands: submissions, restarts, deepspeed starts, status."""

from msgspec import UNSET, UnsetType

from distlm.runtime.records import Part, Record


class JobLine(Record):
    """One submission of a stage; a line of the file. A job that records itself at every start has several."""

    FILE = "RUN/launch/jobs.jsonl"
    WHAT = "record of submitted jobs"
    WRITER = "distlm submit, deepspeed, cancel, requeue, and the sbatch scripts (launchers/jobs.py)"
    READERS = ("distlm status", "distlm logs", "distlm cancel",
               "distlm requeue")  # fmt: skip
    MEND = "delete that line"

    time: float
    """When, in Unix seconds."""
    stage: str
    """Stage of the recipe."""
    job: str
    """Slurm's job id (of an array: that of the whole), or submitit's process; empty where there is neither."""
    owner: str
    """Who submitted it and requeues it: sbatch, submitit or deepspeed."""
    nodes: str
    """Nodes as Slurm names them, hosts, or how many nodes were asked for."""
    front: str | UnsetType = UNSET
    """submitit: slurm or local, where the job runs."""
    name: str | UnsetType = UNSET
    """submitit: name of the job, which may be one of several of a stage."""
    ranks: int | UnsetType = UNSET
    """submitit: ranks of the job."""
    shares: int | UnsetType = UNSET
    """submitit: elements of its array (0: none)."""
    after: list[str] | UnsetType = UNSET
    """submitit: ids of the jobs of this run that must have ended well."""
    follows: str | UnsetType = UNSET
    """submitit: id of the job that could not be requeued, and that this one goes on for."""
    cancelled: bool | UnsetType = UNSET
    """true: `distlm cancel` ended it, and it does not start again until `distlm requeue` says so (false)."""
    log: str | UnsetType = UNSET
    """Log of rank 0."""
    host: str | UnsetType = UNSET
    """deepspeed: machine of the front."""
    pid: int | UnsetType = UNSET
    """deepspeed: process of the front there."""
    logs: str | UnsetType = UNSET
    """deepspeed: folder of the start, with the logs of all ranks."""


class RestartLine(Record):
    """One question of a job whether it may start again; a line of the file."""

    FILE = "RUN/launch/attempts-STAGE.jsonl"
    WHAT = "record of restarts"
    WRITER = "a Slurm job (launchers/guard.py)"
    READERS = ("Slurm jobs (launchers/guard.py)", "distlm status")
    MEND = "delete that line"

    time: float
    """When, in Unix seconds."""
    job: str
    """Slurm's job id; of a task of an array with its number, 12_3."""
    restarts: int
    """How often the job has started again before."""
    owner: str
    """Who asks: the task (rank 0), or the batch script."""
    mark: str
    """What is durable in the run directory; equal marks mean that nothing was added."""
    preempted: bool = False
    """Slurm cancelled it for another job (`again` in the site file)."""


class FrontProcess(Part):
    """The process of `launchers.deepspeed`."""

    node: str
    """Machine that it runs on."""
    pid: int
    """Its process there."""
    started: str
    """When that process started, in the kernel's ticks since boot."""


class StartSpec(Record):
    """What every rank of a deepspeed start is to run. Holds the user's environment: only they may read it."""

    FILE = "RUN/launch/deepspeed/START/spec.json"
    WHAT = "specification of a deepspeed start"
    WRITER = "distlm deepspeed"
    READERS = ("its ranks (launchers/hosts/rank.py)", "distlm status", "distlm cancel")

    arguments: list[str]
    """Arguments of `distlm`."""
    cwd: str
    """Folder to run in."""
    code: str
    """Folder that holds the packages distlm and launchers."""
    via: str
    """How the ranks are started: local, slurm, pdsh, openmpi, mpich or no_ssh."""
    ranks: list[int]
    """Ranks that this front starts."""
    env: dict[str, str]
    """Environment of the ranks, over their node's own."""
    front: FrontProcess
    """Whom the ranks listen to."""
    lost_after_s: float
    """Seconds of silence after which the front counts as gone."""
    kill_after_s: float
    """Seconds that a rank has to stop once the front is gone."""


class FrontOrder(Record):
    """The front's beat and its word to the ranks, rewritten every few seconds."""

    FILE = "RUN/launch/deepspeed/START/order.json"
    WHAT = "order of a deepspeed start"
    WRITER = "distlm deepspeed"
    READERS = ("its ranks (launchers/hosts/rank.py)",)

    beat: int
    """How often this file was written; a number that stands still is silence."""
    order: str
    """run, stop (after a checkpoint) or kill."""


class RankReport(Record):
    """What a rank's keeper says of it, rewritten every few seconds; `{}` until it has begun."""

    FILE = "RUN/launch/deepspeed/START/rank-NNNNN.json"
    WHAT = "report of a rank"
    WRITER = "the ranks of a deepspeed start (launchers/hosts/rank.py)"
    READERS = ("distlm deepspeed", "the other ranks")

    rank: int
    """Number of the rank, from 0."""
    node: str
    """Machine that it runs on."""
    pid: int
    """Process of its keeper there."""
    time: float
    """When this was written, in Unix seconds of that machine."""
    beat: int | UnsetType = UNSET
    """How often it was written while the rank ran."""
    code: int | UnsetType = UNSET
    """Exit code of the rank; there once it has ended."""


class Progress(Part):
    """The newest that metrics.jsonl says."""

    stage: str
    """Label of the line, e.g. `train` or `datastore write`."""
    done: int
    """Units done."""
    total: int | None
    """Units in all; null: not known."""
    unit: str
    """Unit, e.g. updates."""
    rate: float | None
    """Units a second."""
    left_s: float | None
    """Seconds left at that rate."""
    time: float
    """Of the newest line, in Unix seconds."""
    values: dict[str, float]
    """Newest training loss (nats per token) and validation perplexity, by metric name."""


class JobStatus(Part):
    """A submission and how it is now."""

    job: str
    """Slurm's job id; empty where Slurm did not start it."""
    stage: str
    """Stage of the recipe."""
    owner: str
    """Who submitted it and requeues it."""
    state: str
    """Slurm's word; of an array the states of its tasks with their numbers."""
    elapsed: str
    """Time since its start as Slurm writes it, [days-]hours:minutes:seconds."""
    left: str
    """Time to its limit, likewise; empty: none."""
    nodes: str
    """Nodes that it runs on."""
    restarts: int
    """How often it was requeued."""
    reason: str
    """Why it waits."""
    time: float
    """When it was submitted, in Unix seconds."""


class Status(Record):
    """One run as it is now; `--json` prints a list of these."""

    FILE = "(standard output of `distlm status --json`)"
    WHAT = "status of a run"
    WRITER = "distlm status --json"
    READERS = ("programs of the user",)

    run_dir: str
    """The run directory."""
    stages: dict[str, bool | None]
    """Stage → finished; null where it cannot be told."""
    jobs: list[JobStatus]
    """Newest submission of each stage and all that are active, oldest first."""
    progress: Progress | None
    """Null: nothing was written yet."""
    stale_s: float | None
    """Seconds without a line while a job runs, when that is too long; else null."""
    follow: str
    """Command that follows the log; empty where there is no log yet."""
    imports: bool = False
    """The stage `train` takes a model as it is and trains nothing."""
    silent: str = ""
    """Why Slurm could not be asked; the jobs are then as the run directory knows them."""
