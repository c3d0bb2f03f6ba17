"""Ranks that die, nodes that do not see each other's files, taken ports: named on every rank, and no rank waits."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, TINY, distlm, mpirun, warm, write_text
from support.deadline import DEADLINE_S, until
from support.shims import shim

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lost")
    text = write_text(folder / "text")
    words = [*TINY, "data.source=folder", f"data.text_dir={text}", f"data.tokens_dir={folder / 'tokens'}"]
    distlm("data", "prepare", "demo", *words, f"run_dir={folder / 'prepare'}")
    return words


def step_of_slurm(rank: int, size: int) -> dict[str, str]:
    """What srun sets; ranks started so have no launcher that would kill them when one dies."""
    return {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_NODEID": "0",
    }  # fmt: skip


def test_a_killed_rank_ends_the_others_and_is_named(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "distlm", "train", "demo", *words, f"run_dir={run}", "train.updates=100000"]
    command += ["train.valid_every=0", "train.save_every=5", "launch.lost_after_s=30"]
    ranks = [
        # Cold: the process that is killed is the one that the others name.
        subprocess.Popen(
            command, env={**ENVIRONMENT, **warm.COLD, **step_of_slurm(rank, 2)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        saved = "checkpoints/step-*/complete.json"
        until(lambda: any(run.glob(saved)), "a checkpoint", lambda: ranks[0].poll() is None)
        ranks[1].send_signal(signal.SIGKILL)
        _, errors = ranks[0].communicate(timeout=DEADLINE_S)
    finally:
        for rank in ranks:
            rank.kill()
    name = f"rank 1 on {socket.gethostname()} is lost: its process {ranks[1].pid} is gone"
    assert name in errors and "run the same command again" in errors
    assert ranks[0].returncode == 75
    assert not [path.name for path in run.glob("checkpoints/step-*") if not (path / "complete.json").exists()]


def test_an_error_on_one_rank_is_told_by_the_others(tmp_path: Path) -> None:
    """A fault of the program on rank 1, while rank 0 waits in a collective: exit 1, since it would come again."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom distlm.runtime.alive import watching\n"
        "from distlm.runtime.ranks.comm import open_comm\nfrom distlm.runtime.ranks.world import resolve_world\n"
        "world = resolve_world(); comm = open_comm(world)\n"
        "with watching(Path(sys.argv[1]), world, comm, 30):\n"
        "    if world.rank == 1: raise KeyError('a bug')\n"
        "    time.sleep(100)\n",
        "utf-8",
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(driver), str(tmp_path / "run")],
            env={**ENVIRONMENT, **step_of_slurm(rank, 2)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    errors = [rank.communicate(timeout=DEADLINE_S)[1] for rank in ranks]
    assert "rank 1 on" in errors[0] and "it ended with KeyError: 'a bug'" in errors[0]
    assert [rank.returncode for rank in ranks] == [1, 1]


def test_a_taken_port_is_one_clear_error(words: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = mpirun(
            2, ["-m", "distlm", "train", "demo", *words, f"run_dir={tmp_path / 'run'}"],
            check=False, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"MASTER_PORT={port} on {socket.gethostname()} is taken by another program" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_cluster_over_three_ranks(tmp_path: Path) -> None:
    done = distlm("doctor", "--cluster", "--json", "--folder", str(tmp_path), ranks=3, check=False)
    report = json.loads(done.stdout)
    found = {check["name"]: (check["status"], check["text"]) for check in report["checks"]}
    assert report["healthy"] and done.returncode == 0, report
    assert found["world"][1].startswith("3 ranks on 1 nodes from mpi")
    assert {"gloo", "folder", "rename", "locks", "clocks", "room", "versions", "requeue"} <= found.keys()
    reads = int(found["rename"][1].split()[0])
    assert reads > 0 and found["rename"][1].endswith("0 of them torn")
    assert found["locks"] == ("ok", "one of 3 ranks creates a file; flock holds on all nodes")
    assert list(tmp_path.iterdir()) == []


def test_doctor_cluster_over_a_file_system_without_locks(tmp_path: Path) -> None:
    without = {**shim(no_flock=True), **warm.COLD}
    done = distlm("doctor", "--cluster", "--json", "--folder", str(tmp_path), ranks=2, check=False, **without)
    found = {check["name"]: (check["status"], check["text"]) for check in json.loads(done.stdout)["checks"]}
    assert found["locks"][0] == "warn" and found["locks"][1].startswith("no flock on ")


def test_ranks_whose_clocks_are_days_apart_see_each_other(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom distlm.runtime import alive\n"
        "from distlm.runtime.ranks.comm import open_comm\nfrom distlm.runtime.ranks.world import resolve_world\n"
        "world = resolve_world(); comm = open_comm(world)\n"
        "print([round(each - time.time()) for each in comm.allgather(time.time())][1 - world.rank])\n"
        "with alive.watching(Path(sys.argv[1]), world, comm, 3):\n"
        "    time.sleep(5)\n"
        "comm.close()\n",
        "utf-8",
    )
    (tmp_path / "run").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(driver), str(tmp_path / "run")],
            env={**ENVIRONMENT, **warm.COLD, **step_of_slurm(rank, 2), **(shim(clock=200_000) if rank == 0 else {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=DEADLINE_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert abs(int(said[1][0])) > 199_000, said


def test_doctor_cluster_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = distlm("doctor", "--cluster", "--folder", str(tmp_path / "file"), ranks=2, check=False)
    assert done.returncode == 1
    assert re.search(r"^folder +fail +.*rank 0 cannot write there -> choose another with --folder$", done.stdout, re.M)
