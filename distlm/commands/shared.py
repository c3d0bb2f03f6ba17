"""What the verbs share: the configuration that they were given, and printing once."""

import argparse
from collections.abc import Callable, Mapping

from distlm.config.load import load_config, split_words
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_DONE, UsageError
from distlm.runtime.ranks.world import World

WORDS_HELP = "a recipe (`distlm recipes` lists them), a YAML file or a run directory, and settings, in any order"
Handler = Callable[[argparse.Namespace, World], int]
"""What a verb does; its exit code."""
Add = Callable[..., argparse.ArgumentParser]
"""add(words, summary, handler, stage="…") → the verb's parser, which takes a recipe and settings."""


def config_of(options: argparse.Namespace) -> RunConfig:
    """The configuration of a verb's words and flags. Raises UsageError."""
    options.recipe, options.overrides = split_words(options.words)
    if getattr(options, "no_self_test", False):
        options.overrides.append("knn.self_test=false")
    if getattr(options, "no_verify", False):
        options.overrides.append("launch.verify=false")
    return load_config(options.recipe, options.overrides)


def print_once(text: str, world: World) -> int:
    """Print on rank 0; the exit code."""
    if world.rank == 0:
        print(text.rstrip("\n"), flush=True)
    return EXIT_DONE


def one_line(summary: Mapping[str, object]) -> str:
    """name=value of a stage's figures."""

    def show(value: object) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return " ".join(f"{key}={show(value)}" for key, value in summary.items() if not isinstance(value, dict | list))


def refuse_ranks(world: World, verb: str, why: str) -> None:
    """UsageError on several ranks."""
    if world.size > 1:
        raise UsageError(f"`distlm {verb}` {why}; start it once, not on {world.size} ranks")


def require_suffix(option: str, path: str, suffix: str) -> None:
    """UsageError for an output whose name says that it is something else: it replaces what is there."""
    if path and not path.endswith(suffix):
        raise UsageError(f"{option} {path}: must end in {suffix}")
