"""One check of `distlm doctor`, and the table of all of them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
LEAST_DISK = 5e9
"""Bytes that a run of a small recipe may take."""
FEW_SHM = 64 << 20
"""Bytes of /dev/shm that are too few: as many as Docker gives where it is not told."""
MORE_SHM = "MPI and loaders need more shared memory: in a container, docker run --shm-size=1g"
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_HEAD = ("check", "status", "found", "what to do")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    text: str
    """What was found."""
    mend: str = ""
    """What to do about it; a failing check always says."""

    def __post_init__(self) -> None:
        """Raises ValueError for a failing check without a mend."""
        if self.status == "fail" and not self.mend:
            raise ValueError(f"check {self.name!r} fails and does not say what to do")


def render(checks: Sequence[Check], as_json: bool, launched: bool) -> tuple[str, bool]:
    """Checks as a table or as JSON, and whether none failed.

    Each check is one line where no terminal reads it, and where a launcher started the process (`launched`): mpirun
    gives its ranks a terminal of its own.
    """
    healthy = all(check.status != "fail" for check in checks)
    if as_json:
        return json.dumps({"healthy": healthy, "checks": [asdict(check) for check in checks]}, indent=1), healthy
    count = {status: sum(check.status == status for check in checks) for status in _STYLES}
    end = f"{count['ok']} ok, {count['warn']} to look at (warn), {count['fail']} to mend (fail)"
    return f"{(_table if sys.stdout.isatty() and not launched else _lines)(checks)}\n{end}", healthy


def _lines(checks: Sequence[Check]) -> str:
    width = max(len(check.name) for check in checks)
    lines = [f"{_HEAD[0]:<{width}}  {_HEAD[1]:<6}  {_HEAD[2]} -> {_HEAD[3]}"]
    for check in checks:
        mend = f" -> {check.mend}" if check.mend else ""
        lines.append(f"{check.name:<{width}}  {check.status:<6}  {check.text}{mend}")
    return "\n".join(lines)


def _table(checks: Sequence[Check]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _HEAD:
        table.add_column(name, overflow="fold", no_wrap=name in _HEAD[:2])
    for check in checks:
        table.add_row(check.name, Text(check.status, _STYLES[check.status]), Text(check.text), Text(check.mend))
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
