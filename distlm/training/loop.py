"""The stage `distlm train`: updates, metrics, validation, checkpoints, stops."""

import time
from pathlib import Path
from typing import Any

import torch

from distlm.config.schema import TrainConfig
from distlm.errors import Stopped
from distlm.models.device import default_device
from distlm.models.io import load_model
from distlm.models.transformer_lm import TransformerLM
from distlm.optim.nag import NAG
from distlm.optim.schedule import learning_rate
from distlm.runtime import metrics
from distlm.runtime.collective import rank0_first, together
from distlm.runtime.files import bytes_hash, require_free_disk
from distlm.runtime.lock import only_writer
from distlm.runtime.progress import Progress, say
from distlm.runtime.rendezvous import join_group
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume, find_resume, restore, save_checkpoint
from distlm.training.engine import Engine
from distlm.training.job import Job
from distlm.training.objective import TrainModule
from distlm.training.plan import plan_train
from distlm.training.update import Outcome, Window, run_update
from distlm.training.validate import Validator

__all__ = ["plan_train", "run_train"]


def run_train(stage: Stage) -> dict[str, Any]:
    """Train the model of `stage.config` to train.updates updates, continuing from the newest checkpoint.

    Returns step, train_loss (nats per token over the last logged updates), valid_loss, valid_ppl, seconds, tokens_per_s
    and parameters, on every rank. Raises Stopped (exit 75) after a checkpoint when a stop signal was agreed or
    train.max_updates_this_run is reached; DistlmError for faults in the configuration, data or checkpoint, and when
    the loss stops being finite.
    """
    started = time.monotonic()
    comm, updates = stage.comm, stage.config.train.updates
    job = together(comm, lambda: Job.open(stage))
    with only_writer(stage.run.checkpoints, comm, "training"):
        resume = rank0_first(comm, lambda: find_resume(stage.run, job.identity()))
        if resume is not None and resume.state["update"] >= updates:
            say(f"train: {resume.folder} is the last of {updates} updates; nothing to do", comm.rank)
            state = resume.state
        else:
            rank0_first(comm, lambda: _announce(stage, resume))
            join_group(stage.world)
            state = _Run(stage, job, resume).to_the_end()
    seconds = time.monotonic() - started
    if comm.rank == 0:
        stage.run.metrics.write("train", {metrics.STAGE_SECONDS: seconds}, step=state["update"])
    return {"step": state["update"], **state["last"], "seconds": round(seconds, 3)}


class _Run:
    """One start of a training run: from a fresh model or a checkpoint to the end or a stop."""

    def __init__(self, stage: Stage, job: Job, resume: Resume | None) -> None:
        self.stage, self.job, self.train = stage, job, job.train
        self.engine, parameters = _make_engine(stage, job, resume)
        self.validator = Validator(job.tokens.split("valid"), self.train.tokens_per_sample, self.train.micro_blocks)
        before = {} if resume is None else resume.state
        unknown = {"train_loss": None, "valid_loss": None, "valid_ppl": None, "tokens_per_s": 0.0}
        self.start: int = before.get("update", 0)
        """Updates done when this start began."""
        self.state: dict[str, Any] = {
            **job.identity(),
            "update": self.start,
            "skipped": before.get("skipped", 0),
            "fingerprint": before.get("fingerprint", ""),
            "best": before.get("best"),
            "last": before.get("last", unknown),
            "ranks": stage.comm.size,
            "deepspeed": self.train.deepspeed,
            "precision": self.train.precision,
            "tap": self.train.tap,
        }  # fmt: skip
        self.state["last"]["parameters"] = parameters
        self.window = Window()

    def to_the_end(self) -> dict[str, Any]:
        """All remaining updates; the final state. Raises Stopped after a checkpoint."""
        updates, rank = self.train.updates, self.stage.comm.rank
        self.engine.train()
        with Progress("train", updates, "updates", rank, done=self.start) as progress:
            for update in range(self.start, updates):
                rate = learning_rate(self.train, update)
                outcome = run_update(self.stage, self.job, self.engine, update, rate)
                self.state["update"] = update + 1
                self.state["skipped"] += outcome.step.skipped
                self.state["fingerprint"] = bytes_hash(f"{self.state['fingerprint']} {outcome.fingerprint}".encode())
                progress.advance(1, loss=f"{outcome.loss:.4f}", lr=f"{rate:.3g}")
                self._log(outcome, rate)
                folder = self._at_boundary(outcome.stop)
                if folder is not None and update + 1 < updates:
                    raise Stopped(
                        f"train: stopped after update {update + 1} of {updates}; {folder} is complete, "
                        "run the same command again to continue"
                    )
        return self.state

    def _log(self, outcome: Outcome, rate: float) -> None:
        done = self.state["update"]
        self.window.add(outcome)
        if done % self.train.log_every and done != self.train.updates:
            return
        self.state["last"] |= {"train_loss": self.window.loss, "tokens_per_s": round(self.window.rate, 1)}
        if self.stage.comm.rank == 0:
            line = self.window.line(rate, self.state["skipped"])
            # A chain over all updates so far: two runs were given the same batches in the same order, or it differs.
            line[metrics.DATA_FINGERPRINT] = self.state["fingerprint"]
            self.stage.run.metrics.write("train", line, step=done)
        self.window = Window()

    def _at_boundary(self, signalled: bool) -> Path | None:
        """Validate and save where that is due; the saved checkpoint when the run must stop here."""
        began = time.monotonic()
        train, done = self.train, self.state["update"]
        last = done == train.updates
        better = (last or _due(done, train.valid_every)) and self._validate()
        spent = train.max_updates_this_run > 0 and done - self.start >= train.max_updates_this_run
        folder = None
        if signalled or spent or better or last or _due(done, train.save_every):
            model, vocabulary = self.stage.config.model, len(self.job.tokens.dictionary)
            folder = save_checkpoint(
                self.stage.comm, self.stage.run, self.engine, model, vocabulary, self.state, train.keep_last
            )
        self.window.pause(time.monotonic() - began)
        return folder if signalled or spent else None

    def _validate(self) -> bool:
        """True when this is the best validation loss so far, so that a checkpoint must keep it."""
        run, comm, done = self.stage.run, self.stage.comm, self.state["update"]
        result = self.validator.run(self.engine, comm.rank, comm.size)
        self.state["last"] |= {"valid_loss": result.loss, "valid_ppl": result.perplexity}
        better = self.state["best"] is None or result.loss < self.state["best"]["valid_loss"]
        if better:
            self.state["best"] = {"checkpoint": run.checkpoint(done).name, "valid_loss": result.loss}
        text = f"valid loss {result.loss:.4f}, ppl {result.perplexity:.2f} ({result.rule})"
        say(f"train: update {done}: {text}", comm.rank)
        if comm.rank == 0:
            values = {metrics.VALID_LOSS: result.loss, metrics.VALID_PPL: result.perplexity}
            run.metrics.write("train", {**values, "valid/context": result.rule}, step=done)
        return better


def _announce(stage: Stage, resume: Resume | None) -> None:
    """Say what is needed, and refuse when the disk is not there. Rank 0."""
    run = stage.run
    plan = plan_train(stage.config, stage.comm.size)
    say(plan.line())
    there = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    require_free_disk(run.root, max(plan.disk_bytes - there, 0), "training")
    if resume is not None:
        say(f"train: continuing from {resume.folder}, saved on {resume.state['ranks']} ranks")


def _make_engine(stage: Stage, job: Job, resume: Resume | None) -> tuple[Engine, int]:
    """A fresh or restored engine, and the number of parameters."""
    train, device = job.train, default_device()
    if resume is None:
        torch.manual_seed(train.seed)
        model = TransformerLM(stage.config.model, len(job.tokens.dictionary))
    else:
        model = together(stage.comm, lambda: load_model(resume.folder)[0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # DeepSpeed replaces the tensors by half-precision copies; these keep the fp32 values for `restore`.
    weights = {} if resume is None else {name: parameter.data for name, parameter in model.named_parameters()}
    module = TrainModule(model, train.tap, train.l2_weight, train.l2_reduction)
    engine = Engine(module, make_optimizer(train, module), job.deepspeed, stage.world, device)
    if resume is not None:
        restore(engine, resume, weights)
    return engine, parameters


def make_optimizer(train: TrainConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """`train.optimizer` over all parameters; weight decay is decoupled in both."""
    if train.optimizer == "nag":
        return NAG(module.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    first, second = train.adam_betas
    return torch.optim.AdamW(
        module.parameters(), lr=train.lr, betas=(first, second), eps=train.adam_eps, weight_decay=train.weight_decay
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
