"""How long stages took on this machine against what their plans said, kept in a file, so that later plans are right.

A plan counts work and divides it by a rate that is measured in a blink or known from benchmarks. What a stage then
really takes depends on memory, caches and libraries as well, and by about the same factor the next time. The file is
DISTLM_SPEEDS, or ~/.cache/distlm/speeds.json; DISTLM_SPEEDS= (empty) keeps none.
"""

import os
import platform
import time
from functools import cache
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.records import Speed, SpeedsFile

VARIABLE = "DISTLM_SPEEDS"
START_S = 4.0
"""Seconds until a stage works: Python and its libraries are loaded, ranks join."""
LEAST_S = 10.0
"""A stage that takes less says little of a longer one."""
_MOST = 200
"""Stages that are remembered; older ones are forgotten."""


def remember(stage: str, kind: str, settings: str, ranks: int, planned_s: float, took_s: float) -> None:
    """Keep how long a stage took from its beginning to its end; a file that cannot be written is none.

    `kind`: of model. `settings`: hash of the settings that decide its speed. planned_s: as the stage's plan has it
    before it is corrected.
    """
    path = _path()
    if path is None or took_s < LEAST_S or planned_s <= 0:
        return
    found = [one for one in _read(path) if _place(one) != (stage, machine(), kind, settings, ranks)]
    speed = Speed(stage, machine(), kind, settings, ranks, round(planned_s, 3), round(took_s, 3), round(time.time()))
    try:
        SpeedsFile(stages=[*found, speed][-_MOST:]).write(path)
    except OSError:
        return


def corrected(stage: str, kind: str, settings: str, ranks: int, planned_s: float) -> tuple[float, str]:
    """Seconds that the stage will take, its start included, by what it took before; and what they rest on, for people.

    The same settings count most, then the same number of ranks, then the newest.
    """
    path = _path()
    alike = [
        one for one in (_read(path) if path else []) if (one.stage, one.machine, one.kind) == (stage, machine(), kind)
    ]
    if not alike:
        return planned_s, ""
    best = max(alike, key=lambda one: (one.settings == settings, one.ranks == ranks, one.at))
    of = "these settings" if best.settings == settings else "a run with other settings"
    factor = max(best.took_s - START_S, 1.0) / best.planned_s
    return START_S + planned_s * factor, f"time as {of} on {best.ranks} ranks took here before"


@cache
def machine() -> str:
    """What a speed is of: processor, cores of this process, GPU."""
    return f"{_processor()}, {usable_cores()} cores{_gpu()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


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
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # No home on this node.
        return None
    return home / "distlm" / "speeds.json"


def _read(path: Path) -> list[Speed]:
    try:
        return SpeedsFile.read(path).stages
    except (DistlmError, OSError):
        # Speeds are a convenience: a damaged file is begun anew.
        return []


def _place(one: Speed) -> tuple[str, str, str, str, int]:
    return one.stage, one.machine, one.kind, one.settings, one.ranks
