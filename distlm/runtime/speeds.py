"""How long stages took on this machine against what their plans said, kept in a file, so that later plans are right.

A plan counts work and divides it by a rate that is measured in a blink or known from benchmarks. What a stage then
really takes depends on memory, caches and libraries as well, and by about the same factor the next time. The file is
DISTLM_SPEEDS, or ~/.cache/distlm/speeds.json; DISTLM_SPEEDS= (empty) keeps none.
"""

import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.files import cache_place
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.records import Speed, SpeedsFile

VARIABLE = "DISTLM_SPEEDS"
LEAST_S = 3.0
"""Work that takes less says little of more."""
_MORE = 3.0
"""A start that did so many times less than an earlier one does not count instead of it."""
_MOST = 200
"""Stages that are remembered; older ones are forgotten."""


@dataclass(frozen=True)
class SpeedKey:
    """The work that a speed was measured on; the machine is recorded beside it."""

    stage: str
    """Its verb."""
    kind: str
    """model.kind."""
    settings: str
    """Hash of the settings that decide its speed."""
    ranks: int


def remember(of: SpeedKey, planned_s: float, worked_s: float, start_s: float, flops: float) -> None:
    """Keep how long a stage took from its beginning to its end. Where the file cannot be written, nothing is kept.

    planned_s: time in the stage's plan, before it is corrected. start_s: time besides the work. flops: speed of the
    machine that the plan was made with; later plans take the same.
    """
    path = _path()
    if path is None or worked_s < LEAST_S or planned_s <= 0:
        return
    speed = Speed(
        of.stage, machine(), of.kind, of.settings, of.ranks, round(planned_s, 3), round(worked_s, 3),
        round(max(start_s, 0.0), 3), round(time.time()),
    )  # fmt: skip
    kept = _read(path)
    before = [one for one in kept.stages if _place(one) == _place(speed)]
    if any(one.planned_s > _MORE * planned_s for one in before):
        return
    stages = [*(one for one in kept.stages if one not in before), speed][-_MOST:]
    try:
        SpeedsFile(stages=stages, flops={machine(): flops, **kept.flops}).write(path)
    except DistlmError:
        return


def kept_flops() -> float | None:
    """FLOP/s that this machine's earlier plans counted with: what is measured in a blink is another number each time,
    and the speeds that are kept belong to this one."""
    path = _path()
    return _read(path).flops.get(machine()) if path is not None else None


def measured(of: SpeedKey) -> bool:
    """Whether a stage of just these settings and ranks has been timed on this machine."""
    path = _path()
    place = of.stage, machine(), of.kind, of.settings, of.ranks
    return path is not None and any(_place(one) == place for one in _read(path).stages)


def corrected(of: SpeedKey, planned_s: float) -> tuple[float, str]:
    """How long the stage will take in seconds, its start included, judged by earlier runs; and, for people, by which.

    The same settings count most, then the same number of ranks, then the newest.
    """
    path = _path()
    known = _read(path).stages if path else []
    alike = [
        one for one in known
        if (one.stage, one.machine, one.kind) == (of.stage, machine(), of.kind)
    ]  # fmt: skip
    if not alike:
        # The processes of another stage take about as long to start.
        starts = [one.start_s for one in known if (one.machine, one.kind) == (machine(), of.kind)]
        return planned_s + min(starts, default=0.0), ""
    best = max(alike, key=lambda one: (one.settings == of.settings, one.ranks == of.ranks, one.at))
    whose = "these settings" if best.settings == of.settings else "a run with other settings"
    seconds = best.start_s + planned_s * best.worked_s / best.planned_s
    return seconds, f"time as {whose} on {best.ranks} ranks took here before"


@cache
def machine() -> str:
    """The machine that a speed was measured on: processor, cores of this process, GPU."""
    return f"{_processor()}, {usable_cores()} cores{_gpu()}"


def processor_flags(cpuinfo: Path) -> set[str]:
    """What instructions the processor has, by /proc/cpuinfo; none where the system does not list them."""
    return {*(_of_processor(cpuinfo, "flags") or "").split()}


def _processor() -> str:
    return _of_processor(Path("/proc/cpuinfo"), "model name") or platform.machine()


def _of_processor(cpuinfo: Path, name: str) -> str | None:
    try:
        lines = cpuinfo.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _gpu() -> str:
    # Asked of the driver's files: a plan does not load torch for it.
    cards = (
        sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        if Path("/proc/driver/nvidia/gpus").is_dir()
        else []
    )
    try:
        names = [line.partition(":")[2].strip() for card in cards for line in card.read_text("utf-8").splitlines()
                 if line.startswith("Model")]  # fmt: skip
    except OSError:
        names = []
    return f", {len(names)} x {names[0]}" if names else ""


def _path() -> Path | None:
    return cache_place(VARIABLE, "speeds.json")


def _read(path: Path) -> SpeedsFile:
    try:
        return SpeedsFile.read(path)
    except (DistlmError, OSError):
        # Speeds are a convenience: a damaged file is begun anew.
        return SpeedsFile(stages=[], flops={})


def _place(one: Speed) -> tuple[str, str, str, str, int]:
    return one.stage, one.machine, one.kind, one.settings, one.ranks
