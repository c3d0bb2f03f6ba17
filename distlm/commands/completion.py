"""Completion in shells: shtab's script for the commands, with recipes and settings for what they take."""

import argparse
import shlex

from distlm.commands.parser import WORDS
from distlm.config.load import leaf_fields, run_classes
from distlm.config.recipe import recipe_names
from distlm.errors import DistlmError

_FUNCTION = "_distlm_words"
_BASH = """
{function}() {{
  compgen -W {words} -- "$1"
  compgen -f -- "$1"
}}
"""
# A setting goes on behind its `=`: no blank there. shtab's function cannot say so from within its subshells.
_BASH_END = """
_distlm() {
  _shtab_distlm "$@"
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o filenames -F _distlm distlm
"""
_ZSH = """
{function}() {{
  compadd -- {recipes}
  compadd -S "" -- {settings}
  _files
}}
"""


def completion(tree: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash or zsh. Raises DistlmError where shtab is missing."""
    try:
        import shtab
    except ImportError as error:
        raise DistlmError(f"completion needs shtab: pip install shtab ({error})") from error
    recipes = recipe_names()
    settings = sorted({f"{key}=" for cls in run_classes().values() for key in leaf_fields(cls)})
    preamble = {
        "bash": _BASH.format(function=_FUNCTION, words=shlex.quote(" ".join([*recipes, *settings]))),
        "zsh": _ZSH.format(function=_FUNCTION, recipes=" ".join(recipes), settings=" ".join(settings)),
    }
    _complete_words(tree)
    script: str = shtab.complete(tree, shell, preamble=preamble)
    return script + (_BASH_END if shell == "bash" else "")


def _complete_words(parser: argparse.ArgumentParser) -> None:
    """Say of what each command takes, and of those below it, how it is completed."""
    for action in parser._actions:
        if action.dest == WORDS:
            action.complete = {"bash": _FUNCTION, "zsh": _FUNCTION}  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_words(child)
