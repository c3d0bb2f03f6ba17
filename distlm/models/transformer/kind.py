"""The Baevski–Auli transformer as a kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from distlm.config.check import MOST_LAYERS, MOST_WIDTH, at_least, at_most, fractions, lengths
from distlm.config.training_check import check_blocks
from distlm.data.dictionary import Dictionary
from distlm.errors import UsageError
from distlm.memory.check import check_fresh_ffn, check_places, check_section
from distlm.memory.placing import placed, values_to_come
from distlm.models.kind import Exchange, Kind, Refuse, hugging_face
from distlm.models.transformer.config import TransformerConfig, TransformerModel, TransformerRun
from distlm.training.blocks.kind import BlocksKind

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from distlm.runtime.plan import StagePlan
    from distlm.runtime.stage import Stage
    from distlm.training.job import Job


def _fairseq_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint of fairseq, e.g. checkpoint_best.pt")
    parser.add_argument("--dictionary", required=True, help="dict.txt of the data that the model was trained on")


class Transformer(BlocksKind):
    """The transformer language model of Baevski & Auli (2019)."""

    name = "transformer_lm"
    description = TransformerConfig
    config = TransformerRun
    model_sections = ("data", "model", "memory", "train")
    importers = (
        Exchange(
            "fairseq", "a checkpoint of fairseq's transformer_lm_wiki103 becomes a checkpoint", _fairseq_arguments,
            "distlm.models.transformer.importer:import_options",
        ),
    )  # fmt: skip
    exporters = (hugging_face("distlm.models.transformer.export:export_run"),)

    def check(self, config: TransformerRun, refuse: Refuse) -> None:
        model, train = config.model, config.train
        at_least(config, refuse, 1, (
            "model.layers", "model.width", "model.heads", "model.ffn_width", "model.factor", "model.max_positions",
            "train.queue_length",
        ))  # fmt: skip
        at_most(config, refuse, MOST_LAYERS, ("model.layers",))
        at_most(config, refuse, MOST_WIDTH, ("model.width", "model.heads", "model.ffn_width"))
        fractions(config, refuse, (
            "model.dropout", "model.attention_dropout", "model.activation_dropout", "model.softmax_dropout",
            "train.encoder_momentum",
        ))  # fmt: skip
        check_blocks(config, refuse)
        check_section(config.memory, refuse)
        check_fresh_ffn(config.memory, train.init_from, "train.init_from", refuse)
        check_places(config.memory, model.layers, model.width, ("model.layers", "model.width"), refuse)
        if config.memory.kind != "none" and train.regulariser != "l2":
            refuse(
                "train.regulariser", train.regulariser,
                f"its momentum encoder is a copy of the model, and memory.kind={config.memory.kind} would need one of "
                "all values; set train.regulariser=l2",
            )  # fmt: skip
        if model.width % model.heads:
            refuse("model.width", model.width, f"must be a multiple of model.heads={model.heads}")
        if model.cutoffs != sorted(set(model.cutoffs)) or any(edge <= Dictionary.PAD for edge in model.cutoffs):
            refuse("model.cutoffs", model.cutoffs, f"must be rising numbers above {Dictionary.PAD}")
        if not 1 <= train.queue_fill <= train.queue_length:
            refuse(
                "train.queue_fill", train.queue_fill, f"must be between 1 and train.queue_length={train.queue_length}"
            )
        further = {"train.tokens_per_sample": train.tokens_per_sample}
        lengths(config, refuse, model.max_positions, "model.max_positions", further)

    def warnings(self, config: TransformerRun) -> list[str]:
        """Settings under which the model would be asked about positions that its training never showed it.

        Sinusoidal positions do not extrapolate: the perplexity rises without any error.
        """
        if config.datastore.checkpoint:
            return []  # trained elsewhere, with a sample length that is not known here
        trained = config.train.tokens_per_sample
        reads = {
            "datastore": config.datastore.context_window + config.datastore.block,
            "knn": config.knn.context_window + config.knn.block,
        }
        return [
            f"warning: {section}.context_window + {section}.block = {length} is longer than train.tokens_per_sample="
            f"{trained}: positions from {trained} on were never trained and will be predicted badly"
            for section, length in reads.items()
            if length > trained
        ]

    def describe(self, config: TransformerRun) -> TransformerConfig:
        memory = placed(config.memory, config.model.layers)
        # Without a memory the description is that of the versions that knew none.
        return (
            TransformerModel(**asdict(config.model), memory=memory, seed=config.train.seed) if memory else config.model
        )

    def description_for(self, config: Mapping[str, Any]) -> type[TransformerConfig]:
        return TransformerModel if config.get("memory") else TransformerConfig

    def undrawn(self, description: TransformerConfig) -> TransformerConfig:
        if isinstance(description, TransformerModel):
            return replace(description, memory=values_to_come(description.memory))
        return description

    def build(self, description: TransformerConfig, vocabulary: int) -> nn.Module:
        from distlm.models.transformer.model import TransformerLM

        return TransformerLM(description, vocabulary)

    def require_tap(self, description: TransformerConfig, tap: str, key: str) -> None:
        from distlm.models.transformer.model import TAPS

        if tap not in TAPS:
            raise UsageError(f"{key}={tap!r}: no such hidden state; choose one of {', '.join(TAPS)}")

    def inner_floats(self, description: TransformerConfig) -> int:
        return description.ffn_width

    def forward_flops(self, description: TransformerConfig, tap: str, length: int) -> float:
        """Causal attention counts half of it."""
        width = description.width
        attention = 2 * 4 * width**2 + 2 * length * width
        ffn = 2 * 2 * width * description.ffn_width
        last = {"last_attention_residual": 0, "last_attention_input": 0, "output": attention + ffn}
        return float((description.layers - 1) * (attention + ffn) + last.get(tap, attention))

    def assumed_words(self, config: TransformerRun) -> int:
        return config.data.max_words or 4 * max(config.model.cutoffs, default=12500)

    def plan(self, config: TransformerRun, ranks: int) -> StagePlan:
        from distlm.models.transformer.plan import plan_transformer

        return plan_transformer(config, ranks)

    def job(self, stage: Stage) -> Job:
        from distlm.models.transformer.job import TransformerJob

        return TransformerJob.open(stage)


KIND: Kind = Transformer()
