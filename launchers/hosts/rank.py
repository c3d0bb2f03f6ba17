"""One rank of `launchers.deepspeed`, as a launcher starts it: `python rank.py FOLDER`.

Between the launcher and `distlm train`, because launchers carry no environment, signal or exit code faithfully: this
process gives the rank the environment of the front, its own log and its signals, and writes down how it ended. What
the two tell each other goes through files in FOLDER (under the run directory, which all nodes share):

  spec.json          what to run (written by the front, once)
  order.json         the front's beat and its word to the ranks: run, stop or kill
  rank-NNNNN.json    this rank's node and process, its beat, and its exit code when it has ended
  rank-NNNNN.log     what it wrote

Files are rewritten in place and opened anew for each look: that is when a network file system shows what is new. They
are StartSpec, FrontOrder and RankReport of launchers/records.py, here as plain dicts: this script is started by its
path, on a node that may have another distlm or none, and learns from spec.json where to import anything from.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED = 75
POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


def read(path: Path) -> dict[str, Any] | None:
    """JSON of a file, or None where it is missing or just being written."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


def rank_file(folder: Path, rank: int, suffix: str) -> Path:
    """`rank-00003.json`."""
    return folder / f"rank-{rank:05d}.{suffix}"


def process_start(pid: int) -> str:
    """When a process of this node started, in the kernel's ticks; empty when there is none, or only its zombie."""
    # As in distlm.runtime.alive, which this script cannot import before it knows where the code is. Not the time of day
    # (psutil): that follows the clock, and one step of it would look like the end of the front.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Rank:
    """The rank's process and what the front says about it."""

    def __init__(self, folder: Path, spec: dict[str, Any], rank: int) -> None:
        self.folder, self.spec, self.rank = folder, spec, rank
        self.node = socket.gethostname()
        self.stopping = ""
        front = spec["front"]
        # Only where the front's process can be seen now does its absence later mean anything (containers).
        self._front_here = front["node"] == self.node and process_start(front["pid"]) == front["started"]
        self._beat, self._beat_since = -1, time.monotonic()

    def say(self, text: str) -> None:
        """One line where the launcher shows it, and in the log."""
        line = f"[rank {self.rank} on {self.node}] {text}\n".encode()
        self._log(line)
        _echo(line)

    def write(self, **values: object) -> bool:
        """This rank's record; False where it cannot be written now. The rank must not die of that."""
        about = {"format": 1, "rank": self.rank, "node": self.node, "pid": os.getpid(), "time": time.time(), **values}
        with contextlib.suppress(OSError):
            rank_file(self.folder, self.rank, "json").write_text(json.dumps(about), "utf-8")
            return True
        return False

    def write_end(self, code: int) -> None:
        """How the rank ended; tried for as long as the front waits for a sign of life."""
        deadline = time.monotonic() + self.spec["lost_after_s"]
        while not self.write(code=code) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Handler of the signals that a launcher may send."""
        self.stopping = self.stopping or signal.Signals(number).name

    def order(self) -> str:
        """The front's word now: run, stop or kill. A front that is gone means stop."""
        found = read(self.folder / "order.json")
        now = time.monotonic()
        if found is not None and found["beat"] != self._beat:
            self._beat, self._beat_since = found["beat"], now
        if found is not None and found["order"] != "run":
            return str(found["order"])
        front = self.spec["front"]
        if self._front_here and process_start(front["pid"]) != front["started"]:
            return "the front ended"
        if now - self._beat_since > self.spec["lost_after_s"]:
            return f"no sign of life of the front on {front['node']} for {self.spec['lost_after_s']:g} s"
        return "run"

    def run(self, command: list[str], env: dict[str, str]) -> int:
        """Run the rank to its end; its exit code, 128 + signal where one ended it."""
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self.stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if (order := self.order()) != "run":
            self.say(f"not begun: {order}")
            return STOPPED if order == "stop" else 1
        child = subprocess.Popen(
            command, env=env, cwd=self.spec["cwd"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=_prepare_child,
        )  # fmt: skip
        pump = threading.Thread(target=self._pump, args=(child,), daemon=True)
        pump.start()
        asked_at, beats, next_beat = None, 0, 0.0
        while _wait(child) is None:
            if time.monotonic() > next_beat:
                beats, next_beat = beats + 1, time.monotonic() + min(5.0, self.spec["lost_after_s"] / 6)
                self.write(beat=beats)
            order = self.order()
            if order != "run" and not self.stopping:
                self.stopping = order
                self.say(f"asked to stop ({order})")
            late = asked_at is not None and time.monotonic() - asked_at > self.spec["kill_after_s"]
            if order == "kill" or (late and order != "stop"):
                # With a front that says "stop" it is the front that decides how long a rank may take.
                child.kill()
            elif self.stopping:
                asked_at = asked_at or time.monotonic()
                child.send_signal(signal.SIGUSR1)
        # A process that the rank left behind may hold the pipe open.
        pump.join(5)
        code = child.returncode
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL and not self.stopping else ""
            self.say(f"ended by {signal.Signals(-code).name}{hint}")
            code = 128 - code
        return code

    def _pump(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        # Read to its end whatever becomes of the log: a full pipe would stop the rank.
        while data := os.read(child.stdout.fileno(), 1 << 16):
            self._log(data)
            _echo(data)

    def _log(self, data: bytes) -> None:
        with contextlib.suppress(OSError), rank_file(self.folder, self.rank, "log").open("ab") as log:
            log.write(data)


def _prepare_child() -> None:
    """In the child, before it becomes the rank."""
    # The rank must not outlive this process, whatever kills it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Until the rank listens, a stop would kill it: it is ignored then, and repeated until the rank has ended.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _echo(data: bytes) -> None:
    """To the launcher, as long as it listens: the log has everything."""
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        return


def _environment(spec: dict[str, Any]) -> dict[str, str]:
    """The front's environment over the node's own; what only the launcher knows is not in the front's."""
    env = {**os.environ, **spec["env"]}
    # The very code of the front, whatever is installed on this node.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (spec["code"], spec["env"].get("PYTHONPATH", ""))))
    return env


def main() -> int:
    """Entry point on a node."""
    folder = Path(urllib.parse.unquote(sys.argv[1]))
    node = socket.gethostname()
    spec = read(folder / "spec.json")
    if spec is None:
        print(
            f"[{node}] distlm: {folder / 'spec.json'} cannot be read on {node}: run_dir must be on a file system that "
            "all nodes mount", file=sys.stderr, flush=True,
        )  # fmt: skip
        return 1
    # This file's own folder may come first, where its modules hide others of the same name (deepspeed).
    sys.path[:] = [spec["code"], *(path for path in sys.path if path != str(Path(__file__).parent))]
    from distlm.errors import DistlmError
    from distlm.runtime.ranks.world import resolve_world

    env = _environment(spec)
    try:
        world = resolve_world(env)
    except DistlmError as error:
        print(f"[{node}] distlm: {error}", file=sys.stderr, flush=True)
        return 1
    here = Rank(folder, spec, world.rank)
    here.write()
    here.say(f"world: {world}, {spec['via']}")
    if not Path(spec["cwd"]).is_dir():
        here.say(f"distlm: {spec['cwd']}, where this was started, is not there on {node}: start it in a shared folder")
        code = 1
    else:
        code = here.run([sys.executable, "-m", "distlm", *spec["arguments"]], env)
    here.write_end(code)
    if code == STOPPED:
        # Launchers kill the other ranks of a node as soon as one has not ended with 0: let them end first.
        files = [rank_file(folder, rank, "json") for rank in spec["ranks"]]
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not all("code" in (read(file) or {}) for file in files):
            time.sleep(0.1)
    return code


if __name__ == "__main__":
    sys.exit(main())
