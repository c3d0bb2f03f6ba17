"""Fine-tuned models as something that a checkpoint can hold; no recipe trains them by model.kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distlm.finetune.description import TaskModelConfig
from distlm.models.kind import ModelKind

if TYPE_CHECKING:
    from torch import nn


class FineTuned(ModelKind):
    """A masked language model with the head of a task."""

    name = "plm_task"
    description = TaskModelConfig

    def build(self, description: TaskModelConfig, vocabulary: int) -> nn.Module:
        from distlm.finetune.model import TaskModel

        return TaskModel(description, vocabulary)


KIND: ModelKind = FineTuned()
