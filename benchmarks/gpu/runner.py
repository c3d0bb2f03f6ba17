"""Parts in processes of their own, one after the other, each with its limit; the JSON is whole after each."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shared.command import note
from shared.process import end_group

from gpu.part import Device, Outcome, Part, Place, Record, Verdict

LEAST_S = 5
"""With fewer seconds left no part is begun."""
SLOWER = 10
"""Limits of the simulated device and of the processor, in those of a GPU."""
RESULT = "outcome.json"
NO_SPEED = "needs a GPU: only speed is measured"


def missing(needs: Sequence[str]) -> str:
    """What is not installed, as a reason; empty where all is."""
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def run_parts(
    parts: Sequence[Part], device: Device, environment: Mapping[str, str], log: Path, budget_s: float, quick: bool
) -> Iterator[Record]:
    """A record after each part. What parts print goes to `log`; quick: see Place."""
    slower = 1 if device == "gpu" else SLOWER
    began, whole = time.monotonic(), budget_s * slower
    for number, part in enumerate(parts, 1):
        left = whole - (time.monotonic() - began)
        limit = min(part.limit_s * slower, left)
        note(
            f"{number}/{len(parts)} {part.name}: {part.what} ({max(0, limit):.0f} s at most, {max(0, left):.0f} s left)"
        )
        reason = missing(part.needs)
        if part.speed and device != "gpu" and not quick:
            reason = NO_SPEED
        elif not reason and limit < LEAST_S:
            reason = f"no time was left: all parts together have {whole:.0f} s"
        record = Record(part.name, "skipped", 0.0, part.limit_s * slower, why=reason)
        if not reason:
            record = run_part(part, device, environment, log, limit, quick)
        note(f"  {record.verdict} after {record.seconds:.0f} s{': ' if record.why else ''}{record.why}")
        yield record


def run_part(
    part: Part, device: Device, environment: Mapping[str, str], log: Path, limit_s: float, quick: bool = False
) -> Record:
    """One part in a process of its own, which is ended with all that it started after limit_s seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distlm-gpu-check-") as name, log.open("ab") as stream:
        stream.write(f"\n== {part.name}\n".encode())
        stream.flush()
        command = [sys.executable, "-m", "gpu.runner", part.function, device, name, *(["quick"] if quick else [])]
        child = subprocess.Popen(
            command, env=dict(environment), cwd=name, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What it started may outlive it: they are one group.
            end_group(child)
        seconds = round(time.monotonic() - began, 1)
        if code is None:
            return Record(part.name, "over time", seconds, limit_s, why=f"ended after {limit_s:.0f} s")
        result = Path(name) / RESULT
        if code or not result.is_file():
            return Record(part.name, "failed", seconds, limit_s, why=f"exit {code}: {_reason(log)}")
        return record_of(part, Outcome(**json.loads(result.read_text("utf-8"))), seconds, limit_s, quick)


def record_of(part: Part, outcome: Outcome, seconds: float, limit_s: float, quick: bool = False) -> Record:
    """The verdict on what a part gave; the smallest sizes reach no goals."""
    missed = [] if quick else outcome.missed
    verdict: Verdict = "ok"
    if outcome.wrong:
        verdict = "failed"
    elif outcome.skipped:
        verdict = "skipped"
    elif missed:
        verdict = "goal missed"
    why = "; ".join([*outcome.wrong, *filter(None, [outcome.skipped]), *missed])
    return Record(part.name, verdict, seconds, limit_s, outcome.figures, why)


def _reason(log: Path) -> str:
    """The last part's last line that begins with the name of an error; else its last line."""
    said = log.read_text("utf-8", "replace").rpartition("\n== ")[2]
    lines = [line for line in said.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|NoDevice)\b", line)]
    return [*lines, *errors][-1][:300] if lines else "it printed nothing"


def main() -> None:
    """`python -m gpu.runner MODULE:FUNCTION DEVICE FOLDER [quick]`: one part, in this process."""
    function, device, folder, *quick = sys.argv[1:]
    module, _, name = function.partition(":")
    work = Path(folder) / "work"
    work.mkdir()
    try:
        outcome = getattr(importlib.import_module(module), name)(Place(device, work, bool(quick)))  # type: ignore[arg-type]
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    (Path(folder) / RESULT).write_text(json.dumps(asdict(outcome)), "utf-8")


if __name__ == "__main__":
    main()
