"""Tiny runs, stage by stage, for starts in which calls fail."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support import TINY, write_text
from support.finetune import write_sst2
from support.kinds import readable, recipe_of
from support.lstm import LSTM
from support.plm import PLM


@dataclass(frozen=True)
class Step:
    """A stage of a run."""

    name: str
    words: list[str]
    """After `distlm`."""


_TEXT = [
    "train.updates=2", "train.valid_every=1", "train.save_every=1", "datastore.rows_per_shard=256",
    "index.factory=IVF4,PQ4", "cache.windows=[5,60]", "cache.thetas=[0.1]", "cache.lambdas=[0.0,0.1]",
]  # fmt: skip
_FINETUNE = [
    "finetune.task=SST-2", "finetune.seeds=[1]", "finetune.epochs=1", "finetune.rows_per_update=16",
    "finetune.length=24", "finetune.keep_models=true", "launch.threads=1",
]  # fmt: skip


def transformer(folder: Path, place: Path) -> list[Step]:
    """From text to a report; the text lies in `folder`, PLACE/run is the run directory."""
    words = [*TINY, *_TEXT, *_data(folder, place)]
    longer = [*words, "train.updates=4"]
    return [
        _step("data prepare", words),
        _step("train", words),
        _step("train", longer, "train, resumed"),
        *(_step(verb, longer) for verb in (
            "evaluate", "datastore write", "index train", "index add", "index merge", "knn search", "knn cache",
            "knn tune", "knn evaluate", "report",
        )),
        _export(place),
        Step("verify", ["verify", str(place / "run")]),
    ]  # fmt: skip


def awd_lstm(folder: Path, place: Path) -> list[Step]:
    """A training with its fine-tuning phase, and a cache without a store."""
    words = [*TINY, *_TEXT, *LSTM, "awd.epochs=2", "awd.finetune_epochs=1", *_data(folder, place)]
    return [_step("data prepare", words), _step("train", words), _step("knn cache", words)]


def plm(folder: Path, place: Path) -> list[Step]:
    """A masked language model with memories."""
    shards = f"shards.text_dir={write_text(folder / 'text', train_lines=60)}"
    words = [*TINY, *PLM, "memory.kind=pkm", "train.updates=2", "train.valid_every=1", "train.save_every=1", shards]
    words.append(f"run_dir={place / 'run'}")
    longer = [*words, "train.updates=4"]
    glue = f"finetune.data_dir={write_sst2(folder / 'glue', 32, 8)}"
    return [
        _step("data shard", words),
        _step("train", words),
        _step("train", longer, "train, resumed"),
        _step("evaluate", longer),
        Step("finetune", ["finetune", str(place / "run"), *_FINETUNE, glue]),
        _export(place),
    ]


CHAINS = {"transformer_lm": transformer, "awd_lstm": awd_lstm, "plm": plm}


def _data(folder: Path, place: Path) -> list[str]:
    text = write_text(folder / "text", train_lines=60)
    return ["data.source=folder", f"data.text_dir={text}", f"run_dir={place / 'run'}"]


def _step(verb: str, words: Sequence[str], name: str = "") -> Step:
    return Step(name or verb, [*verb.split(), recipe_of(words), *readable(words)])


def _export(place: Path) -> Step:
    return Step("export hf", ["export", "hf", str(place / "run"), "--out", str(place / "exported")])
