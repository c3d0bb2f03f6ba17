"""Completion in shells: shtab's script for the commands, with recipes and settings for what they take."""

import argparse
import re
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
_BASH_BOTH = """
{function}() {{
  compgen -W "{words}" -- "$1"
  {other} "$1"
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

# shtab's zsh offers what may be there several times for the first word alone.
_ZSH_ONCE = re.compile(rf'"\(\*\)::?([^"\n]*:{_FUNCTION}")')


def completion(tree: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash or zsh. Raises DistlmError where shtab is missing."""
    try:
        import shtab
    except ImportError as error:
        raise DistlmError(f"completion needs shtab: pip install shtab ({error})") from error
    recipes = recipe_names()
    settings = sorted({f"{key}=" for cls in run_classes().values() for key in leaf_fields(cls)})
    both = _complete_words(tree, shell)
    preamble = {
        "bash": _BASH.format(function=_FUNCTION, words=shlex.quote(" ".join([*recipes, *settings])))
        + "".join(
            _BASH_BOTH.format(function=_function(name), words=" ".join(below), other=_FUNCTION)
            for name, below in both.items()
        ),
        "zsh": _ZSH.format(function=_FUNCTION, recipes=" ".join(recipes), settings=" ".join(settings)),
    }
    script: str = shtab.complete(tree, shell, preamble=preamble)
    if shell == "bash":
        return script + _BASH_END
    for words in both:
        offered = f"_describe 'distlm {words} commands' _commands\n"
        script = script.replace(offered, f"{offered}  {_FUNCTION}\n")
    return _ZSH_ONCE.sub(r'"*:\1', script)


def _complete_words(parser: argparse.ArgumentParser, shell: str, name: str = "") -> dict[str, list[str]]:
    """Set how the arguments of this command, and of those below it, are completed.

    Returns each command that takes a recipe and has commands below it, with their names.
    """
    below = {
        word: child
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for word, child in action.choices.items()
    }
    both = {}
    for action in parser._actions:
        if action.dest == WORDS:
            function = _function(name) if below else _FUNCTION
            action.complete = {"bash": function, "zsh": _FUNCTION}  # type: ignore[attr-defined]
            if below:
                both[name] = list(below)
            if below and shell == "zsh":
                # Its script has the one or the other.
                action.help = argparse.SUPPRESS
    for word, child in below.items():
        both |= _complete_words(child, shell, f"{name} {word}".strip())
    return both


def _function(name: str) -> str:
    return f"{_FUNCTION}_{name.replace(' ', '_')}"
