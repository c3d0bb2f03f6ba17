"""Masked language models with or without product-key memory as a kind of model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from distlm.config.check import MOST_LAYERS, MOST_WIDTH, adam, at_least, at_most, fractions
from distlm.config.check import shares as check_shares
from distlm.config.training_check import check_updates, updates_in_small
from distlm.memory.check import check_fresh_ffn, check_places, check_section
from distlm.memory.placing import values_to_come
from distlm.models.kind import Kind, Refuse, hugging_face
from distlm.models.plm.config import FinetuneConfig, PlmRun
from distlm.models.plm.description import PlmModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from distlm.runtime.plan import StagePlan
    from distlm.runtime.rundir import RunDir
    from distlm.runtime.stage import Stage
    from distlm.training.job import Job


class MaskedLm(Kind):
    """BERT, DistilBERT or RoBERTa with the memories of Kim & Jung (2020)."""

    name = "plm"
    description = PlmModel
    config = PlmRun
    model_sections = ("model", "plm", "memory", "train")
    exporters = (hugging_face("distlm.models.plm.export.write:export_run"),)
    causal = False

    def stages(self, config: PlmRun) -> tuple[str, ...]:
        return ("data shard", "train", "evaluate", *(["finetune"] if config.finetune.tasks else []))

    def check(self, config: PlmRun, refuse: Refuse) -> None:
        _check_shards(config, refuse)
        check_updates(config, refuse)
        _check_backbone(config, refuse)
        _check_memory(config, refuse)
        _check_finetune(config.finetune, refuse)

    def require_ranks(self, config: PlmRun, ranks: int) -> None:
        from distlm.models.plm.text.pieces import plan_rows

        plan_rows(config.train, ranks)

    def describe(self, config: PlmRun) -> PlmModel:
        from distlm.models.plm.model import plm_model

        return plm_model(config.plm, config.memory, config.train.seed)

    def build(self, description: PlmModel, vocabulary: int) -> nn.Module:
        from distlm.models.plm.model import Plm

        return Plm(description, vocabulary)

    def undrawn(self, description: PlmModel) -> PlmModel:
        return dataclasses.replace(description, memory=values_to_come(description.memory))

    def in_small(self, config: PlmRun, share: float) -> dict[str, object]:
        fresh = {"plm.init_from": "", "plm.short_rows": [], "plm.short_updates": []}
        return updates_in_small(config.train, share) | fresh

    def load(self, config: PlmRun, run: RunDir, device: torch.device | str) -> tuple[nn.Module, Path]:
        from distlm.models.plm.io import load_plm

        # Trained to its end, as `distlm evaluate` reads it.
        checkpoint = run.newest_checkpoint()
        return load_plm(checkpoint, device)[0], checkpoint

    def plan(self, config: PlmRun, ranks: int) -> StagePlan:
        from distlm.models.plm.plan import plan_plm

        return plan_plm(config, ranks)

    def job(self, stage: Stage) -> Job:
        from distlm.models.plm.job import PlmJob

        return PlmJob.open(stage)

    def plan_evaluate(self, config: PlmRun, ranks: int) -> StagePlan:
        from distlm.models.plm.plan import plan_evaluate_plm

        return plan_evaluate_plm(config, ranks)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        from distlm.models.plm.measure.evaluate import run_evaluate_plm

        return run_evaluate_plm(stage)

    def evaluated(self, config: PlmRun, run: RunDir) -> bool:
        from distlm.models.plm.measure.finished import masked_as_trained

        return masked_as_trained(config, run)


def _check_shards(config: PlmRun, refuse: Refuse) -> None:
    at_least(config, refuse, 1, ("shards.chunk_rows", "shards.shard_text"))
    at_least(config, refuse, 0, ("shards.vocabulary_text",))
    check_shares(config, refuse, "shards")
    shards, known = config.shards, ("train", "valid", "test")
    if not shards.splits or len({*shards.splits}) < len(shards.splits) or not {*shards.splits} <= {*known}:
        refuse("shards.splits", shards.splits, f"name some of {', '.join(known)}, each once")
    if shards.row_tokens < 8:
        refuse("shards.row_tokens", shards.row_tokens, "must be at least 8; [CLS] and [SEP] count")


def _check_backbone(config: PlmRun, refuse: Refuse) -> None:
    plm = config.plm
    at_least(config, refuse, 1, ("plm.layers", "plm.width", "plm.heads", "plm.ffn_width", "plm.max_positions"))
    at_most(config, refuse, MOST_LAYERS, ("plm.layers",))
    at_most(config, refuse, MOST_WIDTH, ("plm.width", "plm.heads", "plm.ffn_width", "plm.max_positions"))
    fractions(config, refuse, ("plm.dropout", "plm.attention_dropout"))
    if plm.width % plm.heads:
        refuse("plm.width", plm.width, f"must be a multiple of plm.heads={plm.heads}")
    started = [key for key in ("plm.init_from", "plm.checkpoint") if getattr(plm, key.partition(".")[2])]
    if config.train.init_from and started:
        refuse("train.init_from", config.train.init_from, f"a model starts from one place; leave out {started[0]}")
    if plm.init_std <= 0:
        refuse("plm.init_std", plm.init_std, "must be above 0")
    if any(tokens < 8 for tokens in plm.short_rows):
        refuse("plm.short_rows", plm.short_rows, "must be at least 8 tokens each")
    if len(plm.short_updates) != len(plm.short_rows) or any(updates < 1 for updates in plm.short_updates):
        refuse("plm.short_updates", plm.short_updates, f"name one above 0 for each of plm.short_rows={plm.short_rows}")
    if not 0 < plm.mask_share < 1:
        refuse("plm.mask_share", plm.mask_share, "must be above 0 and below 1")


def _check_memory(config: PlmRun, refuse: Refuse) -> None:
    plm, memory = config.plm, config.memory
    check_section(memory, refuse)
    check_fresh_ffn(memory, plm.init_from, "plm.init_from", refuse)
    if not plm.checkpoint:
        check_places(memory, plm.layers, plm.width, ("plm.layers", "plm.width"), refuse)


def _check_finetune(tune: FinetuneConfig, refuse: Refuse) -> None:
    for key, least in (
        ("rows_per_update", 1), ("stride", 1), ("answer_tokens", 1), ("epochs", 0), ("length", 0), ("micro_rows", 0),
        ("lr", 0), ("memory_lr", 0), ("clip_norm", 0), ("save_every", 0), ("max_updates_this_run", 0),
        ("train_rows", 0),
    ):  # fmt: skip
        if getattr(tune, key) < least:
            refuse(f"finetune.{key}", getattr(tune, key), f"must be at least {least}")
    adam(tune.adam_betas, tune.adam_eps, ("finetune.adam_betas", "finetune.adam_eps"), refuse)
    if not tune.seeds or len(set(tune.seeds)) < len(tune.seeds):
        refuse("finetune.seeds", tune.seeds, "name at least one seed, each once")
    if tune.task and tune.tasks:
        refuse("finetune.task", tune.task, f"finetune.tasks={tune.tasks} names others; for these set finetune.task= "
               "(empty), for the one finetune.tasks=[]")  # fmt: skip
    if len(set(tune.tasks)) < len(tune.tasks):
        refuse("finetune.tasks", tune.tasks, "name each once")
    if tune.name and len(tune.tasks) > 1:
        refuse("finetune.name", tune.name, "is the folder of one task; leave it out with several finetune.tasks")
    for one in tune.each():
        if one.train_rows and one.task == "SQuAD":
            refuse("finetune.train_rows", one.train_rows, "is for the tasks of GLUE; leave it 0 for SQuAD")
        if one.truncation != "longest_first" and one.task in ("CoLA", "SST-2", "SQuAD"):
            refuse("finetune.truncation", one.truncation, f"is for pairs of sentences; leave it out for {one.task}")
    if tune.dropout != -1 and not 0 <= tune.dropout < 1:
        refuse("finetune.dropout", tune.dropout, "must be in [0, 1), or -1 for the checkpoint's own")
    if not 0 <= tune.warmup < 1:
        refuse("finetune.warmup", tune.warmup, "must be in [0, 1)")
    if "/" in tune.name or tune.name.startswith("."):
        refuse("finetune.name", tune.name, "is the name of a folder: neither / in it nor . at its start")


KIND: Kind = MaskedLm()
