"""What a stage does when one of its calls fails, and when it is started again: compared with an undisturbed start."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from distlm.runtime.files import bytes_hash
from support.failing import Outcome, Stages
from support.failing.chains import Step

OTHERS = {
    "metrics.jsonl": "times of what was measured, also of the start that failed",
    "report.html": "the time when it was made, and plots of those metrics",
    "*.lock": "who had it last",
    "*.lock.[0-9]*": "likewise, where its removal failed: the next owner removes it",
    ".alive": "signs of life of ranks of a start that failed; a later one removes them after a day",
}
"""Files and folders that differ from an undisturbed run's, and why."""
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


@dataclass(frozen=True)
class Fault:
    """A start of a stage in which one call failed."""

    stage: str
    number: int
    """Of the call, from 1."""
    kind: str
    """Of the call; empty where the start made fewer calls than the undisturbed one."""
    ended: str
    """line: with one line and exit code 1; note: well, with a note that metrics could not be written; well."""
    again: bool
    """A start without faults came after it; the same state left behind is started from once."""
    problems: list[str]
    other: bool = False
    """Another call, or of another file, than the undisturbed start's of that number: threads take turns."""


class Kept:
    """Faults in a file, a line each, so that a sweep of hours can be stopped and goes on; and what came of the states
    that were left behind. Of one commit: the caller gives a folder for each."""

    def __init__(self, folder: Path, name: str) -> None:
        """Reads FOLDER/NAME*.jsonl, whoever wrote them; adds to the one of this process."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._path = folder / f"{name}-{os.getpid()}.jsonl"
        self.faults: dict[tuple[str, int], Fault] = {}
        self.states: dict[str, list[str]] = {}
        """Of a stage and what it left behind → what was wrong with the next start."""
        self.read()

    def read(self) -> None:
        """What all processes have kept by now."""
        for path in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                try:
                    found = json.loads(line)
                except ValueError:
                    # Torn where a process was killed.
                    continue
                if "state" in found:
                    self.states[found["state"]] = found["problems"]
                else:
                    fault = Fault(**found)
                    self.faults[fault.stage, fault.number] = fault

    def of(self, stage: str) -> list[Fault]:
        """Those of a stage, also beyond the calls that its undisturbed start makes this time."""
        return [fault for (name, _), fault in sorted(self.faults.items()) if name == stage]

    def add(self, fault: Fault) -> None:
        """Keep one more."""
        self.faults[fault.stage, fault.number] = fault
        self._write(asdict(fault))

    def add_state(self, state: str, problems: list[str]) -> None:
        """Keep what came of a start in that state."""
        self.states[state] = problems
        self._write({"state": state, "problems": problems})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            # A torn line of a process that had this number before ends here.
            stream.write("\n" + json.dumps(line) + "\n")


@dataclass
class Trial:
    """One stage. `place`: the folder in which calls fail; `before`: what it has before the stage."""

    stages: Stages
    step: Step
    place: Path
    before: Path
    kept: Kept | None = None
    faults: list[Fault] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Kind of each, in order."""

    def undisturbed(self) -> None:
        """The start that the others are compared with; its result stays in `place`."""
        put_back(self.before, self.place)
        done = self.stages.run(self.step.words, self.place, at=0)
        assert done.code == 0, f"{self.step.name}: {done.errors}"
        self._begun, self._expected = contents(self.before), contents(self.place)
        self._known: dict[str, list[str]] = self.kept.states if self.kept else {}
        self._whole = [(kind, path) for kind, _, path in done.calls]
        self.calls = [kind for kind, _ in self._whole]

    @property
    def problems(self) -> list[str]:
        """What went wrong in any of the starts."""
        return [problem for fault in self.faults for problem in fault.problems]

    def fail(self, number: int, stays: bool = False) -> Fault:
        """A start whose call of that number fails, and one without faults after it."""
        put_back(self.before, self.place)
        # The errors of a kind take turns within a stage; other stages begin with another one.
        done = self.stages.run(self.step.words, self.place, number, stays, turn=len(self.step.name))
        left = contents(self.place)
        if not done.calls:
            unreached = f"{self.step.name}, call {number}, which it did not reach"
            wrong = [f"exit code {done.code}\n{done.errors}"] if done.code else self._look(done, "", left)
            return self._came(Fault(self.step.name, number, "", "", False, [f"{unreached}: {what}" for what in wrong]))
        kind, error, path = done.calls[0]
        found, again = self._look(done, error, left), False
        noted = "metrics" in done.errors and any(word in done.errors for word in WORDS.values())
        if left != self._expected:
            more, again = self._again(left)
            found += more
        lasting = ", and stays so" if stays else ""
        where = f"{self.step.name}, call {number}: {kind} of {path} fails with {error}{lasting}"
        ended = "line" if done.code == 1 else "note" if noted else "well"
        problems = [f"{where}: {problem}" for problem in found]
        # Names of temporary files have the process in them.
        same = [(kind, _without_process(str(path))) for kind, path in (*self._whole[number - 1 : number], (kind, path))]
        return self._came(Fault(self.step.name, number, kind, ended, again, problems, same[0] != same[-1]))

    def _came(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

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

    def _again(self, left: dict[str, str]) -> tuple[list[str], bool]:
        """What is wrong with a start without faults in what is left, and whether it was made just now."""
        files = {_without_process(name): digest for name, digest in left.items()}
        state = bytes_hash(json.dumps([self.step.name, files, _ends_torn(self.place)]).encode())
        new = state not in self._known
        if new:
            done = self.stages.run(self.step.words, self.place)
            found = contents(self.place)
            other = sorted(name for name in found | self._expected if found.get(name) != self._expected.get(name))
            problem = f"exit code {done.code}\n{done.errors}" if done.code else f"other bytes in {other}"
            self._known[state] = [f"the start after it: {problem}"] if done.code or other else []
            if self.kept:
                self.kept.add_state(state, self._known[state])
        return self._known[state], new


def chosen(calls: Sequence[str], most: int) -> list[int]:
    """Numbers of calls, from 1: all, or about `most`, evenly spread, with three that write for each that reads."""
    reads = [number for number, kind in enumerate(calls, 1) if kind in READS]
    writes = [number for number, kind in enumerate(calls, 1) if kind not in READS]
    few = max(most // 4, most - len(writes))
    return sorted([*_spread(reads, few), *_spread(writes, most - min(few, len(reads)))])


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    return [numbers[i * len(numbers) // most] for i in range(most)] if len(numbers) > most else [*numbers]


def table(trials: Sequence[tuple[str, Trial]]) -> str:
    """Of all trials: stage and kind of call → what came of it."""
    head = ("stage", "call", "calls", "failed", "one line", "note", "ended well", "started again")
    rows = []
    for chain, trial in trials:
        of_kind = Counter(trial.calls)
        for call in sorted({*of_kind, *(fault.kind for fault in trial.faults if fault.kind)}):
            some = [fault for fault in trial.faults if fault.kind == call]
            ended = Counter(fault.ended for fault in some)
            rows.append((f"{chain}: {trial.step.name}", call, of_kind[call], len(some), ended["line"], ended["note"],
                         ended["well"], sum(fault.again for fault in some)))  # fmt: skip
    total = ("all", "", *(sum(int(row[i]) for row in rows) for i in range(2, len(head))))
    lines = [f"{a:34}{b:16}" + "".join(f"{x!s:>14}" for x in rest) for a, b, *rest in (head, *rows, total)]
    faults = [fault for _, trial in trials for fault in trial.faults]
    others, unreached = sum(fault.other for fault in faults), sum(not fault.kind for fault in faults)
    return "\n".join(
        [*lines, f"{others} were other calls than the undisturbed start's of that number; {unreached} were not reached"]
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, but of those of OTHERS and without what is of MEASURED."""
    return {
        str(path.relative_to(folder)): bytes_hash(_of_results(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_other(path.relative_to(folder))
    }


def _is_other(path: Path) -> bool:
    return any(fnmatchcase(part, pattern) for part in path.parts for pattern in OTHERS)


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


def _without_process(name: str) -> str:
    return re.sub(r"(\.[^./]+)?\.\d+\.(tmp|removed)(?=/|$)", r".\2", name)


def _ends_torn(folder: Path) -> list[bool]:
    return [not path.read_bytes().endswith(b"\n") for path in sorted(folder.rglob("metrics.jsonl"))]


def put_back(source: Path, folder: Path) -> None:
    """Make `folder` what `source` is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, symlinks=True)
