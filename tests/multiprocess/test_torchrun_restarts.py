"""Ranks that torchrun starts anew meet again, whatever their store keeps of earlier ones, and end in the same bits.

Each agent counts its own restarts, and the store of all of them stays.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import ENVIRONMENT, warm
from support.deadline import DEADLINE_S, until
from support.drivers import restarts as driver
from support.slurm import logged, rank_process
from support.train import same_end, settings, tiny_tokens

pytestmark = pytest.mark.multiprocess

UPDATES = 60
KINDS = ("standalone", "static", "c10d")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agents(kind: str) -> list[list[str]]:
    """Flags of each torchrun of a start on two ranks."""
    if kind == "standalone":
        return [["--standalone", "--nproc-per-node=2", "--max-restarts=3"]]
    both = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    if kind == "static":
        place = ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        return [[*both, *place, f"--node-rank={node}"] for node in range(2)]
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=restarts"]
    return [[*both, *place, "--local-addr=127.0.0.1"]] * 2


class Started:
    """The agents of one start, and what they and their ranks said."""

    def __init__(self, log: Path, kind: str, words: Sequence[object], **environment: str) -> None:
        self._log = log
        env = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo", **environment}
        with log.open("w") as stream:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", *flags, *map(str, words)],
                    env=env, stdout=stream, stderr=subprocess.STDOUT,
                )
                for flags in agents(kind)
            ]  # fmt: skip

    def said(self) -> str:
        return self._log.read_text("utf-8")

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def done(self) -> None:
        """Wait for the end, which must be a good one."""
        codes = [process.wait(DEADLINE_S) for process in self.processes]
        assert codes == [0] * len(codes), self.said()
        assert "Traceback" not in self.said(), self.said()


@contextmanager
def torchrun(log: Path, kind: str, *words: object, **environment: str) -> Iterator[Started]:
    started = Started(log, kind, words, **environment)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", ["standalone", "static", pytest.param("c10d", marks=pytest.mark.slow)])
def test_ranks_meet_in_a_store_with_those_of_earlier_attempts(tmp_path: Path, kind: str) -> None:
    (tmp_path / "seen").mkdir()
    with torchrun(tmp_path / "log", kind, driver.__file__, tmp_path / "seen", 2) as started:
        started.done()
        assert started.said().count("met") == 2
    assert len(list((tmp_path / "seen").iterdir())) == 6


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def undisturbed(tokens: Path) -> Path:
    with torchrun(tokens.parent / "log", "standalone", *training(tokens.parent / "undisturbed", tokens)) as started:
        started.done()
    return tokens.parent / "undisturbed"


def training(run: Path, tokens: Path) -> list[str]:
    words = settings(tokens, run, f"train.updates={UPDATES}", "train.valid_every=0", "train.save_every=0")
    return ["-m", "distlm", "train", "demo", *words]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_ranks_are_started_anew_and_go_on(tokens: Path, undisturbed: Path, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    # Cold: the process that is told to stop is the rank.
    with torchrun(tmp_path / "log", kind, *training(run, tokens), **warm.COLD) as started:
        for rank in range(2):
            wanted = len(logged(run)) + 4

            def went_on(count: int = wanted) -> bool:
                return len(logged(run)) >= count

            until(went_on, started.said, started.alive)
            os.kill(rank_process(run, rank)[1], signal.SIGTERM)
        started.done()
        assert started.said().count("distlm: train: stopped after update") == 2, started.said()
    assert logged(run).keys() == set(range(1, UPDATES + 1))
    assert same_end(undisturbed, run)
