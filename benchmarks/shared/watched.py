"""A command of distlm's, the memory of its ranks while it runs, and the kill of one of them."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from distlm.config.schema import RunConfig
from distlm.pipeline import stage_environment

LOOK_S = 1.0
"""Seconds between two looks, which read every process of the machine: more of them would be work beside the ranks'."""


@dataclass
class Ran:
    """One start of a stage."""

    code: int
    seconds: float
    resident: dict[int, int] = field(default_factory=dict)
    """Process of a rank → its largest resident set, in bytes."""
    own: dict[int, int] = field(default_factory=dict)
    """The same without pages of files, which the kernel takes back when it needs them; as it was at the looks."""
    noticed_s: float = 0.0
    """From the kill to the end of all."""
    killed: bool = False
    """Before it was over."""


def watched(
    command: Sequence[str], config: RunConfig, log: Path, kill_after: float = 0.0, order: random.Random | None = None
) -> Ran:
    """Run a stage's command, look at its ranks, and kill one of them after so many seconds (0: none)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with stage_environment(config) as environment, log.open("ab") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        ran, killed_at = Ran(0, 0.0), 0.0
        while process.poll() is None:
            ranks = ranks_of(process.pid)
            for rank in ranks:
                look(rank, ran)
            left = kill_after - (time.perf_counter() - began) if kill_after and order and not killed_at else LOOK_S
            if left <= 0 and ranks and order:
                with contextlib.suppress(psutil.NoSuchProcess):
                    order.choice(ranks).send_signal(signal.SIGKILL)
                    killed_at = time.perf_counter()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(LOOK_S, max(left, 0.05)))
        ended = time.perf_counter()
    ran.code, ran.seconds = process.returncode, ended - began
    # One that was over when the kill came has not been disturbed.
    if killed_at and process.returncode:
        ran.killed, ran.noticed_s = True, ended - killed_at
    return ran


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes of `python -m distlm` below a launcher, or itself; none that one of them has forked."""
    found: list[psutil.Process] = []
    try:
        every = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for process in every:
        try:
            words, parent = process.cmdline(), process.ppid()
        except psutil.Error:
            continue
        if words[1:3] == ["-m", "distlm"] and parent not in {one.pid for one in found}:
            found.append(process)
    return found


def look(rank: psutil.Process, ran: Ran) -> None:
    """Keep the peak of a rank's memory."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text("utf-8")
    except OSError:
        return
    # A process that has ended and was not waited for has no memory.
    sizes = {name: int(of.split()[0]) * 1024 for name, _, of in (line.partition(":") for line in status.splitlines())
             if name in ("VmHWM", "RssAnon", "RssShmem")}  # fmt: skip
    if "VmHWM" in sizes:
        own = sizes["RssAnon"] + sizes["RssShmem"]
        ran.resident[rank.pid] = max(ran.resident.get(rank.pid, 0), sizes["VmHWM"])
        ran.own[rank.pid] = max(ran.own.get(rank.pid, 0), own)
