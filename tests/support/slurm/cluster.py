"""The cluster of the tests in tests/slurm, and commands on it."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import ENVIRONMENT, warm
from support.deadline import DEADLINE_S, until

CLUSTER = Path(__file__).parents[2] / "slurm" / "cluster.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")
"""States in which a job stays."""


class Cluster:
    """The nodes: what cluster.sh does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.env = {
            **ENVIRONMENT,
            # What a node runs is a process of that node.
            **warm.COLD,
            "DISTLM_SLURM_DIR": str(folder),
            "SLURM_CONF": str(self.conf),
        }

    def script(self, *words: str) -> str:
        """`cluster.sh WORDS`, its output."""
        done = subprocess.run(
            ["bash", str(CLUSTER), *words], env=self.env, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    @property
    def mode(self) -> str:
        """plain, ns or net (see cluster.sh): only in the last two a node can crash with all its processes."""
        return (self.folder / "chosen").read_text("utf-8").split()[0]

    def resume(self) -> None:
        """Take nodes back that earlier tests left drained or down."""
        for node in self._sinfo("-t", "drain,draining,down", "-o", "%n").split():
            subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], env=self.env, timeout=DEADLINE_S)

    def _sinfo(self, *flags: str) -> str:
        return subprocess.run(
            ["sinfo", "-h", "-p", "main", *flags], env=self.env, capture_output=True, text=True, timeout=DEADLINE_S
        ).stdout

    def running(self) -> bool:
        """Whether slurmctld answers."""
        if not self.conf.exists():
            return False
        ping = subprocess.run(["scontrol", "ping"], env=self.env, capture_output=True, text=True, timeout=DEADLINE_S)
        return " UP" in ping.stdout


class Slurm:
    """Commands on the cluster for one test (or for the tests of one module), from its own folder.

    `env` is the environment of every command, and so of the jobs: SLURM_CONF, this Python first on PATH, the
    variables that let root use Open MPI, one thread.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.env = dict(cluster.env)
        if cluster.mode == "plain":
            # The names of the nodes may resolve nowhere: only root can write them into /etc/hosts.
            self.env["MASTER_ADDR"] = "127.0.0.1"
        self.jobs: list[str] = []
        self._crashed: set[str] = set()
        self._cut: set[str] = set()

    def run(self, *command: object, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Any command in `folder`, by default one that must succeed."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=DEADLINE_S
        )
        if check:
            assert done.returncode == 0, f"$ {' '.join(words)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, *arguments: object, **env: str) -> str:
        """`sbatch ARGUMENTS`; the job's id."""
        job = self.run("sbatch", "--parsable", *arguments, check=True, **env).stdout.split(";")[0].strip()
        self.jobs.append(job)
        return job

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`: field → value; the first task of an array. Empty when Slurm has forgotten the job."""
        shown = self.run("scontrol", "-o", "show", "job", job, check=False).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown.partition("\n")[0]))

    def states(self, job: str) -> list[str]:
        """State of the job, or of each task of an array."""
        shown = self.run("scontrol", "-o", "show", "job", job, check=False).stdout
        return re.findall(r"\bJobState=(\S+)", shown)

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        return int(self.show(job).get("Restarts", "0"))

    def wait(self, job: str, states: Sequence[str] = ENDED) -> str:
        """Poll until the job (every task of an array) is in one of `states`; returns the (first) state."""
        seen: list[str] = []

        def there() -> bool:
            seen[:] = self.states(job)
            return bool(seen) and all(state in states for state in seen)

        until(there, lambda: f"job {job} in {'/'.join(states)}; it is {seen}\n{self.output(job)}", pause=0.1)
        return seen[0]

    def done(self, job: str) -> None:
        """Wait for a job that must end well."""
        state = self.wait(job)
        assert set(self.states(job)) == {"COMPLETED"}, f"job {job}: {state}\n{self.output(job)}"

    def until_in(self, job: str, true: Callable[[], object], what: str) -> None:
        """Poll until a job has done something: at once an assertion, with its output, when it has ended without it."""
        until(
            true, lambda: f"{what} of job {job}\n{self.output(job)}",
            lambda: self.show(job).get("JobState") not in ENDED, pause=0.02,
        )  # fmt: skip

    def output(self, job: str) -> str:
        """Everything the job's script and ranks wrote: its standard output and the files whose names hold its id."""
        # os.walk passes over a folder that goes away under it, as those of running jobs do; rglob fails.
        named = {Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names if job in name}
        files = {Path(self.show(job).get("StdOut", "/none")), *named}
        texts = [f"--- {path}\n{path.read_text('utf-8', 'replace')}" for path in sorted(files) if path.is_file()]
        return "\n".join(texts)

    def signal(self, job: str, name: str, *flags: str) -> None:
        """`scancel --signal=NAME`: the tasks of the steps, or with --batch the batch shell only."""
        self.run("scancel", f"--signal={name}", *flags, job)

    def on(self, node: str, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command among the processes of a node."""
        return self.run("bash", CLUSTER, "on", node, *command, check=check)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """slurmctld does not answer for the block: its process is stopped."""
        pid = int((self.cluster.folder / "pids" / "slurmctld").read_text("utf-8").split()[0])
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def crash(self, node: str) -> None:
        """The node dies with everything on it (skips where nodes are not separated)."""
        if self.cluster.mode == "plain":
            pytest.skip("a node cannot crash here: cluster.sh found no namespaces (mode plain)")
        self._crashed.add(node)
        self.cluster.script("crash-node", node)

    def cut(self, node: str) -> None:
        """The node loses its network and runs on; `close` gives it back (skips where nodes have none of their own)."""
        if self.cluster.mode != "net":
            pytest.skip(
                f"a node cannot lose its network here: cluster.sh found none of its own (mode {self.cluster.mode})"
            )
        self._cut.add(node)
        self.cluster.script("cut-node", node)

    def start(self, node: str) -> None:
        """Bring a crashed node back and wait until Slurm uses it."""
        self.cluster.script("start-node", node)
        self._crashed.discard(node)

        def back() -> bool:
            state = self.run("sinfo", "-h", "-n", node, "-o", "%T").stdout.split()[0]
            if state.startswith("down") and "*" not in state:
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return state in ("idle", "mixed", "allocated")

        until(back, f"{node} back", pause=0.1)

    def close(self) -> None:
        """End the jobs of this test, wait until they are gone, and bring crashed nodes back."""
        for node in sorted(self._cut):
            self.cluster.script("join-node", node)
        for node in sorted(self._crashed | self._cut):
            self.start(node)
        listed = self.run("squeue", "-h", "-o", "%A %Z").stdout.splitlines()
        below = [job for job, _, place in (line.partition(" ") for line in listed) if self._is_below(place)]
        left = sorted({*self.jobs, *below})
        if left:
            self.run("scancel", *left, check=False)
            active = ("squeue", "-h", "-j", ",".join(left), "-t", "PD,R,CG,S,CF")
            until(lambda: not self.run(*active, check=False).stdout.strip(), f"the end of jobs {left}", pause=0.1)

    def _is_below(self, place: str) -> bool:
        return Path(place) == self.folder or self.folder in Path(place).parents
