"""The stage `distlm train`: updates, metrics, validation, checkpoints, stops, for every kind of model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic

from msgspec import UNSET

from distlm.config.schema import RunConfig
from distlm.errors import Diverged, Stopped
from distlm.models.registry import kind
from distlm.runtime import metrics
from distlm.runtime.files import bytes_below, bytes_hash, require_free_disk
from distlm.runtime.lock import only_writer
from distlm.runtime.plan import StagePlan
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.device_memory import within_memory
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume, find_resume, save_checkpoint
from distlm.training.job import Job
from distlm.training.records import Best, S
from distlm.training.update import Outcome, Window


def plan_train(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of training at a rank count. Raises DistlmError for what does not divide over the ranks."""
    return kind(config.model.kind).plan(config, ranks)


def run_train(stage: Stage) -> dict[str, object]:
    """Train the model of `stage.config` to its end, continuing from the newest checkpoint.

    Returns step, train_loss (nats per token over the last logged updates), valid_loss, valid_ppl, seconds, tokens_per_s
    and parameters, on every rank; an AWD-LSTM's also phase and epoch. Of a model that is taken as it is (hf with
    train.updates=0) what `distlm import` says. Raises Stopped (exit 75) after a checkpoint when
    a stop signal was agreed or train.max_updates_this_run is reached; DistlmError for faults in the configuration, data
    or checkpoint, and when the loss stops being finite.
    """
    started = time.monotonic()
    comm = stage.comm
    if kind(stage.config.model.kind).imports(stage.config):
        made = kind(stage.config.model.kind).take(stage)
        return {**made, "seconds": round(time.monotonic() - started, 3)}
    job = together(comm, lambda: _open_job(stage))
    state = run_job(stage, job, lambda resume: _announce(stage, resume))
    ended = time.monotonic()
    seconds = ended - started
    if comm.rank == 0:
        took: metrics.Values = {metrics.STAGE_SECONDS: seconds}
        if job.began_at:
            took[metrics.START_SECONDS] = job.began_at - started
        stage.run.metrics.write("train", took, step=state.update)
    return {"step": state.update, **state.last, "seconds": round(seconds, 3)}


def run_job(stage: Stage, job: Job[S], announce: Callable[[Resume[S] | None], object]) -> S:
    """Do what is left of a job, from the newest checkpoint of `stage.run` on; its final state. Collective.

    `announce` is called on rank 0 before there is work. Raises what run_train does.
    """
    comm = stage.comm
    with only_writer(stage.run.checkpoints, comm, "training"):
        resume = rank0_first(comm, lambda: find_resume(stage.run, job.fresh_state(), job.train.keep_last))
        if resume is not None and job.finished(resume.state):
            say(f"{stage.name}: {resume.folder} is the last of {resume.state.update} updates; nothing to do", comm.rank)
            return resume.state
        stage.require_whole(job.text.folder, job.text.files)
        rank0_first(comm, lambda: announce(resume))
        join_group(stage.world)
        try:
            with within_memory(stage.name, job.needs_less()):
                return _Run(stage, job, resume).to_the_end()
        finally:
            job.close()


def _open_job(stage: Stage) -> Job[Any]:
    return kind(stage.config.model.kind).job(stage)


class _Run(Generic[S]):
    """One start of a training run: from a fresh model or a checkpoint to the end or a stop."""

    def __init__(self, stage: Stage, job: Job[S], resume: Resume[S] | None) -> None:
        self.stage, self.job, self.train = stage, job, job.train
        job.begin(resume)
        fresh = job.fresh_state()
        self.state = fresh if resume is None else resume.state
        self.start = self.state.update
        """Updates done when this start began."""
        for name in ("ranks", "deepspeed", "precision", "tap"):
            setattr(self.state, name, getattr(fresh, name))
        self.state.kernels = job.kernels or UNSET
        self.state.last["parameters"] = job.parameters
        # What earlier starts did since the last line of metrics.
        self.window = Window(self.job.unit, self.state.window)

    def to_the_end(self) -> S:
        """All remaining updates; the final state. Raises Stopped after a checkpoint, Diverged with what helps."""
        job, state = self.job, self.state
        job.began_at = time.monotonic()
        job.engine.train()
        progress = Progress(self.stage.name, job.updates, "updates", self.stage.comm.rank, done=self.start)
        with progress, self._advised():
            while not job.finished(state):
                outcome, rate = job.run_update(state)
                state.update += 1
                state.skipped += outcome.step.skipped
                state.fingerprint = bytes_hash(f"{state.fingerprint} {outcome.fingerprint}".encode())
                job.counted(state, outcome)
                progress.advance(1, loss=f"{outcome.loss:.4f}", lr=f"{rate:.3g}")
                folder = self._at_boundary(outcome, rate)
                if folder is not None and not job.finished(state):
                    raise Stopped(
                        f"{self.stage.name}: stopped after update {state.update} of {job.updates}; {folder} is "
                        "complete, run the same command again to continue"
                    )
        return state

    @contextmanager
    def _advised(self) -> Iterator[None]:
        try:
            yield
        except Diverged as error:
            raise Diverged(
                f"update {self.state.update}: {error}; {self.job.calmer()} (the checkpoints here are from before)"
            ) from error

    def _at_boundary(self, outcome: Outcome, rate: float) -> Path | None:
        """Log, validate and save where that is due; the saved checkpoint when the run must stop here."""
        job, train, state, comm = self.job, self.train, self.state, self.stage.comm
        due = job.validation_due(state)
        self._log(outcome, rate, job.finished(state))
        began = time.monotonic()
        better = due and self._validate()
        took = {metrics.VALID_S: time.monotonic() - began} if due else {}
        spent = train.max_updates_this_run > 0 and state.update - self.start >= train.max_updates_this_run
        folder = None
        if outcome.stop or spent or better or job.finished(state) or _due(state.update, train.save_every):
            state.window, saving = self.window.state(), time.monotonic()
            kept, vocabulary = job.kept(state), job.text.vocabulary
            folder = save_checkpoint(
                comm, self.stage.run, job.engine, job.model, vocabulary, state, train.keep_last, *kept
            )
            took[metrics.SAVE_S] = time.monotonic() - saving
        if took and comm.rank == 0:
            values: metrics.Values = {name: round(seconds, 3) for name, seconds in took.items()}
            self.stage.run.metrics.write("train", values, step=state.update)
        self.window.pause(time.monotonic() - began)
        return folder if outcome.stop or spent else None

    def _log(self, outcome: Outcome, rate: float, last: bool) -> None:
        done = self.state.update
        self.window.add(outcome)
        if done % self.train.log_every and not last:
            return
        self.state.last |= {"train_loss": self.window.loss, "tokens_per_s": round(self.window.rate, 1)}
        # The last line may come early: then its updates also count for the next one of a training that goes on longer.
        early = bool(done % self.train.log_every)
        measured = self.job.measured(keep=early)
        if self.stage.comm.rank == 0:
            line = self.window.line(rate, self.state.skipped) | measured
            # A chain over all updates so far: two runs were given the same batches in the same order, or it differs.
            line[metrics.DATA_FINGERPRINT] = self.state.fingerprint
            self.stage.run.metrics.write("train", line, step=done)
        if not early:
            self.window = Window(self.job.unit)

    def _validate(self) -> bool:
        """True when this is the best validation loss so far, so that a checkpoint must keep it."""
        run, comm, done = self.stage.run, self.stage.comm, self.state.update
        result = self.job.validate(self.state)
        self.state.last |= result.last
        best = self.state.best
        better = self.job.keeps_best and (best is None or result.loss < best.valid_loss)
        if better:
            self.state.best = Best(run.checkpoint(done).name, result.loss)
        say(f"{self.stage.name}: update {done}: {result.text}", comm.rank)
        values = result.values
        values |= self.job.judged(self.state, result)
        if comm.rank == 0:
            run.metrics.write("train", values, step=done)
        return better


def _announce(stage: Stage, resume: Resume[S] | None) -> None:
    """Say what is needed, and refuse when the disk is not there. Rank 0."""
    run = stage.run
    plan = plan_train(stage.config, stage.comm.size)
    say(plan.line())
    require_free_disk(run.root, max(plan.disk_bytes - bytes_below(run.checkpoints), 0), "training")
    if resume is not None:
        say(f"train: continuing from {resume.folder}, saved on {resume.state.ranks} ranks")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
