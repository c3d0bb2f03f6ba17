"""Brings views up to date with metrics.jsonl: what they show depends on nothing but the record."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from distlm.runtime.metrics import Line, line_of, names_of, resolve
from distlm.runtime.progress import say

RENEW_EVERY_S = 60.0
"""While a training repeats updates that the views show already, they are made anew at most so often."""


class View(Protocol):
    """The metrics as another program shows them. What it raises leaves it off, never ends a stage."""

    name: str
    """As in train.trackers."""
    folder: Path

    def renew(self, lines: Sequence[Line]) -> None:
        """Show these lines, and no others: the whole record, resolved (metrics.resolve)."""

    def add(self, line: Line) -> None:
        """Show one more."""

    def close(self, failed: bool) -> None:
        """The stage is over; `failed`: by an error."""


class Follower:
    """Reads a record as it grows and hands its lines to views.

    After a resume the steps since the checkpoint are written once more. The views keep the old values meanwhile, and
    are made anew when the training has got past them: each shows one value a step, the one that MetricsFile.read gives.
    """

    def __init__(self, path: Path, views: Sequence[View]) -> None:
        self._path, self._views = path, list(views)
        self._stale, self._renewed = True, -RENEW_EVERY_S
        self._rewind()

    def told(self, path: Path) -> None:
        """A line was written to the record at `path`."""
        if path == self._path and self._views:
            self.update()

    def update(self, last: bool = False) -> None:
        """Show what was written since; `last`: there is no later update."""
        try:
            lines = list(self._unread())
        except OSError as error:
            # The record's own trouble: whoever writes it says so.
            say(f"train.trackers: {error}")
            return
        ahead = [self._is_ahead(line) for line in lines]
        self._stale = self._stale or not all(ahead)
        if not self._stale:
            for line in lines:
                self._each(lambda view, line=line: view.add(line))  # type: ignore[misc]
            return
        further = any(new for line, new in zip(lines, ahead, strict=True) if line.step is not None)
        if not (further or last or time.monotonic() - self._renewed >= RENEW_EVERY_S):
            return
        self._rewind()
        resolved = resolve(self._unread())
        for line in resolved:
            self._is_ahead(line)
        self._each(lambda view: view.renew(resolved))
        self._stale, self._renewed = False, time.monotonic()

    def close(self, failed: bool) -> None:
        """Show the rest."""
        self.update(last=True)
        self._each(lambda view: view.close(failed))

    def _rewind(self) -> None:
        self._offset = 0
        self._reached: dict[str, int] = {}
        self._there: dict[str, set[tuple[str, ...]]] = {}

    def _unread(self) -> Iterator[Line]:
        """Whole lines that were not read yet, those of other processes, too."""
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            for text in stream:
                if not text.endswith(b"\n"):
                    return
                self._offset += len(text)
                line = line_of(text)
                if line is not None:
                    yield line

    def _is_ahead(self, line: Line) -> bool:
        """Whether a line comes after all others of its stage, so that a view can add it; counts it, if so."""
        if line.step is None:
            return True
        reached, names = self._reached.get(line.stage), names_of(line)
        if reached is None or line.step > reached:
            self._reached[line.stage], self._there[line.stage] = line.step, {names}
            return True
        if line.step < reached or names in self._there[line.stage]:
            return False
        self._there[line.stage].add(names)
        return True

    def _each(self, show: Callable[[View], None]) -> None:
        for view in list(self._views):
            try:
                show(view)
            except Exception as error:
                self._views.remove(view)
                what = (str(error).splitlines() or [""])[0]
                say(
                    f"train.trackers: {view.name} is left off until the next start, which makes it anew from "
                    f"{self._path.name}: {type(error).__name__}: {what}"
                )
                with suppress(Exception):
                    view.close(failed=True)
