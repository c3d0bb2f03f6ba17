"""What a stage does when one of its calls fails, and when it is started again: compared with an undisturbed start."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlm.runtime.files import bytes_hash
from support.failing import Outcome, Stages
from support.failing.chains import Step

OTHERS = {
    "metrics.jsonl": "times of what was measured, also of the start that failed",
    "report.html": "the time when it was made, and plots of those metrics",
    ".lock": "who had it last",
    ".alive": "signs of life of ranks of a start that failed; a later one removes them after a day",
}
"""Files that differ from an undisturbed run's, and why."""
MEASURED = {
    "seconds": "how long it took",
    "tokens_per_s": "likewise",
    "state.json": "its checksum in complete.json, as it has such times",
    "check": "checksum of a record that has them",
}
"""Entries of records that differ, and why."""
WORDS = {
    "ENOSPC": "no space left on the disk",
    "EDQUOT": "disk quota exceeded",
    "EIO": "input/output error",
    "EROFS": "read-only file system",
    "ENOMEM": "cannot allocate memory",
}
"""Error → what the user is told."""
UNNAMED = "could not be opened"
"""What is said where a library keeps the reason to itself, and the file can be opened a moment later."""
READS = {"read", "open to read", "mmap", "opendir"}


@dataclass
class Row:
    """Of a table: what came of the faults in one kind of call of one stage."""

    calls: int = 0
    """That an undisturbed start makes."""
    failed: int = 0
    """Starts in which one of them failed."""
    lines: int = 0
    """Of those, ended with one line and exit code 1."""
    notes: int = 0
    """Ended well, with a note that metrics could not be written."""
    well: int = 0
    """Ended well, with an undisturbed start's bytes."""
    again: int = 0
    """Starts after it, without faults; the same state left behind is started from once."""


@dataclass
class Trial:
    """One stage. `place`: the folder in which calls fail; `before`: what it has before the stage."""

    stages: Stages
    step: Step
    place: Path
    before: Path
    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Kind of each, in order."""

    def undisturbed(self) -> None:
        """The start that the others are compared with; its result stays in `place`."""
        put_back(self.before, self.place)
        done = self.stages.run(self.step.words, self.place, at=0)
        assert done.code == 0, f"{self.step.name}: {done.errors}"
        self._begun, self._expected = contents(self.before), contents(self.place)
        self._known: dict[str, list[str]] = {}
        self.calls = [kind for kind, _, _ in done.calls]
        for kind, count in Counter(self.calls).items():
            self.rows[kind] = Row(calls=count)

    def fail(self, number: int, stays: bool = False) -> None:
        """A start whose call of that number fails, and one without faults after it."""
        put_back(self.before, self.place)
        # The errors of a kind take turns within a stage; other stages begin with another one.
        done = self.stages.run(self.step.words, self.place, number, stays, turn=len(self.step.name))
        if not done.calls:
            return
        kind, error, path = done.calls[0]
        row = self.rows.setdefault(kind, Row())
        row.failed += 1
        left = contents(self.place)
        found = self._look(done, error, left)
        if done.code == 1:
            row.lines += 1
        elif "metrics" in done.errors and any(word in done.errors for word in WORDS.values()):
            row.notes += 1
        else:
            row.well += 1
        if left != self._expected:
            found += self._again(row, left)
        lasting = ", and stays so" if stays else ""
        where = f"{self.step.name}, call {number}: {kind} of {path} fails with {error}{lasting}"
        self.problems += [f"{where}: {problem}" for problem in found]

    def _look(self, done: Outcome, error: str, left: dict[str, str]) -> list[str]:
        """What is wrong with how it ended."""
        found = []
        if "Traceback" in done.errors:
            found.append(f"traceback\n{done.errors}")
        if done.code not in (0, 1):
            found.append(f"exit code {done.code}\n{done.errors}")
        if done.code == 0 and (other := [name for name, digest in self._expected.items() if left.get(name) != digest]):
            found.append(f"exit 0, and other bytes in {other}")
        if done.code == 1:
            said = done.lines[0] if len(done.lines) == 1 else ""
            if not said:
                found.append(f"{len(done.lines)} lines\n{done.errors}")
            elif str(self.place) not in said or not any(word in said for word in (WORDS.get(error, ""), UNNAMED)):
                found.append(f"the line names no file or another reason: {said}")
        return found

    def _again(self, row: Row, left: dict[str, str]) -> list[str]:
        """What is wrong with a start without faults in what is left."""
        state = bytes_hash(json.dumps([left, _ends_torn(self.place)]).encode())
        if state not in self._known:
            row.again += 1
            done = self.stages.run(self.step.words, self.place)
            found = contents(self.place)
            other = sorted(name for name in found | self._expected if found.get(name) != self._expected.get(name))
            problem = f"exit code {done.code}\n{done.errors}" if done.code else f"other bytes in {other}"
            self._known[state] = [f"the start after it: {problem}"] if done.code or other else []
        return self._known[state]


def chosen(calls: Sequence[str], most: int) -> list[int]:
    """Numbers of calls, from 1: all, or about `most`, evenly spread, with three that write for each that reads."""
    reads = [number for number, kind in enumerate(calls, 1) if kind in READS]
    writes = [number for number, kind in enumerate(calls, 1) if kind not in READS]
    few = max(most // 4, most - len(writes))
    return sorted([*_spread(reads, few), *_spread(writes, most - min(few, len(reads)))])


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    return [numbers[i * len(numbers) // most] for i in range(most)] if len(numbers) > most else [*numbers]


def table(trials: Iterable[tuple[str, Trial]]) -> str:
    """Of all trials: stage and kind of call → what came of it."""
    head = ("stage", "call", "calls", "failed", "one line", "note", "ended well", "started again")
    rows = [
        (f"{kind}: {trial.step.name}", call, row.calls, row.failed, row.lines, row.notes, row.well, row.again)
        for kind, trial in trials for call, row in sorted(trial.rows.items())
    ]  # fmt: skip
    total = ("all", "", *(sum(int(row[i]) for row in rows) for i in range(2, len(head))))
    return "\n".join(f"{a:34}{b:16}" + "".join(f"{x!s:>14}" for x in rest) for a, b, *rest in (head, *rows, total))


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, but of those of OTHERS and without what is of MEASURED."""
    return {
        str(path.relative_to(folder)): bytes_hash(_of_results(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not OTHERS.keys() & {*path.relative_to(folder).parts}
    }


def _of_results(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".json":
        return data
    try:
        return json.dumps(_without_times(json.loads(data))).encode()
    except ValueError:
        return data


def _without_times(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_times(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {name: _without_times(item) for name, item in tree.items() if name not in MEASURED}


def _ends_torn(folder: Path) -> list[bool]:
    return [not path.read_bytes().endswith(b"\n") for path in sorted(folder.rglob("metrics.jsonl"))]


def put_back(source: Path, folder: Path) -> None:
    """Make `folder` what `source` is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, symlinks=True)
