"""`distlm train` under every launcher of one machine: the same losses in the same world; and how the deepspeed front
stops, continues and leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from support import ENVIRONMENT, TINY, distlm, mpirun_command, warm, write_text
from support.deadline import DEADLINE_S, until

from distlm.config.load import load_config
from distlm.errors import EXIT_STOPPED
from distlm.pipeline import STEPS, stage_command
from distlm.runtime.child import listens

pytestmark = pytest.mark.multiprocess


def lines(run):
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [line for line in found if "train/loss" in line]


def losses(run):
    return [line["train/loss"] for line in lines(run)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Settings of a tiny training whose tokens are there."""
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text")
    shared = [*TINY, "train.save_every=0", "train.valid_every=0", "data.source=folder", f"data.text_dir={text}"]
    shared += [f"data.tokens_dir={folder / 'tokens'}", "launch.lost_after_s=20"]
    distlm("data", "prepare", "demo", *shared, f"run_dir={folder / 'prepare'}")
    return shared


def front(*arguments):
    return [sys.executable, "-m", "launchers.deepspeed", "demo", *map(str, arguments)]


def start(command):
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(run):
    """Processes of the ranks of a run, and of their keepers and launchers."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(run) in command and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_every_launcher_trains_the_same_model(tmp_path, words):
    words = [*words, "train.updates=3", "launch.ranks=2"]
    train = STEPS["train"]
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n", "utf-8")
    commands = {"python": [[sys.executable, "-m", "distlm", "train", "demo", *words, f"run_dir={tmp_path / 'python'}"]]}
    commands["mpirun"] = [
        mpirun_command(2, ["-m", "distlm", "train", "demo", *words, f"run_dir={tmp_path / 'mpirun'}"])
    ]
    for launcher in ("torchrun", "deepspeed"):
        own = [*words, f"launch.launcher={launcher}", f"run_dir={tmp_path / launcher}"]
        commands[launcher] = [stage_command(train, load_config("demo", own), "demo", own)]
        assert launcher in commands[launcher][0][0]
    commands["front"] = [front(*words, f"run_dir={tmp_path / 'front'}", "--ranks", 2)]
    two_nodes = front(*words, f"run_dir={tmp_path / 'no_ssh'}", "--ranks", 2, "--hostfile", hosts, "--via", "no_ssh")
    commands["no_ssh"] = [[*two_nodes, "--node-rank", str(node)] for node in (0, 1)]
    worlds = {}
    for name, several in commands.items():
        processes = [start(command) for command in several]
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), f"{name}\n{outputs}"
        assert len(losses(tmp_path / name)) == 3
        # The world as training found it: it decides how a batch is split.
        worlds[name] = re.findall(r"(\d+) micro-batches per rank and update", "".join(outputs))
    assert worlds["python"] == ["4"]
    assert worlds == {name: ["2"] for name in commands} | {"python": ["4"]}
    expected = losses(tmp_path / "mpirun")
    for name in ("torchrun", "deepspeed", "front", "no_ssh"):
        assert losses(tmp_path / name) == expected
    # One rank adds the same numbers in another order.
    assert losses(tmp_path / "python") == pytest.approx(expected, rel=1e-5)
    for rank in (0, 1):
        (log,) = (tmp_path / "front").glob(f"launch/deepspeed/*/rank-0000{rank}.log")
        assert f"world: rank {rank} of 2 on " in log.read_text("utf-8")


def test_the_variables_of_an_srun_step_are_enough(tmp_path, words):
    """Two processes with the variables that srun sets, without MPI: no Slurm is needed for this path."""
    words = [*words, "train.updates=2", f"run_dir={tmp_path / 'run'}"]
    ranks = []
    for rank in range(2):
        step = {
            "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "distlm", "train", "demo", *words]
        ranks.append(subprocess.Popen(command, env={**ENVIRONMENT, **step}, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=DEADLINE_S)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_deepspeed_start_is_stopped_killed_and_continued(tmp_path, words):
    """Stopped by a signal; continued, and the front killed; continued to the end: no batch is lost or repeated."""
    run = tmp_path / "run"
    command = front(*words, "train.updates=300", f"run_dir={run}", "--ranks", 2)
    updates = 0
    for end in ("SIGTERM", "SIGKILL"):
        process = start(command)

        def went_on(seen=updates):
            return len(lines(run)) > seen

        until(went_on, "the first updates")
        process.send_signal(signal.Signals[end])
        output = process.communicate(timeout=DEADLINE_S)[0]
        assert process.returncode == (EXIT_STOPPED if end == "SIGTERM" else -signal.SIGKILL), output
        # Ranks whose front was killed stop by themselves, and they save too.
        until(lambda: not ranks_of(run), "the end of all ranks")
        updates = max(line["step"] for line in lines(run))
        assert 0 < updates < 300
        assert (run / f"checkpoints/step-{updates:08d}/complete.json").exists()
    process = start(command)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0, output
    assert [line["step"] for line in lines(run)] == list(range(1, 301))
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (again.returncode, "trained before; nothing to do" in again.stderr) == (0, True)


def test_a_deepspeed_start_that_is_stopped_at_once_starts_nothing(tmp_path, words):
    command = front(*words, "train.updates=300", f"run_dir={tmp_path / 'run'}", "--ranks", 2)
    process = subprocess.Popen(
        command, env={**ENVIRONMENT, **warm.COLD}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: listens(process.pid), "its handlers", lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == EXIT_STOPPED and "before any rank was started" in output, output


def test_a_killed_rank_ends_a_deepspeed_start_and_is_named(tmp_path, words):
    run = tmp_path / "run"
    process = start(front(*words, "train.updates=100000", f"run_dir={run}", "--ranks", 2))
    until(lambda: lines(run), "the first update")
    victim = next(each for each in ranks_of(run) if "distlm" in each.cmdline()[:4] and each.environ()["RANK"] == "1")
    victim.kill()
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == EXIT_STOPPED, output
    assert re.search(r"\[rank 1 on \S+\] ended by SIGKILL \(out of memory\?\)", output)
    assert "rank 1 (localhost) ended with exit code 137; run the same command again to continue" in output
    assert not ranks_of(run)


def test_a_rank_that_refuses_its_settings_is_an_error(tmp_path, words):
    run = tmp_path / "run"
    process = start(front(*words, "train.updates=3", f"run_dir={run}", "data.tokens_dir=/nowhere", "--ranks", 2))
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 1, output
    assert re.search(
        r"launchers.deepspeed: rank \d \(localhost\) ended with exit code \d: .*/nowhere.*; 2 of 2 ranks failed; its "
        r"output: \S+/rank-0000\d\.log",
        output,
    )


def test_a_killed_launcher_is_no_success(tmp_path, words):
    """`deepspeed` ends with 0 when its second half is killed, and leaves the ranks running: the front stops them."""
    run = tmp_path / "run"
    process = start(front(*words, "train.updates=100000", f"run_dir={run}", "--ranks", 2))
    until(lambda: lines(run), "the first update")
    launch = next(each for each in ranks_of(run) if "deepspeed.launcher.launch" in each.cmdline())
    os.kill(launch.pid, signal.SIGKILL)
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == EXIT_STOPPED, output
    assert "the launcher ended (exit code 0) before its ranks; stopping them" in output
    assert not ranks_of(run)
    assert list(run.glob("checkpoints/step-*/complete.json"))


def test_a_host_that_is_not_started_is_missed_in_the_time_that_was_given(tmp_path, words):
    """no_ssh: one front a host, which does not see the others' ranks."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n", "utf-8")
    where = ["--ranks", 2, "--hostfile", hosts, "--via", "no_ssh", "--node-rank", 0, "--start-within", 3]
    process = start(front(*words, "train.updates=3", f"run_dir={tmp_path / 'run'}", *where))
    output = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 1, output
    said = (
        r"launchers.deepspeed: rank 0 \(localhost\) ended with exit code 1: .*within 3 s \(rank 1 of 2 did not come\)"
    )
    assert re.search(said, output), output
