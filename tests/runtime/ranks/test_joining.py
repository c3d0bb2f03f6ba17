"""Ranks that meet in a store, also in one of earlier starts; ranks that wait say for whom and why, and end in time."""

import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from support import ENVIRONMENT, mpirun_command
from support.deadline import DEADLINE_S, until

from distlm.errors import DistlmError, UsageError
from distlm.runtime.ranks import joining
from distlm.runtime.ranks.joining import Waiting, meet, pauses, ranks_in_words, waiting_outside
from distlm.runtime.ranks.network import Unreached, network_error, of_network
from distlm.runtime.ranks.rendezvous import JOIN_WITHIN, export_rendezvous, join_group, join_within
from distlm.runtime.ranks.world import World


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, size, socket.gethostname(), "torch")


class Rank(threading.Thread):
    """A rank that meets the others in a store."""

    def __init__(self, store: dist.Store, rank: int, size: int, within_s: float = 60) -> None:
        super().__init__(daemon=True)
        self._call = (store, world(rank, size), within_s, Waiting(world(rank, size), "", str))
        self.name_of_start, self.error = "", ""
        self.start()

    def run(self) -> None:
        try:
            self.name_of_start = meet(*self._call)
        except DistlmError as error:
            self.error = str(error)


def test_ranks_meet_again_and_again_in_one_store() -> None:
    store, names = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=60))
    for attempt in range(3):
        # The last first, so that all find what was left there before rank 0 comes.
        order = (2, 1, 0) if attempt else (0, 1, 2)
        ranks = {rank: Rank(store, rank, 3) for rank in order}
        for rank in ranks.values():
            rank.join(60)
        (name,) = {rank.name_of_start for rank in ranks.values()}
        names.append(name)
    assert len(set(names)) == 3 and all(names)


def test_a_rank_that_does_not_come_is_named_on_all() -> None:
    store = dist.HashStore()
    ranks = [Rank(store, rank, 4, within_s=1) for rank in (0, 1, 3)]
    for rank in ranks:
        rank.join(60)
    assert [rank.error for rank in ranks] == ["rank 2 of 4 did not come"] * 3
    assert ranks_in_words(list(range(10))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, … (10 in all)"


def test_it_is_said_after_ten_seconds_and_now_and_then() -> None:
    found = pauses()
    assert [next(found) for _ in range(8)][:2] == [(10, 10), (20, 30)]
    assert next(found) == (300, 300 * 4)


@pytest.mark.parametrize("local", [1, 2])
def test_two_ranks_of_a_node_say_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], local: int
) -> None:
    monkeypatch.setattr(joining, "SAY_AT_S", (0, 1000))
    with Waiting(World(5, 8, local, 4, "n", "slurm"), "waiting for rank 0", lambda: "why"):
        time.sleep(0.2)
    said = "[rank 5 on n] waiting for rank 0 for 0 s: why\n"
    assert capfd.readouterr().err == (said if local < 2 else "")


def test_what_waits_outside_ends_with_the_call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "SAY_AT_S", (0.1, 1000))
    before, said = psutil.Process().children(), list[str]()
    with waiting_outside(world(1, 2), "waiting in a call"):

        def some() -> str:
            said.append(capfd.readouterr().err)
            return "".join(said)

        until(some)
    assert "".join(said) == f"[rank 1 on {socket.gethostname()}] waiting in a call for 0.1 s\n"
    assert psutil.Process().children() == before


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "1e12"])
def test_a_bad_time_to_join_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(JOIN_WITHIN, text)
    with pytest.raises(UsageError, match=f"{JOIN_WITHIN}={text}: must be a number of seconds above 0"):
        join_within()


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1", ""])
def test_a_bad_port_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    # Another test of this process may have made a group.
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=f"MASTER_PORT={port}: must be a port"):
        join_group(world(0, 2))


def test_the_mend_of_a_master_works_under_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun hands no exported variable to other nodes, and `distlm submit` leaves this shell's out."""
    for name in ("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistlmError, match=r"export MASTER_ADDR=<first node>.*mpirun -x MASTER_ADDR"):
        export_rendezvous(World(0, 2, 0, 1, socket.gethostname(), "mpi"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    # join_group sets them; the test gives them back.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(DistlmError, match=r"is taken .*export MASTER_PORT=.*env: of the site file"):
            join_group(world(0, 2))


def test_errors_of_the_network_are_told_apart() -> None:
    for text in (
        "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: Connection refused",
        "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:17722",
        "NCCL error: remote process exited or there was a network error",
    ):
        assert of_network(RuntimeError(text))
    assert of_network(dist.DistNetworkError("The client socket has timed out"))
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("Connection refused"),
        dist.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected"),
        DistlmError("Connection refused"),
    ):
        assert not of_network(other)
    made = network_error(RuntimeError("Connection reset by peer"), "rank 1 lost the others")
    assert isinstance(made, Unreached) and made.exit_code == 75 and of_network(made)


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


ALONE = {
    "rank 1 never comes": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        "waiting for rank 1 of 2 for 10 s: see their logs, they may have ended; the others reach rank 0 at "
        "MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} (from the environment); how many ranks there are is from RANK and "
        "WORLD_SIZE in the environment; where no launcher has set them, `unset RANK WORLD_SIZE`",
        "within 12 s (rank 1 of 2 did not come)",
    ),
    "an address that rank 0 does not have": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"},
        "MASTER_ADDR=192.0.2.1 is no address of {node}, where rank 0 is (left over?)",
        "(rank 1 of 2 did not come); MASTER_ADDR=192.0.2.1 is no address",
    ),
    "rank 0 never comes": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        "waiting for rank 0 at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} (from the environment) for 10 s: Connection "
        "refused; rank 0 must be up (see its log), and the address one that all nodes reach; how many",
        "within 12 s ([Errno 111] Connection refused)",
    ),
    "an address that gives no answer": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"},
        "waiting for rank 0 at MASTER_ADDR:MASTER_PORT=192.0.2.1:{port} (from the environment) for 10 s: ",
        "cannot join the others at MASTER_ADDR:MASTER_PORT=192.0.2.1:{port} within 12 s (",
    ),
    "a name that leads nowhere": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-node.invalid"},
        "=no-such-node.invalid:{port} (from the environment) for 10 s: ",
        "cannot join the others at MASTER_ADDR:MASTER_PORT=no-such-node.invalid:{port} within 12 s (",
    ),
}
"""Left-over variables → what is said after 10 s, and at the end."""


@pytest.mark.multiprocess
def test_whoever_waits_alone_says_for_whom_and_ends_in_time(tmp_path: Path) -> None:
    started = {}
    for name, (variables, _, _) in ALONE.items():
        port = closed_port()
        env = {**ENVIRONMENT, **variables, "MASTER_PORT": port, JOIN_WITHIN: "12", "LOCAL_WORLD_SIZE": "1",
               "LOCAL_RANK": "0"}  # fmt: skip
        command = [sys.executable, "-m", "distlm", "doctor", "--cluster", "--folder", str(tmp_path)]
        started[name] = (
            port,
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        )
    for name, (port, process) in started.items():
        said, errors = process.communicate(timeout=DEADLINE_S)
        waiting, end = (text.format(port=port, node=socket.gethostname()) for text in ALONE[name][1:])
        assert process.returncode == 1 and waiting in errors and end in said + errors, f"{name}\n{said}\n{errors}"


@pytest.mark.multiprocess
def test_ranks_that_wait_in_mpi_say_so(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys\nfrom pathlib import Path\nfrom distlm.runtime.ranks.comm import open_comm\n"
        "from distlm.runtime.ranks.world import resolve_world\nfrom support.deadline import until\n"
        "world = resolve_world()\n"
        "if world.rank == 1: until(Path(sys.argv[1]).exists)\n"
        "open_comm(world).close()\n"
    )  # fmt: skip
    process = subprocess.Popen(
        mpirun_command(2, [driver, tmp_path / "go"]), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    (tmp_path / "go").touch()
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert line.startswith(
        f"[rank 0 on {socket.gethostname()}] waiting in MPI_Init for the other ranks (see their logs"
    )
    assert line.endswith(" for 10 s\n")
