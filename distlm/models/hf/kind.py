"""Any causal language model of Hugging Face as a kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distlm.config.training_check import check_blocks
from distlm.memory.check import check_section
from distlm.memory.placing import values_to_come
from distlm.models.hf.config import HfRun
from distlm.models.hf.description import OUTPUT, HfModel
from distlm.models.kind import Exchange, Kind, Refuse, hugging_face
from distlm.training.blocks.kind import BlocksKind

if TYPE_CHECKING:
    from torch import nn

    from distlm.runtime.plan import StagePlan
    from distlm.runtime.stage import Stage
    from distlm.training.job import Job


class Hf(BlocksKind):
    """A causal language model of Hugging Face."""

    name = "hf"
    description = HfModel
    config = HfRun
    model_sections = ("data", "model", "hf", "memory", "train")
    computes_buffers = True  # rotary angles and the like
    importers = (
        Exchange(
            "hf", "a causal language model of Hugging Face (hf.name) becomes a checkpoint as it is",
            lambda parser: None, "distlm.models.hf.importer:import_hf",
        ),
    )  # fmt: skip
    exporters = (hugging_face("distlm.models.hf.export:export_run"),)

    def fill(self, config: HfRun) -> None:
        config.data.tokenizer = config.data.tokenizer or config.hf.name

    def check(self, config: HfRun, refuse: Refuse) -> None:
        # How long a text the model takes is known when its configuration is read.
        check_blocks(config, refuse, least_updates=0)
        if self.imports(config) and config.train.init_from:
            refuse("train.init_from", config.train.init_from, "with train.updates=0 the model is hf.name as it is")
        check_section(config.memory, refuse)
        if config.memory.kind != "none" and config.memory.fresh_ffn:
            refuse("memory.fresh_ffn", True, "the model starts from hf.name's weights, nothing is fresh; leave it out")
        if config.memory.kind != "none" and self.imports(config):
            refuse(
                "memory.kind", config.memory.kind, "with train.updates=0 the model is hf.name as it is; leave it out"
            )

    def describe(self, config: HfRun) -> HfModel:
        from distlm.models.hf.memory import with_memory
        from distlm.models.hf.model import hf_model

        return with_memory(hf_model(config.hf.name), config.memory, config.train.seed)

    def undrawn(self, description: HfModel) -> HfModel:
        return replace(description, memory=values_to_come(description.memory))

    def build(self, description: HfModel, vocabulary: int) -> nn.Module:
        from distlm.models.hf.model import HfLM

        return HfLM(description, vocabulary)

    def require_tap(self, description: HfModel, tap: str, key: str) -> None:
        from distlm.models.hf.model import require_tap

        require_tap(description, tap, key)

    def inner_floats(self, description: HfModel) -> int:
        return 4 * description.width

    def forward_flops(self, description: HfModel, tap: str, length: int) -> float:
        """Every weight once, but for the embedding, which is looked up and, where it is tied, no layer's own."""
        from distlm.models.described import parameter_count

        layers = parameter_count(description, 0) - description.rows * description.width
        head = 2.0 * description.rows * description.width if tap == OUTPUT else 0.0
        return 2.0 * max(layers, 0) + head

    def plan(self, config: HfRun, ranks: int) -> StagePlan:
        from distlm.models.hf.plan import plan_hf

        return plan_hf(config, ranks)

    def require_ranks(self, config: HfRun, ranks: int) -> None:
        if not self.imports(config):
            super().require_ranks(config, ranks)

    def imports(self, config: HfRun) -> bool:
        return not config.train.updates

    def take(self, stage: Stage) -> dict[str, object]:
        from distlm.models.hf.importer import take

        return take(stage)

    def may_grow(self, before: Mapping[str, Any], config: HfRun, key: str) -> str:
        # Nothing was laid out over the updates of a model that was taken as it is.
        fresh = key == "train.updates" and not before.get("train", {}).get("updates")
        return "" if fresh else super().may_grow(before, config, key)

    def job(self, stage: Stage) -> Job:
        from distlm.models.hf.job import HfJob

        return HfJob.open(stage)


KIND: Kind = Hf()
