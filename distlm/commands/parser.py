"""The commands by their words: `distlm index build …` is read by the parser of `index build` alone.

A command is found by the longest run of words that is one, so that `report words` can stand beside `report RECIPE`. The
tree of all of them is for the help and for shells' completion.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from distlm.commands.shared import WORDS_HELP
from distlm.errors import UsageError

Arguments = Callable[[argparse.ArgumentParser], None]
"""Adds a command's arguments to its parser."""
Tell = Callable[[str, Sequence[str]], str]
"""(stage, arguments) → help of the settings that a command of this stage reads."""
WORDS = "words"
"""Where a parser puts RECIPE and settings."""


class Commands:
    """All commands; each has a parser of its own."""

    def __init__(self, description: str, epilog: str, version: str, settings_help: Tell) -> None:
        self._root = {"description": description, "epilog": epilog}
        self._version, self._settings_help = version, settings_help
        self._parsers: dict[str, argparse.ArgumentParser] = {}
        self._summaries: dict[str, str] = {}
        self._later: dict[str, Arguments] = {}
        self._groups: dict[str, Callable[[], None]] = {}

    def add(
        self,
        words: str,
        summary: str,
        handler: Callable[..., int],
        takes: tuple[str, str] | None = ("RECIPE section.key=value", WORDS_HELP),
        arguments: Arguments | None = None,
        **defaults: Any,
    ) -> argparse.ArgumentParser:
        """A command; returns its parser.

        `takes`: metavar and help of what it takes besides options; None: nothing. `arguments` adds further ones where
        that costs an import: only when the command is asked for.
        """
        parser = argparse.ArgumentParser(
            prog=f"distlm {words}", description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.set_defaults(handler=handler, print_config=False, **defaults)
        if takes is not None:
            parser.add_argument(WORDS, nargs="*", metavar=takes[0], help=takes[1])
        if takes is not None and takes[1] == WORDS_HELP:
            parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        self._parsers[words], self._summaries[words] = parser, summary
        if arguments is not None:
            self._later[words] = arguments
        return parser

    def add_group(self, word: str, summary: str, load: Callable[[], None]) -> None:
        """Commands `WORD …` that cost an import to know: `load` adds them when they are asked for."""
        self._groups[word], self._summaries[word] = load, summary

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a command line; `words` has what is no option, in order.

        Raises UsageError for an unknown option; argparse's own errors end the process with 2, `--help` with 0.
        """
        # The deepspeed launcher adds --local_rank=K; the World reads the rank from the environment.
        given = [argument for argument in arguments if not argument.startswith("--local_rank=")]
        if given and given[0] in self._groups:
            self._groups.pop(given[0])()
        found = next((n for n in (2, 1) if " ".join(given[:n]) in self._parsers), 0)
        if not found:
            self.tree().parse_args(given)
            raise UsageError(f"no command in {' '.join(given)!r}; `distlm --help` lists them")
        words, rest = " ".join(given[:found]), given[found:]
        parser = self._filled(words)
        if "-h" in rest or "--help" in rest:
            parser.epilog = "\n\n".join(filter(None, [self._below(words), parser.epilog, self._settings(words, rest)]))
        if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
            options, extras = parser.parse_known_args(rest)
        else:
            options, extras = parser.parse_known_intermixed_args(rest)
        for extra in extras:
            if not hasattr(options, WORDS):
                raise UsageError(f"`distlm {words}` takes no {extra!r}; see `distlm {words} --help`")
            if "=" not in extra:
                raise UsageError(f"unknown argument {extra!r}; settings are given as section.key=value")
        options.words = [*getattr(options, WORDS, []), *extras]
        return options

    def tree(self, whole: bool = False) -> argparse.ArgumentParser:
        """One parser with the commands below one another; `whole`: with every argument of every command."""
        root = argparse.ArgumentParser(prog="distlm", **self._root)  # type: ignore[arg-type]
        root.add_argument("--version", action="version", version=self._version)
        if whole:
            for word in [*self._groups]:
                self._groups.pop(word)()
        below: dict[str, Any] = {"": root.add_subparsers(metavar="VERB", required=True)}

        def add(words: str, summary: str) -> None:
            group, _, word = words.rpartition(" ")
            if group not in below:
                if group not in made:
                    add(group, self._summaries.get(group) or f"{', '.join(self._children(group))}")
                below[group] = made[group].add_subparsers(metavar="VERB", required=group not in self._parsers)
            leaf = whole and words in self._parsers
            made[words] = below[group].add_parser(
                word, help=summary, description=summary, parents=[self._filled(words)] if leaf else [],
                add_help=not leaf,
            )  # fmt: skip

        made: dict[str, argparse.ArgumentParser] = {}
        for words in [*self._parsers, *self._groups]:
            add(words, self._summaries[words])
        return root

    def _filled(self, words: str) -> argparse.ArgumentParser:
        parser = self._parsers[words]
        if fill := self._later.pop(words, None):
            fill(parser)
        return parser

    def _settings(self, words: str, rest: Sequence[str]) -> str:
        parser = self._parsers[words]
        takes_settings = any(action.dest == "print_config" for action in parser._actions)
        return self._settings_help(parser.get_default("stage") or "", rest) if takes_settings else ""

    def _children(self, group: str) -> list[str]:
        return [words.split()[-1] for words in self._parsers if words.rpartition(" ")[0] == group]

    def _below(self, words: str) -> str:
        children = [f"`distlm {words} {child}`" for child in self._children(words)]
        return f"{', '.join(children)} are commands of their own." if children else ""
