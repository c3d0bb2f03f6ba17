"""YAML that people write and that runs record: plain sections and keys, each key once."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distlm.errors import DistlmError

_DEEPEST = 50


class _EachOnce(yaml.constructor.BaseConstructor):
    """Of two equal keys one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"the key {key.value!r} is there twice (line {line})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Typed(_EachOnce, yaml.SafeLoader):
    """Numbers, booleans and dates as such."""


class _AsText(_EachOnce, yaml.BaseLoader):
    """Every scalar as the text that is there."""


def yaml_of(text: str, as_text: bool = False) -> Any:
    """What YAML gives; `as_text`: every scalar as text, as YAML makes 86400 of 24:00:00 and 83 of 0123. Raises
    ValueError that says in one line what is wrong with it."""
    try:
        tree = yaml.load(text, _AsText if as_text else _Typed)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # A date that there is not, a number without digits, …
        raise ValueError(f"a value that YAML cannot read ({error})") from error
    if _deeper(tree, _DEEPEST):
        raise ValueError("nested too deep, or an alias (*) within what it stands for")
    return tree


def _deeper(tree: Any, levels: int) -> bool:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels < 0 or any(_deeper(value, levels - 1) for value in inner if isinstance(value, dict | list))


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings that a stage of a run recorded, RUN/configs/STAGE.yaml: section → setting → value, and what is in no
    section; empty where there is no such file. Raises DistlmError naming a file that is damaged."""
    if not path.is_file():
        return {}
    mend = "put it back as it was; without it, settings are not compared with those that made the files of the run"
    try:
        tree = yaml_of(path.read_text("utf-8"))
    except ValueError as error:
        raise DistlmError(f"{path}: damaged: {error}; {mend}") from error
    if not isinstance(tree, dict):
        raise DistlmError(f"{path}: damaged: expected sections and keys, found {type(tree).__name__}; {mend}")
    for name, value in tree.items():
        if not isinstance(value, dict) and name not in ("name", "run_dir"):
            raise DistlmError(f"{path}: damaged: section {name!r} must hold keys, found {str(value)[:50]!r}; {mend}")
    return tree
