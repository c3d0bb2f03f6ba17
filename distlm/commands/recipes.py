"""What can be asked for, and how it is typed: recipes, config, completion."""

import argparse
from functools import partial

from distlm.commands.parser import Commands
from distlm.commands.shared import Add, config_of, print_once
from distlm.config.load import dump_config, dump_difference
from distlm.config.recipe import recipe_summaries
from distlm.runtime.ranks.world import World

SHELLS = ("bash", "zsh")


def add_verbs(add: Add, commands: Commands) -> None:
    """recipes, config, completion."""
    add("recipes", "list the recipes of the package with a line each", _recipes, takes=None)
    child = add("config", "print the resolved configuration", print_config)
    child.add_argument(
        "--diff", action="store_true", help="print only what differs from the defaults of its kind of model"
    )
    child = add(
        "completion", "print a script that completes verbs, options, recipes and settings in a shell",
        partial(_completion, commands), takes=None,
    )  # fmt: skip
    child.add_argument("shell", choices=SHELLS, help="bash: > ~/.local/share/bash-completion/completions/distlm; "
                       'zsh: > "${fpath[1]}/_distlm"')  # fmt: skip


def print_config(options: argparse.Namespace, world: World) -> int:
    """`distlm config`, and --print-config of the others."""
    config = config_of(options)
    return print_once(dump_difference(config) if getattr(options, "diff", False) else dump_config(config), world)


def _recipes(_options: argparse.Namespace, world: World) -> int:
    found = recipe_summaries()
    width = max(map(len, found))
    return print_once("\n".join(f"{name:<{width}}  {summary}" for name, summary in found.items()), world)


def _completion(commands: Commands, options: argparse.Namespace, world: World) -> int:
    from distlm.commands.completion import completion

    return print_once(completion(commands.tree(whole=True), options.shell), world)
