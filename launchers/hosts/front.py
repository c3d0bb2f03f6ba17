"""The front of a deepspeed start: runs the launcher, watches its ranks through files, and decides how it ended.

Why files and not signals: a signal to `deepspeed` reaches its ranks late, one after another, or never (pdsh and ssh
carry none), and its exit code is not theirs. So each rank's own keeper (rank.py) looks for the front's order twice a
second and signals its rank itself: all of them within a second, on every node, under every launcher. One would do,
since the runtime agrees over the ranks on a stop. A front that is killed falls silent, and the keepers then stop.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from msgspec import UNSET, UnsetType

from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError
from distlm.runtime.alive import VISIBLE_AFTER_S
from distlm.runtime.progress import say
from distlm.runtime.ranks.said import cause_in
from distlm.runtime.stop import earlier, on_stop_signals
from launchers.hosts.rank import POLL_S, rank_file
from launchers.records import FrontOrder, RankReport

_LAST_WORDS_S = 5.0
"""A rank writes its exit code down before it ends, so soon after its launcher's end this can be read."""
_IN_ORDER = (EXIT_DONE, EXIT_STOPPED)


class Front:
    """One start: `run` returns the exit code of the command."""

    def __init__(
        self, folder: Path, hosts: Mapping[int, str], via: str, lost_after_s: float, start_within_s: float,
        stop_within_s: float, queued: bool = False,
    ) -> None:  # fmt: skip
        """`hosts`: rank → host, of the ranks that this front starts.

        `queued`: the launcher itself waits in a queue first, so the time to start counts from the first rank on.
        """
        self.queued = queued
        self.folder, self.hosts, self.via = folder, hosts, via
        self.lost_after_s, self.start_within_s, self.stop_within_s = lost_after_s, start_within_s, stop_within_s
        self._order, self._beats = "run", 0
        self._asked = 0
        self._deadline, self._why = float("inf"), ""
        self._limits: set[str] = set()
        self._known: dict[int, RankReport] = {}
        self._ends: list[int] = []
        """Ranks that have ended, in the order in which it was seen."""
        self._gone = 0.0
        self._beat_of: dict[int, tuple[object, float]] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, finished: Callable[[], bool]) -> int:
        """Start the launcher and wait for its ranks; 0 done, 75 stopped.

        Done means `finished()`: the launcher's own exit code is not believed. Raises DistlmError for any other end.
        """
        self._write()
        for rank in self.hosts:
            # Made before the ranks start, so that no file system remembers that they were missing.
            rank_file(self.folder, rank, "json").write_text("{}", "utf-8")
        beat = threading.Thread(target=self._beat, name="distlm-front", daemon=True)
        beat.start()
        with on_stop_signals(self._signalled):
            if (name := earlier()) is not None:
                self._asked = signal.Signals[name]
            # A session of its own: Ctrl-C then reaches only this process, which stops the ranks in order.
            launcher = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                self._watch(launcher)
            finally:
                self._end(launcher)
                self._ended.set()
                beat.join()
        return self._verdict(launcher.returncode, finished)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        # Only recorded here. Slurm repeats its signals; a second Ctrl-C is a person who does not want to wait.
        if number == signal.SIGINT and self._asked:
            self._deadline, self._why = 0.0, "interrupted twice"
        self._asked = self._asked or number

    def _watch(self, launcher: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            if self._asked and self._order == "run":
                name = signal.Signals(self._asked).name
                say(f"{name}: asking all ranks to stop after this step; Ctrl-C once more to end at once")
                self._give("stop")
                self._limit(self.stop_within_s, f"the ranks did not stop within {self.stop_within_s:g} s of {name}")
            records = self._records()
            missing = [rank for rank in self.hosts if rank not in records]
            if self.queued and len(missing) == len(self.hosts):
                began = now
            codes = self._codes(records)
            silent = self._silent(records, now)
            if len(codes) + len(silent) == len(self.hosts):
                if launcher.poll() is not None:
                    return
                self._limit(5 if silent else 30, "the launcher did not end although its ranks have")
            elif missing and now - began > self.start_within_s:
                self._limit(0, f"{self._names(missing)} did not start within {self.start_within_s:g} s")
            if failed := [rank for rank, code in codes.items() if code not in _IN_ORDER] + silent:
                # The ranks themselves notice a lost one; this is for those that cannot.
                first = f"after {self._names(failed[:1])} failed the others did not end"
                self._limit(self.lost_after_s + 30, first)
            if launcher.poll() is not None and missing:
                # What has not begun never will.
                self._limit(VISIBLE_AFTER_S if launcher.returncode == 0 else 2, f"{self._names(missing)} never started")
            elif launcher.poll() is not None and self._order == "run":
                self._gone = self._gone or now
                # Ranks end just before the launcher: wait for their last words before taking them for orphans.
                if now - self._gone > _LAST_WORDS_S:
                    say(f"the launcher ended (exit code {launcher.returncode}) before its ranks; stopping them")
                    self._give("stop")
                    self._limit(self.stop_within_s, "the ranks did not stop after their launcher had ended")
            if now > self._deadline:
                return
            time.sleep(POLL_S)

    def _silent(self, records: Mapping[int, RankReport], now: float) -> list[int]:
        """Ranks whose keepers have stopped to beat without a word: their node is down, or both were killed."""
        silent = []
        for rank, record in records.items():
            if record.code is not UNSET:
                continue
            beat, since = self._beat_of.get(rank, (None, now))
            self._beat_of[rank] = (record.beat, since if record.beat == beat else now)
            if now - self._beat_of[rank][1] > self.lost_after_s:
                silent.append(rank)
        return silent

    def _end(self, launcher: subprocess.Popen[bytes]) -> None:
        """Leave nothing behind: ranks that still run are killed by their keepers, then the launcher's processes."""
        if launcher.poll() is not None and len(self._codes(self._records())) == len(self.hosts):
            return
        if self._why:
            say(f"{self._why}; ending all of them")
        self._give("kill")
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            records = self._records()
            if launcher.poll() is not None and len(self._codes(records)) == len(records):
                return
            time.sleep(POLL_S)
        # Asked to end, deepspeed's pdsh runner kills every deepspeed start of this user on those nodes (pkill -f).
        for number in (signal.SIGKILL,) if self.via == "pdsh" else (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(launcher.pid, number)
                launcher.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        launcher.wait()

    def _verdict(self, code: int, finished: Callable[[], bool]) -> int:
        records = self._records()
        codes = self._codes(records)
        clean = bool(codes) and all(value == EXIT_DONE for value in codes.values())
        deadline = time.monotonic() + (VISIBLE_AFTER_S if clean else 0)
        while not (done := finished()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if done:
            if code != 0 or not clean:
                say(f"note: the launcher ended with {code}, but the training is complete (its marker is written)")
            return EXIT_DONE
        # In the order in which this process saw them end: the clocks of nodes may differ.
        failed = [rank for rank in self._ends if codes.get(rank, EXIT_DONE) not in _IN_ORDER]
        first = failed[0] if failed else -1
        why = f"{self._names([first])} ended with exit code {codes[first]}" if failed else ""
        lost = [rank for rank in self.hosts if rank not in codes]
        if lost and not failed:
            why = f"{self._names(lost)} did not say how they ended (node down?)"
        if EXIT_STOPPED in codes.values():
            # Agreed over all ranks, or said by those that a dead rank left: in both cases what is complete is kept.
            say(f"{why or 'stopped'}; run the same command again to continue")
            return EXIT_STOPPED
        if failed:
            # A rank that says why comes before one that was seen earlier: several may have ended in one look.
            logs = {rank_file(self.folder, rank, "log"): rank for rank in failed}
            log, error = cause_in(logs)
            if log is not None:
                why = f"{self._names([logs[log]])} ended with exit code {codes[logs[log]]}: {error}"
            log = log or rank_file(self.folder, first, "log")
            raise DistlmError(f"{why}; {len(failed)} of {len(self.hosts)} ranks failed; its output: {log}")
        if lost:
            raise DistlmError(
                f"{self._why or why} (the launcher: exit code {code}); see its output above, and {self.folder}"
            )
        raise DistlmError(
            f"the launcher ended with exit code {code} and all ranks with 0, but there is no final checkpoint; "
            f"logs: {self.folder}"
        )

    def _records(self) -> dict[int, RankReport]:
        """Of the ranks that have begun, in their order."""
        for rank in self.hosts:
            # Nothing can be read while it is being rewritten: what it said before still holds.
            if (report := RankReport.peek(rank_file(self.folder, rank, "json"))) is not None:
                self._known[rank] = report
                if report.code is not UNSET and rank not in self._ends:
                    self._ends.append(rank)
        return {rank: self._known[rank] for rank in self.hosts if rank in self._known}

    @staticmethod
    def _codes(records: Mapping[int, RankReport]) -> dict[int, int]:
        """Rank → exit code, of those that have ended."""
        return {rank: record.code for rank, record in records.items() if not isinstance(record.code, UnsetType)}

    def _names(self, ranks: Sequence[int]) -> str:
        """`rank 2 (node2)`, `ranks 2, 3 (node2)`."""
        nodes = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return f"rank{'s' if len(ranks) > 1 else ''} {shown} ({nodes})"

    def _limit(self, seconds: float, why: str) -> None:
        """End everything that far from now, for this reason, unless an earlier end is set. The first call counts."""
        if why not in self._limits and time.monotonic() + seconds < self._deadline:
            self._deadline, self._why = time.monotonic() + seconds, why
        self._limits.add(why)

    def _give(self, order: str) -> None:
        with self._lock:
            self._order = order
            self._write_or_say()

    def _write(self) -> None:
        self._beats += 1
        order = FrontOrder(beat=self._beats, order=self._order)
        (self.folder / "order.json").write_text(order.line(), "utf-8")

    def _beat(self) -> None:
        while not self._ended.wait(min(5.0, self.lost_after_s / 6)):
            with self._lock:
                self._write_or_say()

    def _write_or_say(self) -> None:
        try:
            self._write()
        except OSError as error:
            # A hiccup of the file system, and the next beat has the same order; a lasting one is noticed by the ranks.
            print(f"{self.folder}: {error}", file=sys.stderr)
