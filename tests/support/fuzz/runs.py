"""A tiny run of every kind of model, which fuzzing starts from: a recipe of it, and the stages that it can be asked."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distlm.config.load import dump_config, load_config
from distlm.config.schema import RunConfig
from support.config import config_of
from support.finetune import hugging_face, settings, write_sst2
from support.hf.runs import MEMORY, made_run
from support.lstm import lstm_settings
from support.plm import plm_settings, tiny_shards
from support.shared import made_once, searched
from support.train import settings as train_settings
from support.train import tiny_tokens

FINETUNE = "finetune"
CAUSAL = ("data prepare", "train", "evaluate", "datastore write", "index build", "knn search", "knn cache", "knn tune",
          "knn evaluate")  # fmt: skip
_WINDOWS = "cache.windows=[5,60]"


@dataclass(frozen=True)
class Base:
    """Settings with which every stage of `verbs` is possible."""

    config: RunConfig
    recipe: Path
    """The same as a file."""
    verbs: tuple[str, ...]
    sections: tuple[str, ...] = ()
    """Sections that are tried; none: all of them."""


def bases(factory: pytest.TempPathFactory) -> dict[str, Callable[[], Base]]:
    """Name → maker of a base."""

    def base(name: str, config: RunConfig, verbs: tuple[str, ...], sections: tuple[str, ...] = ()) -> Base:
        def write(folder: Path) -> None:
            (folder / "recipe.yaml").write_text(dump_config(config), "utf-8")

        return Base(config, made_once(factory, f"fuzz-{name}", write) / "recipe.yaml", verbs, sections)

    def tokens() -> Path:
        return made_once(factory, "fuzz-tokens", tiny_tokens)

    def run(name: str) -> Path:
        return factory.getbasetemp() / f"fuzz-run-{name}"

    def transformer() -> Base:
        found = searched(factory)
        found.cache.windows = [5, 60]
        return base("transformer", found, CAUSAL)

    def memory() -> Base:
        pkm = [word.replace("resm", "pkm") for word in MEMORY]
        words = train_settings(
            tokens() / "tokens", run("memory"), f"data.text_dir={tokens() / 'text'}", *pkm, "launch.ranks=1"
        )
        return base("memory", config_of("demo", [*words, "data.max_words=0", _WINDOWS]), CAUSAL[:4])

    def lstm() -> Base:
        words = lstm_settings(tokens() / "tokens", run("lstm"), "awd.epochs=1", "awd.finetune_epochs=1", _WINDOWS)
        config = config_of("awd-lstm-small", [*words, f"data.text_dir={tokens() / 'text'}"])
        return base("lstm", config, ("data prepare", "train", "knn cache"))

    def hf() -> Base:
        found = made_run(factory, "gpt2").config
        found.cache.windows = [5, 60]
        return base("hf", found, CAUSAL)

    def hf_memory() -> Base:
        tokens_dir = f"data.tokens_dir={Path(hf().config.run_dir) / 'tokens'}"
        config = load_config(str(hf().recipe), [*MEMORY, tokens_dir, f"run_dir={run('hf-memory')}"])
        return base("hf-memory", config, CAUSAL[:2], ("memory", "hf", "train"))

    def plm() -> Base:
        shards = made_once(factory, "fuzz-shards", tiny_shards) / "shards"
        words = plm_settings(shards, run("plm"), "memory.kind=resm", "train.updates=2", "launch.ranks=1")
        return base("plm", config_of("plm-base", words), ("data shard", "train"), ("shards", "plm", "memory", "train"))

    def tuned() -> Base:
        def make(folder: Path) -> None:
            hugging_face(folder / "hf")
            write_sst2(folder / "glue", train=32, dev=8)

        folder = made_once(factory, "fuzz-glue", make)
        words = settings(run(FINETUNE), folder / "glue", "finetune.epochs=1", "launch.ranks=1")
        config = config_of("plm-base", [*words, f"finetune.checkpoint={folder / 'hf'}"])
        return base(FINETUNE, config, ("finetune", "finetune --evaluate-only"), (FINETUNE,))

    made = (transformer, memory, lstm, hf, hf_memory, plm, tuned)
    return {maker.__name__: maker for maker in made}


_GONE = {
    "data prepare": ("*",), "train": ("checkpoints", "datastore", "index", "neighbours", "configs", "*.json"),
    "evaluate": ("lm.json",), "datastore write": ("datastore", "index", "neighbours", "configs"),
    "index build": ("index", "neighbours"), "knn search": ("neighbours",), "knn tune": ("tuned", "knn.json"),
    "knn evaluate": ("results", "results.json", "losses"),
}  # fmt: skip


def ready_for(verb: str, base: Base, to: Path) -> Path:
    """A copy of the base's run directory, where it has one, without what the stage and later ones have made."""
    shutil.rmtree(to, ignore_errors=True)
    source = Path(base.config.run_dir)
    if source.is_dir():
        shutil.copytree(source, to)
        for pattern in _GONE.get(verb, ()):
            for path in to.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return to
