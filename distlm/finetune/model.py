"""Masked language models with the head of a task in place of their own, as Hugging Face builds these heads.

A text or pair is classified from its first token: BERT's pooler (tanh), RoBERTa's dense layer with tanh, or
DistilBERT's with ReLU, dropout, Linear. Answers are found by a Linear that gives each token two scores.
"""

import torch
from torch import Tensor, nn

from distlm.finetune.description import TaskModelConfig
from distlm.memory.placing import values_to_come
from distlm.memory.values.exchange import Exchange
from distlm.models.plm.attention import NAME
from distlm.models.plm.model import backbone_config, equip, transformers_library
from distlm.models.row_dropout import Rows


class TaskModel(nn.Module):
    """An encoder with its memories, and the head of a task."""

    def __init__(self, config: TaskModelConfig, vocabulary: int, exchange: Exchange | None = None) -> None:
        """Fresh weights from torch's global generator, those of the memory apart. The memory's values are zero.

        `exchange` joins the ranks that train it; None: this process has all of the memory.
        """
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.rows = Rows()
        library = transformers_library()
        family = library.AutoModelForQuestionAnswering if config.head == "span" else (
            library.AutoModelForSequenceClassification
        )  # fmt: skip
        labels = {"num_labels": config.labels}
        self.hf = family.from_config(backbone_config(config.backbone | labels, vocabulary), attn_implementation=NAME)
        self.memories = equip(self.hf, values_to_come(config.memory), config.seed, self.rows, exchange)
        """Layer, counted from 1 → its memory."""
        self.typed = getattr(self.hf.config, "type_vocab_size", 1) > 1
        """Whether it tells the parts of a pair apart."""

    def forward(self, tokens: Tensor, types: Tensor) -> Tensor:
        """tokens, types int64 [B, T] → scores [B, C], or [B, T, 2] (span). Within `rows.set`, which says what is
        padding. Models that do not tell the parts of a pair apart ignore `types`."""
        mask = self.rows.mask
        if mask is None:
            raise ValueError("TaskModel.forward outside Rows.set")
        given = {"token_type_ids": types} if self.typed else {}
        output = self.hf(input_ids=tokens, attention_mask=mask, **given)
        if self.config.head == "span":
            return torch.stack((output.start_logits, output.end_logits), dim=-1)
        scores: Tensor = output.logits
        return scores

    @property
    def prefix(self) -> str:
        """What the names of the encoder's parameters begin with; other parameters are the head's."""
        return f"hf.{self.hf.base_model_prefix}."
