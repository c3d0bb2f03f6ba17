"""`distlm train` through the real `deepspeed` launcher: python -m launchers.deepspeed RECIPE [section.key=value ...]

  --ranks 8                               in a Slurm job: hosts and slots are the job's
  --ranks 8 --hosts node[1-2]:4           anywhere with ssh
  --ranks 8 --hostfile hosts              `HOST slots=N` lines
  --ranks 2                               without Slurm and hosts: that many ranks on this machine
  --ranks 8 --hostfile hosts --via no_ssh --node-rank I     on every node, where there is neither ssh nor srun

What can be checked is checked before anything starts. Exit codes: 0 the final checkpoint is there, 1 error, 2 usage,
75 stopped after a checkpoint. SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C stop all ranks after a step, a second Ctrl-C
ends them at once.
"""

from distlm.runtime.stop import earlier, ignore_late_signals, listen

if __name__ == "__main__":
    # Before the other imports, as distlm.main.
    listen()

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.config.load import load_config, split_words
from distlm.config.recipe import recipe_names
from distlm.errors import EXIT_DONE, DistlmError, Stopped, UsageError
from distlm.pipeline import STEPS
from distlm.runtime.progress import say
from distlm.runtime.ranks.mpirun import mpirun_session
from distlm.runtime.ranks.network import is_here
from distlm.runtime.rundir import RunDir
from launchers.hosts.front import Front
from launchers.hosts.net import address_towards, check_hosts, choose_port, require_address, subnet_towards
from launchers.hosts.nodes import Host, parse_hosts, read_hostfile, require_equal, require_ranks, slurm_hosts
from launchers.hosts.spec import code_root, launcher_environment, prepare_folder, rank_program
from launchers.jobs import record_job, run_command

VIAS = ("local", "slurm", "pdsh", "openmpi", "mpich", "no_ssh")
"""Ways to start the ranks; all but the first also on other machines."""
_EQUAL = ("slurm", "mpich")
_NEEDED = {"slurm": "srun", "pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun"}


@dataclass(frozen=True)
class Place:
    """Where the ranks go and how they are started."""

    hosts: list[Host]
    source: str
    """Where the hosts come from, for messages."""
    via: str
    master: str
    """Name or address of the first host."""
    node_rank: int | None
    """no_ssh: which host this is."""
    mpirun: Path | None = None
    """The one of the right MPI."""

    def ranks(self) -> dict[int, str]:
        """Rank → host, of the ranks that this front starts: those of one host with no_ssh, else all."""
        names = [(host.name, index) for index, host in enumerate(self.hosts) for _ in range(host.slots)]
        chosen = (None, *range(len(self.hosts))) if self.node_rank is None else (self.node_rank,)
        return {rank: name for rank, (name, index) in enumerate(names) if index in chosen}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command("deepspeed", lambda: train(_parse(sys.argv[1:] if arguments is None else arguments)))


def train(options: argparse.Namespace) -> int:
    """Check, start, watch. Returns 0 or 75; raises DistlmError for every other end."""
    recipe, overrides = split_words(options.words)
    place = choose_place(options)
    config = load_config(recipe, overrides)
    run = RunDir(Path(config.run_dir).absolute(), config)
    run.refuse_other_config(config, "train")
    step = STEPS["train"]
    if step.finished(config, run):
        say(f"{run.root}: trained before; nothing to do")
        return EXIT_DONE
    lost_after_s = config.launch.lost_after_s or 60
    if (name := earlier()) is not None:
        raise Stopped(f"stopped by {name} before any rank was started; run the same command again")
    job = os.environ.get("SLURM_JOB_ID", "")
    port = choose_port(options.master_port, job or str(run.root), place.master, place.via != "no_ssh")
    folder = prepare_folder(run, place.hosts, list(place.ranks()), ["train", recipe, *overrides], place.via,
                            place.master, port, options.interface, lost_after_s, options.start_within)  # fmt: skip
    if place.via in ("pdsh", "openmpi") and not (place.via == "openmpi" and job):
        # Within a job mpirun starts its daemons through Slurm.
        others = [host.name for host in place.hosts if place.via == "pdsh" or not is_here(host.name)]
        check_hosts(others, sys.executable, folder / "spec.json")
    command = deepspeed_command(place, port, folder, _launcher_arguments(place, options))
    record_job(run, "train", job, "deepspeed", ",".join(host.name for host in place.hosts), host=os.uname().nodename,
               pid=os.getpid(), logs=str(folder))  # fmt: skip
    total = sum(host.slots for host in place.hosts)
    say(f"{total} ranks on {len(place.hosts)} host(s) from {place.source}, via {place.via}; logs: {folder}")
    # Outside a job srun makes one, and waits for it like any other.
    queued = place.via == "slurm" and not job
    front = Front(folder, place.ranks(), place.via, lost_after_s, options.start_within, options.stop_within, queued)
    env = launcher_environment(place.via, place.mpirun)
    with mpirun_session() as session:
        return front.run(command, env | session, code_root(), lambda: step.finished(config, run))


def choose_place(options: argparse.Namespace) -> Place:
    """Hosts and way to start, from the arguments or the Slurm job. Raises UsageError for arguments that cannot work,
    DistlmError where a program is missing."""
    _check_numbers(options)
    via = options.via
    in_job = bool(os.environ.get("SLURM_JOB_NODELIST"))
    if options.hostfile:
        hosts, source = read_hostfile(Path(options.hostfile)), options.hostfile
    elif options.hosts:
        hosts, source = parse_hosts(options.hosts), "--hosts"
    elif via == "local" or (via is None and not in_job):
        hosts, source = [Host("localhost", options.ranks)], "--ranks"
    else:
        hosts, source = slurm_hosts(os.environ, options.ranks, options.slots_per_node), "the Slurm job"
    require_ranks(hosts, options.ranks, source)
    here = len(hosts) == 1 and is_here(hosts[0].name)
    via = via or ("local" if here else "slurm" if in_job else "pdsh")
    if via == "local" and not here:
        raise UsageError(f"--via local: {source} names other hosts ({hosts[-1].name}); leave --via out, or use pdsh")
    if via in _EQUAL:
        require_equal(hosts, source, via)
    mpirun = _mpirun(via)
    node_rank = _node_rank(options, hosts) if via == "no_ssh" else None
    if via == "local":
        _check_devices(hosts[0].slots)
    master = options.master_addr or ("127.0.0.1" if via == "local" else hosts[0].name)
    require_address(master)
    return Place(hosts, source, via, master, node_rank, mpirun)


def _check_numbers(options: argparse.Namespace) -> None:
    """UsageError for a number that no start can have."""
    if options.ranks < 1:
        raise UsageError(f"--ranks {options.ranks}: must be 1 or more")
    if options.slots_per_node < 0:
        raise UsageError(f"--slots-per-node {options.slots_per_node}: must be 1 or more; leave it out to ask Slurm")
    if not 0 <= options.master_port < 65536:
        raise UsageError(f"--master-port {options.master_port}: must be 1 to 65535; leave it out for one of the job's")
    for name in ("start_within", "stop_within"):
        # Waits of at most a year: more is more than the system's calls take.
        if not 0 < getattr(options, name) <= 31_536_000:
            words = f"--{name.replace('_', '-')} {getattr(options, name):g}"
            raise UsageError(f"{words}: must be a number of seconds above 0, e.g. 600")
    try:
        shlex.split(options.launcher_args)
    except ValueError as error:
        raise UsageError(f"--launcher-args {options.launcher_args!r}: {error}; close what is quoted") from error


def deepspeed_command(place: Place, port: int, folder: Path, launcher_arguments: Sequence[str]) -> list[str]:
    """The `deepspeed` command line; every word of it is free of what shells and srun's lists would change."""
    # The interpreter by its path: other nodes have the PATH of sshd. `-m` and not bin/deepspeed for the same reason.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={folder / 'hosts'}"]
    command += [f"--master_addr={place.master}", f"--master_port={port}", "--no_ssh_check", "--no_local_rank"]
    if place.via == "no_ssh":
        command += ["--no_ssh", f"--node_rank={place.node_rank}"]
    elif place.via != "local":
        # Without it one host means a start on this machine, whatever host and launcher were named.
        command += [f"--launcher={place.via}", "--force_multi", f"--launcher_args={shlex.join(launcher_arguments)}"]
    return [*command, *rank_program(folder)]


def _launcher_arguments(place: Place, options: argparse.Namespace) -> list[str]:
    first = place.hosts[0]
    words: list[str] = []
    if place.via == "slurm":
        # deepspeed tells srun the number of tasks only.
        words = [f"--nodes={len(place.hosts)}", f"--nodelist={','.join(host.name for host in place.hosts)}"]
        words += [f"--ntasks-per-node={first.slots}", "--distribution=block", f"--mpi={options.mpi}", "--unbuffered"]
        # One rank that ends must not kill the others in their last save; a hung rest is ended after a minute.
        words += ["--kill-on-bad-exit=0", "--wait=60"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            # Slurm 22.05 to 23.02 do not inherit it from sbatch.
            words += [f"--cpus-per-task={cpus}"]
    elif place.via == "openmpi":
        # deepspeed insists on eth0, and nodes may have another interface.
        towards = next((host.name for host in place.hosts if not is_here(host.name)), "127.0.0.1")
        network = options.interface or subnet_towards(towards)
        words = ["--bind-to", "none", "--mca", "btl_tcp_if_include", network or "lo"]
    elif place.via == "mpich" and (address := address_towards(place.hosts[-1].name)):
        # Nodes call back, and may not know this machine by its name.
        words = ["-localhost", address]
    return words + shlex.split(options.launcher_args)


def _mpirun(via: str) -> Path | None:
    """Check that the program that `via` needs is here; returns, of several mpirun on PATH, the first of the right MPI.

    Raises DistlmError where there is none.
    """
    if via not in _NEEDED:
        return None
    tool, others = _NEEDED[via], []
    for folder in dict.fromkeys(launcher_environment(via)["PATH"].split(os.pathsep)):
        path = shutil.which(tool, path=folder)
        if path is None:
            continue
        if tool != "mpirun":
            return None
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout.strip()
        if ("Open MPI" in said) == (via == "openmpi"):
            return Path(path)
        others.append(f"{path} is of another MPI: {said.partition(chr(10))[0]}")
    found = f" ({', '.join(others)})" if others else ""
    raise DistlmError(
        f"--via {via}: {tool} is not installed on this machine{found}; install it, or use another --via "
        "(slurm needs srun; pdsh: pdsh and ssh; openmpi, mpich: mpirun; no_ssh: nothing)"
    )


def _node_rank(options: argparse.Namespace, hosts: Sequence[Host]) -> int:
    given = options.node_rank if options.node_rank is not None else os.environ.get("SLURM_NODEID")
    if given is None:
        raise UsageError(f"--via no_ssh: give --node-rank 0 to {len(hosts) - 1} on each of the {len(hosts)} hosts")
    if not 0 <= int(given) < len(hosts):
        raise UsageError(f"--node-rank {given}: there are {len(hosts)} hosts, so it must be 0 to {len(hosts) - 1}")
    return int(given)


def _check_devices(slots: int) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and len(visible.split(",")) < slots:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={visible} has {len(visible.split(','))} devices for {slots} ranks; "
            "ask for fewer --ranks, or for more GPUs"
        )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launchers.deepspeed", description=about.partition(":")[0], epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    return parser.parse_intermixed_args(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `deepspeed` takes."""
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help=", ".join(recipe_names()))
    parser.add_argument("--ranks", type=int, required=True, help="ranks in all; any other number is refused")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="FILE", help="`HOST slots=N` lines")
    where.add_argument("--hosts", metavar="A:4,B:4", help="hosts and slots; Slurm's brackets are understood")
    parser.add_argument("--slots-per-node", type=int, default=0, metavar="N", help="in a Slurm job, where it says else")
    parser.add_argument("--via", choices=VIAS, help="default: local for this machine, slurm in a job, else pdsh")
    parser.add_argument("--node-rank", type=int, metavar="I", help="no_ssh: place of this host in the hostfile, from 0")
    parser.add_argument("--master-addr", metavar="A", help="default: the first host")
    parser.add_argument("--master-port", type=int, default=0, metavar="P", help="default: from the job or run_dir")
    parser.add_argument("--mpi", default="none", help="srun --mpi (training itself needs none; default: %(default)s)")
    parser.add_argument("--interface", default="", help="network interface of gloo, NCCL and Open MPI, e.g. ib0")
    parser.add_argument("--launcher-args", default="", help="more words for srun, pdsh or mpirun")
    parser.add_argument(
        "--start-within",
        type=float,
        default=300,
        metavar="S",
        help="for all ranks to start, and then to join (%(default)s s)",
    )
    parser.add_argument("--stop-within", type=float, default=600, metavar="S", help="after a signal (%(default)s s)")


if __name__ == "__main__":
    try:
        main()
    finally:
        ignore_late_signals()
