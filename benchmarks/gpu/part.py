"""A part of the check, where it runs, what it gives, and what is kept of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Device = Literal["gpu", "sim", "cpu"]
"""gpu: the accelerator that torch sees; sim: the tests' simulated device; cpu: the processor in the device's place."""
Figure = float | str | bool | None
Verdict = Literal["ok", "goal missed", "failed", "over time", "skipped"]
BAD: tuple[Verdict, ...] = ("failed", "over time")
"""Verdicts that make the whole check fail. A goal is one of speed: it is reported with the distance."""


@dataclass(frozen=True)
class Part:
    """One check, which runs in a process of its own."""

    name: str
    what: str
    """What it shows, in one line."""
    limit_s: int
    """Seconds after which it is ended, the start of its process included; for a GPU."""
    run: str = ""
    """module:function, called with a Place; empty: gpu.checks.NAME:run."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    speed: bool = False
    """It only measures speed, which a simulated device and a processor do not show."""

    @property
    def function(self) -> str:
        """module:function."""
        return self.run or f"gpu.checks.{self.name}:run"


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    device: Device
    folder: Path
    """Of its own, empty."""
    quick: bool = False
    """Measure speed at the smallest sizes, on any device: that shows that it runs, and gives no figures."""

    @property
    def is_gpu(self) -> bool:
        """Whether speed means anything here."""
        return self.device == "gpu"

    @property
    def measures(self) -> bool:
        """Whether speed is to be measured."""
        return self.is_gpu or self.quick


@dataclass
class Outcome:
    """What a part gives."""

    figures: dict[str, Figure] = field(default_factory=dict)
    """Names with their unit → what was measured."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it must be."""
    missed: list[str] = field(default_factory=list)
    """Goals of speed that were not reached, with the distance."""
    skipped: str = ""
    """Why it could not run here, where only the part itself can tell."""

    def must(self, holds: bool, text: str) -> None:
        """Note `text` as wrong unless it `holds`."""
        if not holds:
            self.wrong.append(text)

    def goal(self, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
        """Keep a figure that has a goal, on a GPU."""
        self.figures[name] = round(value, 3)
        if least is not None and value < least:
            self.missed.append(f"{name} is {value:.3g}, the goal is {least:g} or more")
        if most is not None and value > most:
            self.missed.append(f"{name} is {value:.3g}, the goal is {most:g} or less")


@dataclass(frozen=True)
class Record:
    """What the JSON has of a part."""

    part: str
    verdict: Verdict
    seconds: float
    """Of its process, start included."""
    limit_s: float
    """When it would have been ended."""
    figures: dict[str, Figure] = field(default_factory=dict)
    why: str = ""
    """What was wrong, which goal was missed, what is missing."""
