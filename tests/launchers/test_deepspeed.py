"""The deepspeed front before it starts anything: hosts, ports, environments, command lines, and what it refuses."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, TINY
from support.deadline import DEADLINE_S

from distlm.errors import DistlmError, UsageError
from distlm.runtime import alive
from distlm.runtime.rundir import RunDir
from launchers import deepspeed
from launchers.deepspeed import _launcher_arguments, _parse, choose_place, deepspeed_command
from launchers.hosts.net import choose_port, is_here, shell_safe
from launchers.hosts.nodes import Host
from launchers.hosts.rank import _environment, process_start
from launchers.hosts.spec import launcher_environment, prepare_folder, rank_environment, rank_program


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def place(*words):
    return choose_place(_parse(["demo", *words]))


def test_ranks_of_hosts():
    found = place("--ranks", "3", "--hosts", "localhost:1,127.0.0.1:2", "--via", "no_ssh", "--node-rank", "1")
    assert found.ranks() == {1: "127.0.0.1", 2: "127.0.0.1"}
    assert place("--ranks", "2").ranks() == {0: "localhost", 1: "localhost"}


def test_the_way_is_chosen_by_where_it_starts(monkeypatch):
    assert place("--ranks", "2").via == "local"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2")
    assert place("--ranks", "2").via == "local"
    assert place("--ranks", "2").source == "the Slurm job"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--ranks", "4", "--hosts", "localhost:2"], r"world mismatch: --ranks 4 asked, but --hosts gives 2"),
        (["--ranks", "2", "--hostfile", "nowhere"], r"nowhere: no such hostfile"),
        (["--ranks", "2", "--hosts", "localhost:1,127.0.0.1:1", "--via", "local"], r"--via local: --hosts names other"),
        (["--ranks", "0"], r"--ranks 0: must be 1 or more"),
        (["--ranks", "2", "--hosts", "a:1,b:1", "--via", "no_ssh"], r"give --node-rank 0 to 1 on each of the 2"),
        (["--ranks", "2", "--hosts", "a:1,b:1", "--via", "no_ssh", "--node-rank", "2"], r"it must be 0 to 1"),
        (["--ranks", "3", "--hosts", "a:2,b:1", "--via", "mpich"], r"a has slots=2 and b slots=1; --via mpich"),
        (["--ranks", "2", "--via", "slurm"], r"no hosts given and this is no Slurm job"),
        (
            ["--ranks", "2", "--hosts", "no-such-host-1:1,no-such-host-2:1", "--via", "no_ssh", "--node-rank", "0"],
            r"host no-such-host-1: its name cannot be resolved",
        ),
        (["--ranks", "2", "--master-port", "70000"], r"--master-port 70000: must be 1 to 65535"),
        (["--ranks", "2", "--master-port", "-1"], r"--master-port -1: must be 1 to 65535"),
        (["--ranks", "2", "--start-within", "0"], r"--start-within 0: must be a number of seconds above 0"),
        (["--ranks", "2", "--stop-within", "nan"], r"--stop-within nan: must be a number of seconds above 0"),
        (["--ranks", "2", "--slots-per-node", "-2"], r"--slots-per-node -2: must be 1 or more"),
        (["--ranks", "2", "--launcher-args", "a 'b"], r"--launcher-args \"a 'b\": No closing quotation"),
        (["--ranks", "2", "--hosts", "a"], r"--hosts: 'a' has no slots; write HOST:RANKS"),
        (["--ranks", "2", "--hosts", "a[1-:2"], r"--hosts: node list 'a\[1-:2': brackets do not match"),
        (["--ranks", "2", "--hosts", "a[2-1]:1"], r"--hosts: node list 'a\[2-1\]': bad range"),
        (["--ranks", "2", "--hosts", "a:1,a:1"], r"a was there already"),
        (["--ranks", "2", "--hosts", "a:x"], r"slots=x of a: must be a number of ranks"),
        (["--ranks", "2", "--hosts", "a b:2"], r"'a b' is no host name"),
        (["--ranks", "2", "--hosts", ","], r"--hosts: no hosts in it"),
    ],
)
def test_what_cannot_work_is_refused(words, error):
    with pytest.raises(UsageError, match=error):
        place(*words)


def test_fewer_devices_than_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(DistlmError, match=r"CUDA_VISIBLE_DEVICES=2 has 1 devices for 2 ranks"):
        place("--ranks", "2")


def test_a_refusal_is_one_line(tmp_path):
    """The whole command: hostfile missing, port taken or none, world of another size."""
    (tmp_path / "hosts").write_text("localhost slots=4\n", "utf-8")
    run = f"run_dir={tmp_path / 'run'}"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for code, words, error in (
            (2, ["--ranks", "2", "--hostfile", str(tmp_path / "none")], "none: no such hostfile; write"),
            (2, ["--ranks", "2", "--hostfile", str(tmp_path / "hosts")], "--ranks 2 asked, but "),
            (2, ["--ranks", "2", "--master-port", "70000"], "--master-port 70000: must be 1 to 65535"),
            (1, ["--ranks", "2", "--master-port", str(port)], f"master port {port} on "),
        ):
            command = [sys.executable, "-m", "launchers.deepspeed", "demo", *TINY, run, *words]
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
            assert done.returncode == code, done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert error in done.stderr
    assert not (tmp_path / "run").exists()


def test_ports_of_different_runs_differ_and_step_aside():
    assert choose_port(0, "job 1", "elsewhere.invalid", True) != choose_port(0, "job 2", "elsewhere.invalid", True)
    first = choose_port(0, "this run", "127.0.0.1", True)
    assert 20000 <= first < 30100
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert choose_port(0, "this run", "127.0.0.1", True) == first + 1
        with pytest.raises(DistlmError, match=r"master port .* is taken .*the same on all nodes"):
            choose_port(0, "this run", "127.0.0.1", False)


def test_this_machine_is_known_by_its_names():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert is_here(socket.gethostname())
    assert not is_here("no-such-host.invalid")


def test_command_lines(tmp_path):
    folder = tmp_path / "a folder with blanks"
    assert rank_program(folder)[1].endswith("/a%20folder%20with%20blanks")
    folder = tmp_path / "run"
    options = _parse(["demo", "--ranks", "4", "--mpi", "pmix", "--launcher-args=--label"])
    hosts = [Host("n1", 2), Host("n2", 2)]

    def command(via, node_rank=None):
        where = deepspeed.Place(hosts, "--hosts", via, "n1", node_rank)
        return deepspeed_command(where, 20123, folder, _launcher_arguments(where, options))

    slurm = command("slurm")
    assert slurm[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--force_multi" in slurm
    assert next(word for word in slurm if word.startswith("--launcher_args=")) == (
        "--launcher_args=--nodes=2 --nodelist=n1,n2 --ntasks-per-node=2 --distribution=block --mpi=pmix --unbuffered "
        "--kill-on-bad-exit=0 --wait=60 --label"
    )
    assert {"--no_ssh", "--node_rank=1"} < set(command("no_ssh", 1))
    local = command("local")
    assert not any(word.startswith(("--launcher", "--force_multi")) for word in local)
    assert {"--no_local_rank", "--no_ssh_check", "--master_addr=n1", "--master_port=20123"} < set(local)


def test_ranks_get_the_environment_as_it_is_and_launchers_only_what_survives(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_NOTES", 'a "quoted", $value')
    monkeypatch.setenv("PYTHONWARNINGS", "ignore,default")
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1,mlx5_1:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("WORLD_SIZE", "9")
    (tmp_path / ".deepspeed_env").write_text("# site\nNCCL_IB_HCA=^mlx5_2\n\nOMPI_MCA_osc = ^ucx\n", "utf-8")
    ranks = rank_environment("pdsh", 4, "n1", 20123, "ib0", 45)
    assert ranks["WANDB_NOTES"] == 'a "quoted", $value'
    assert ranks["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"
    assert (ranks["NCCL_IB_HCA"], ranks["OMPI_MCA_osc"]) == ("^mlx5_2", "^ucx")
    assert (ranks["DISTLM_RANKS"], ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("4", "n1", "20123")
    assert ranks["DISTLM_JOIN_WITHIN"] == "45"
    assert (ranks["GLOO_SOCKET_IFNAME"], ranks["SLURM_JOB_ID"]) == ("ib0", "77")
    assert not {"HOME", "WORLD_SIZE", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES"} & set(ranks)
    # Only on this machine are the devices those that this shell was given.
    assert rank_environment("local", 2, "127.0.0.1", 20123, "", 45)["CUDA_VISIBLE_DEVICES"] == "2,3"
    launcher = launcher_environment("slurm")
    assert (launcher["PYTHONHASHSEED"], launcher["SLURM_PROCID"]) == ("3", "0")
    assert not {"PYTHONWARNINGS", "UCX_NET_DEVICES", "WORLD_SIZE"} & set(launcher)
    assert launcher["PATH"].startswith(str(Path(sys.executable).parent))
    (tmp_path / ".deepspeed_env").write_text("no value\n", "utf-8")
    with pytest.raises(DistlmError, match=r"\.deepspeed_env:1: 'no value': expected NAME=VALUE"):
        rank_environment("pdsh", 4, "n1", 20123, "", 45)


def test_ranks_without_a_home_get_their_environment(tmp_path, monkeypatch):
    """Containers may have neither HOME nor a name for the user."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n", "utf-8")
    ranks = rank_environment("pdsh", 4, "n1", 20123, "", 45)
    assert ranks["NCCL_DEBUG"] == "INFO" and "TORCH_EXTENSIONS_DIR" not in ranks


def test_a_start_is_counted_in_the_kernels_ticks_which_no_clock_moves():
    assert process_start(os.getpid()) == alive.process_start(os.getpid()) != ""


def test_a_process_that_has_ended_has_no_start():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) == "", "a zombie"
    child.wait()
    assert process_start(child.pid) == ""


def test_the_folder_of_a_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/extra")
    arguments = ["train", "demo", "data.text_dir=/my text"]
    folder = prepare_folder(RunDir(tmp_path), [Host("a", 2)], [0, 1], arguments, "pdsh", "a", 20123, "", 60, 45)
    assert (folder / "hosts").read_text("utf-8") == "a slots=2\n"
    # It holds the environment, and so perhaps keys.
    assert stat.S_IMODE((folder / "spec.json").stat().st_mode) == 0o600
    spec = json.loads((folder / "spec.json").read_text("utf-8"))
    assert spec["arguments"] == arguments
    env = _environment(spec)
    assert env["PYTHONPATH"] == f"{spec['code']}:/extra"
    assert env["HOME"] == os.environ["HOME"]


def test_what_is_safe_in_a_shell():
    assert shell_safe("/opt/venv-3.11/bin/python")
    assert not any(map(shell_safe, ("a b", "a,b", "$x", "a;b", 'a"b', "ä")))
