"""Slurm's compressed node lists, read without Slurm: containers and some compute nodes have no scontrol."""

import re
from collections.abc import Iterator
from itertools import product

from distlm.errors import DistlmError


def expand_nodes(text: str) -> list[str]:
    """Names of a Slurm node list, in its order: `n[08-10],login` → n08, n09, n10, login.

    Several brackets in a name multiply, the last one fastest, as `scontrol show hostnames` has it. Raises DistlmError
    for a list that is cut or has a bad range.
    """
    names: list[str] = []
    for item in split_list(text, text):
        pieces = re.split(r"\[([^\[\]]*)\]", item)
        if any(char in piece for piece in pieces[::2] for char in "[]"):
            raise DistlmError(f"node list {text!r}: brackets do not match in {item!r}")
        # Pieces alternate: plain text, what was in brackets, plain text, ...
        choices = [[piece] if i % 2 == 0 else list(_ranges(piece, text)) for i, piece in enumerate(pieces)]
        names += ["".join(parts) for parts in product(*choices)]
    return names


def split_list(text: str, whole: str) -> Iterator[str]:
    """Items between commas that are outside brackets."""
    depth, start = 0, 0
    for place, char in enumerate(text + ","):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            if item := text[start:place].strip():
                yield item
            start = place + 1
    if depth != 0:
        raise DistlmError(f"node list {whole!r}: brackets do not match (was it cut?)")


def _ranges(text: str, whole: str) -> Iterator[str]:
    """`1-3,07-08` → 1, 2, 3, 07, 08: the first number's width is kept."""
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise DistlmError(f"node list {whole!r}: bad range {part!r}; expected e.g. 3, 1-4 or 008-011")
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))
