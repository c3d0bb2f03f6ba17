"""The deepspeed front over real nodes: pdsh and mpirun through their sshd, srun in a job; stopped, killed, continued.

The front runs on this machine, which is none of the nodes, or in a job. On the nodes PATH is sshd's default.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import TINY, distlm, write_text
from support.deadline import DEADLINE_S, until

PACKAGES = "(Debian: pdsh openssh-server; tests/slurm/cluster.sh install)"


@pytest.fixture(scope="module")
def words(tmp_path_factory, slurm_cluster):
    """Settings of a tiny training whose tokens are there."""
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text")
    shared = [*TINY, "train.save_every=0", "train.valid_every=0", "data.source=folder", f"data.text_dir={text}"]
    shared += [f"data.tokens_dir={folder / 'tokens'}"]
    distlm("data", "prepare", "demo", *shared, f"run_dir={folder / 'prepare'}")
    return shared


@pytest.fixture(scope="module")
def expected(words, tmp_path_factory):
    """Losses of two ranks under mpirun on this machine."""
    run = tmp_path_factory.mktemp("reference")
    distlm("train", "demo", *words, "train.updates=3", f"run_dir={run}", ranks=2)
    return [line["train/loss"] for line in lines(run)]


@pytest.fixture
def nodes(slurm):
    """Nodes that ssh reaches."""
    if slurm.cluster.mode != "net":
        pytest.skip(f"the nodes have no network and sshd of their own: cluster.sh is in mode {slurm.cluster.mode}")
    return slurm


def lines(run):
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [line for line in found if "train/loss" in line]


def front(*arguments):
    return [sys.executable, "-m", "launchers.deepspeed", "demo", *map(str, arguments)]


def running(slurm, run):
    """Command lines on node1 and node2 of processes that belong to the run."""
    found = []
    for node in ("node1", "node2"):
        listed = slurm.on(node, "ps", "-eo", "args", "--no-headers").stdout.splitlines()
        found += [line for line in listed if str(run) in line]
    return found


@pytest.mark.parametrize("via", [pytest.param("pdsh", marks=pytest.mark.slow), "openmpi"])
def test_over_ssh(via, nodes, words, expected, tmp_path):
    if shutil.which("pdsh") is None:
        pytest.skip(f"pdsh is not installed {PACKAGES}")
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n", "utf-8")
    run = tmp_path / "run"
    command = front(*words, "train.updates=3", f"run_dir={run}", "--ranks", 2, "--hostfile", hosts, "--via", via)
    # Blanks, quotes and commas reach the ranks as they are; a broken one would change the exit code.
    nodes.run(*command, PYTHONWARNINGS="default,ignore::UserWarning", WANDB_NOTES='say "hello", $HOME')
    assert [line["train/loss"] for line in lines(run)] == expected
    logs = [log.read_text("utf-8") for log in sorted(run.glob("launch/deepspeed/*/rank-*.log"))]
    assert "world: rank 0 of 2 on node1" in logs[0]
    assert "world: rank 1 of 2 on node2" in logs[1]


def test_in_a_job(slurm, words, expected, tmp_path):
    """Hosts and slots are the job's, the way is srun; MPI is there too, which training does not need."""
    run = tmp_path / "run"
    words = [*words, "train.updates=3", f"run_dir={run}"]
    script = tmp_path / "job.sh"
    command = [*front(*words), "--ranks", "2", "--mpi", "pmix"]
    script.write_text("#!/bin/bash\nexec " + " ".join(f"'{word}'" for word in command) + "\n", "utf-8")
    job = slurm.sbatch("-N2", "--ntasks-per-node=1", "--output", tmp_path / "job.out", script)
    slurm.done(job)
    assert [line["train/loss"] for line in lines(run)] == expected
    output = (tmp_path / "job.out").read_text("utf-8")
    assert "2 ranks on 2 host(s) from the Slurm job, via slurm" in output
    (record,) = map(json.loads, (run / "launch" / "jobs.jsonl").read_text("utf-8").splitlines())
    assert (record["job"], record["stage"]) == (job, "train")


@pytest.mark.slow
def test_stopped_and_killed_over_pdsh_and_continued_in_a_job(nodes, words, tmp_path):
    """pdsh carries no signal; the ranks stop all the same, by order of the front and when the front is killed."""
    run = tmp_path / "run"
    words = [*words, "train.updates=1000000", f"run_dir={run}", "launch.lost_after_s=20"]
    over_pdsh = front(*words, "--ranks", 2, "--hosts", "node[1-2]:1", "--via", "pdsh")
    flags = ["--nodes=2", "--ntasks-per-node=1", "--mpi=none", "--kill-on-bad-exit=0"]
    in_a_job = ["srun", *flags, sys.executable, "-m", "distlm", "train", "demo", *words]
    steps = 0
    for command, end, code in (
        (over_pdsh, signal.SIGUSR1, 75), (over_pdsh, signal.SIGKILL, -9), (in_a_job, signal.SIGUSR1, 75),
    ):  # fmt: skip
        with (tmp_path / "front.out").open("w") as out:
            process = subprocess.Popen(command, env=nodes.env, cwd=tmp_path, stdout=out, stderr=out)

        def went_on(seen=steps):
            return len(lines(run)) > seen

        def alive(it=process):
            return it.poll() is None

        until(went_on, "an update", alive)
        process.send_signal(end)
        assert process.wait(DEADLINE_S) == code, (tmp_path / "front.out").read_text("utf-8")
        # All ranks and what pdsh started there; without a front they notice its silence.
        until(lambda: not running(nodes, run), "the end of all ranks on the nodes", pause=0.5)
        found = [line["step"] for line in lines(run)]
        assert found == list(range(1, len(found) + 1))
        steps = len(found)
        assert (run / f"checkpoints/step-{steps:08d}/complete.json").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--hosts", "node1:1,node9:1", "--via", "pdsh"],
            r"node9: ssh without a password fails (ssh: Could not resolve",
        ),
        (
            ["--hosts", "node[1-2]:1", "--via", "pdsh"],
            "is not there; put run_dir= on a file system that all nodes mount",
        ),
        (["--hosts", "node[1-2]:1", "--via", "slurm"], "ranks 0, 1 (node1, node2) never started"),
    ],
)
def test_what_cannot_work_is_one_clear_error(arguments, error, nodes, words):
    """A host that is not there; a run directory that the nodes do not see (each has a /dev/shm of its own)."""
    run = f"/dev/shm/distlm-{os.getpid()}"
    try:
        done = nodes.run(*front(*words, f"run_dir={run}", "--ranks", 2, *arguments), check=False)
        assert (done.returncode, error in done.stderr) == (1, True), done.stdout + done.stderr
    finally:
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.slow
def test_a_node_that_goes_down_ends_the_start_and_is_named(nodes, words, tmp_path):
    run = tmp_path / "run"
    words = [*words, "train.updates=1000000", "train.save_every=20", f"run_dir={run}", "launch.lost_after_s=20"]
    command = front(*words, "--ranks", 2, "--hosts", "node[3-4]:1", "--via", "pdsh")
    with (tmp_path / "front.out").open("w") as out:
        process = subprocess.Popen(command, env=nodes.env, cwd=tmp_path, stdout=out, stderr=out)
    saved = run / "checkpoints" / "step-00000020" / "complete.json"
    until(saved.exists, "a checkpoint", lambda: process.poll() is None)
    nodes.crash("node4")
    assert process.wait(DEADLINE_S) == 75, (tmp_path / "front.out").read_text("utf-8")
    output = (tmp_path / "front.out").read_text("utf-8")
    assert "rank 1 (node4) did not say how they ended (node down?); run the same command again" in output
    until(lambda: str(run) not in nodes.on("node3", "ps", "-eo", "args").stdout, "the end of rank 0", pause=0.5)
