"""The AWD-LSTM as a kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from distlm.config.check import MOST_LAYERS, MOST_WIDTH, at_least, at_most, fractions, lengths
from distlm.errors import DistlmError, UsageError
from distlm.models.awd_lstm.config import LstmConfig, LstmRun
from distlm.models.awd_lstm.records import LstmCard, LstmState
from distlm.models.kind import Exchange, Kind, Refuse, hugging_face
from distlm.training.blocks.kind import CausalKind

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from distlm.runtime.plan import StagePlan
    from distlm.runtime.rundir import RunDir
    from distlm.runtime.stage import Stage
    from distlm.training.job import Job


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="state dict: .pt, .pth or .safetensors")
    parser.add_argument(
        "--vocabulary",
        help="words in the order of the embedding's rows, one per line; default: as they first come in the text",
    )


class AwdLstmKind(CausalKind):
    """The AWD-LSTM of Merity et al. (2017)."""

    name = "awd_lstm"
    carries = True
    description = LstmConfig
    card = LstmCard
    config = LstmRun
    model_sections = ("data", "model", "lstm", "awd", "train")
    importers = (
        Exchange(
            "awd-lstm", "a state dict of salesforce/awd-lstm-lm or fastai becomes a checkpoint", _import_arguments,
            "distlm.models.awd_lstm.exchange.importer:import_options",
        ),
    )  # fmt: skip
    exporters = (hugging_face("distlm.models.awd_lstm.exchange.exporter:export_run"),)

    def stages(self, config: LstmRun) -> tuple[str, ...]:
        """It is evaluated as it is; what comes from a datastore are commands of their own."""
        mixed = ("knn cache", "knn tune", "knn evaluate") if config.cache.use else ()
        return ("data prepare", "train", "evaluate", *mixed)

    def check(self, config: LstmRun, refuse: Refuse) -> None:
        train, awd = config.train, config.awd
        at_least(config, refuse, 1, (
            "lstm.layers", "lstm.width", "lstm.hidden_width", "lstm.max_positions", "awd.batch", "awd.bptt",
            "awd.epochs", "awd.nonmono", "awd.valid_batch",
        ))  # fmt: skip
        at_least(config, refuse, 0, ("awd.micro_batch", "awd.ar", "awd.tar", "awd.finetune_epochs", "awd.log_interval"))
        at_most(config, refuse, MOST_LAYERS, ("lstm.layers",))
        at_most(config, refuse, MOST_WIDTH, ("lstm.width", "lstm.hidden_width"))
        fractions(config, refuse, (
            "lstm.embedding_dropout", "lstm.input_dropout", "lstm.hidden_dropout", "lstm.output_dropout",
            "lstm.weight_dropout",
        ))  # fmt: skip
        lengths(config, refuse, config.lstm.max_positions, "lstm.max_positions")
        if train.precision != "fp32":
            # A rate of 30 and a mean over 10^5 steps do not survive 11 bits of mantissa.
            refuse("train.precision", train.precision, "model.kind=awd_lstm needs fp32 weights and averages; set fp32")
        if config.data.tokenizer:
            refuse("data.tokenizer", config.data.tokenizer, "model.kind=awd_lstm reads words; leave it out")
        if awd.on_trigger != "nothing" and not train.valid_every:
            refuse(
                "train.valid_every", 0,
                f"awd.on_trigger={awd.on_trigger} is triggered by validation losses, of which this makes none; "
                "leave it out (an AWD-LSTM is validated after every epoch), or set awd.on_trigger=nothing",
            )  # fmt: skip
        if awd.micro_batch and awd.batch % awd.micro_batch:
            refuse("awd.batch", awd.batch, f"must be a multiple of awd.micro_batch={awd.micro_batch}")

    def require_ranks(self, config: LstmRun, ranks: int) -> None:
        from distlm.models.awd_lstm.job import plan_columns

        plan_columns(config.awd, ranks)

    def describe(self, config: LstmRun) -> LstmConfig:
        return config.lstm

    def build(self, description: LstmConfig, vocabulary: int) -> nn.Module:
        from distlm.models.awd_lstm.model import AwdLstm

        return AwdLstm(description, vocabulary)

    def card_extras(self, description: LstmConfig, vocabulary: int) -> dict[str, int | str]:
        """Which ids the rows of the embedding are."""
        from distlm.models.awd_lstm.model import FIRST_ID

        return {"rows": vocabulary - FIRST_ID, "first_id": FIRST_ID}

    def require_tap(self, description: LstmConfig, tap: str, key: str) -> None:
        from distlm.models.awd_lstm.model import TAPS

        if tap not in TAPS:
            raise UsageError(f"{key}={tap!r}: no such hidden state; choose one of {', '.join(TAPS)}")

    def inner_floats(self, description: LstmConfig) -> int:
        """The gates of a layer with its input and output."""
        return 6 * description.hidden_width

    def forward_flops(self, description: LstmConfig, tap: str, length: int) -> float:
        widths = [description.width, *[description.hidden_width] * (description.layers - 1), description.width]
        return float(sum(2 * 4 * after * (before + after) for before, after in pairwise(widths)))

    def assumed_words(self, config: LstmRun) -> int:
        """WikiText-2's."""
        return config.data.max_words or 33280

    def in_small(self, config: LstmRun, share: float) -> dict[str, object]:
        return {
            "awd.epochs": max(1, round(config.awd.epochs * share)), "awd.finetune_epochs": 0, "train.init_from": "",
        }  # fmt: skip

    def plan(self, config: LstmRun, ranks: int) -> StagePlan:
        from distlm.models.awd_lstm.plan import plan_lstm

        return plan_lstm(config, ranks)

    def job(self, stage: Stage) -> Job:
        from distlm.models.awd_lstm.job import LstmJob

        return LstmJob.open(stage)

    def finished(self, config: LstmRun, run: RunDir) -> bool:
        """Its length is not known before: the newest checkpoint says so."""
        from distlm.training.finished import STATE

        complete = run.complete_checkpoints()
        try:
            state = LstmState.read(complete[-1] / STATE) if complete else None
        except DistlmError:
            return False
        if state is None or not state.finished:
            return False
        lengths = (state.awd.epochs, state.awd.finetune_epochs)
        return state.stopped or lengths == (config.awd.epochs, config.awd.finetune_epochs)

    def may_grow(self, before: Mapping[str, Any], config: LstmRun, key: str) -> str:
        awd = before.get("awd", {})
        # Where nothing is averaged there is no fine-tuning, whatever was asked for (phases.finetune_epochs).
        finetunes = awd.get("on_trigger", "average") == "average" and awd.get("finetune_epochs")
        if key == "awd.epochs" and finetunes:
            return (
                "fine-tuning follows the epochs that were asked for; start from these weights with another run_dir= "
                "and train.init_from="
            )
        return ""

    def plan_evaluate(self, config: LstmRun, ranks: int) -> StagePlan:
        from distlm.training.evaluate import plan_tokens

        return plan_tokens(config, 1.0)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        from distlm.models.awd_lstm.evaluate import evaluate_in_one_go

        return evaluate_in_one_go(stage)


KIND: Kind = AwdLstmKind()
