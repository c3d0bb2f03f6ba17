"""What ranks said when they failed: the first error of any of them, the cause before what followed from it."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

ENDS_TOO = "; this rank ends too."
"""In the line of a rank that ends because another one has (distlm.runtime.alive)."""
_LINE = re.compile(r"(?:\S+: ?)?(\[rank \d+ on [^\]]*\] )?distlm: (.+)")
"""A launcher may put the node's name before it."""


class Said:
    """Lines of the ranks as they come; `error` is the first that says why, empty when none does."""

    def __init__(self) -> None:
        self._cause, self._followed = "", ""

    @property
    def error(self) -> str:
        """`[rank 1 on node2] text`; for a single process the text alone."""
        return self._cause or self._followed

    @property
    def is_cause(self) -> bool:
        """Whether `error` is a rank's own error, and not its line about another rank that ended."""
        return bool(self._cause)

    def hear(self, line: str) -> None:
        """A line of any rank."""
        # Most lines are of progress.
        if (self._cause and self._followed) or "distlm: " not in line or not (found := _LINE.match(line.rstrip())):
            return
        text = f"{found[1] or ''}{found[2]}"
        if ENDS_TOO in text:
            self._followed = self._followed or text
        else:
            self._cause = self._cause or text


def heard(lines: Iterable[str]) -> Said:
    """Said of all lines of a log."""
    said = Said()
    for line in lines:
        said.hear(line)
    return said


def cause_in(logs: Iterable[Path]) -> tuple[Path | None, str]:
    """The first log in which a rank says why it ended, and its words. Where no rank says why, the first log that tells
    of another rank's end. None and an empty text where no log has either."""
    followed: tuple[Path | None, str] = None, ""
    for log in logs:
        with suppress(OSError), log.open(encoding="utf-8", errors="replace") as lines:
            said = heard(lines)
            if said.is_cause:
                return log, said.error
            followed = followed if followed[1] or not said.error else (log, said.error)
    return followed
