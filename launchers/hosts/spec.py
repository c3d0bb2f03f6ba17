"""What a deepspeed front hands to its ranks: a folder with the hostfile and the specification, and environments.

Launchers lose most of the environment on the way (pdsh and mpirun hand on a few prefixes, ssh nothing), and put quotes
into the values they do hand on. So the ranks read it from a file, and the launchers get only what they need themselves.
"""

import json
import os
import re
import socket
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from distlm.errors import DistlmError
from distlm.installed import tree
from distlm.runtime.ranks.mpirun import root_allowed
from distlm.runtime.ranks.rendezvous import JOIN_WITHIN
from distlm.runtime.rundir import RunDir
from launchers.hosts import rank as rank_module
from launchers.hosts.net import shell_safe
from launchers.hosts.nodes import Host, write_hostfile
from launchers.hosts.rank import process_start
from launchers.jobs import LAUNCH
from launchers.records import FrontProcess, StartSpec
from launchers.stages.dispatch import clean_environment

# A node's own, and what belongs to this shell only.
_NODE_OWN = re.compile(
    r"HOME|HOSTNAME|LOGNAME|USER|SHELL|SHLVL|PWD|OLDPWD|TERM|DISPLAY|TMPDIR|MAIL|_|LS_COLORS|SSH_.*|XDG_.*|DBUS_.*|"
    r"CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|CROSS_(RANK|SIZE)|LOCAL_SIZE|"
    r"PRTE_.*|HYDRA?_.*|MPI_LOCAL.*|BASH_FUNC_.*"
)
# What deepspeed's runner hands on through shells and srun's comma-separated --export.
_HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_ENV_FILE = ".deepspeed_env"


def code_root() -> Path:
    """The first folder on every rank's path, so that all run the code of the front: that with the launchers."""
    return tree()


def prepare_folder(
    run: RunDir, hosts: Sequence[Host], ranks: Sequence[int], arguments: Sequence[str], via: str, master: str,
    port: int, interface: str, lost_after_s: float, join_within_s: float,
) -> Path:  # fmt: skip
    """Make RUN/launch/deepspeed/TIME-HOST-PID with hostfile and spec.json; returns it.

    `ranks` are those that this front starts, `arguments` those of `distlm`. The file holds the environment, so only its
    owner may read it.
    """
    pid, node = os.getpid(), socket.gethostname()
    folder = run.root / LAUNCH / "deepspeed" / f"{time.strftime('%Y%m%d-%H%M%S')}-{node}-{pid}"
    folder.mkdir(parents=True)
    write_hostfile(folder / "hosts", hosts)
    spec = StartSpec(
        arguments=list(arguments),
        cwd=str(Path.cwd()),
        code=str(code_root()),
        via=via,
        ranks=list(ranks),
        env=rank_environment(via, sum(host.slots for host in hosts), master, port, interface, join_within_s),
        front=FrontProcess(node, pid, process_start(pid)),
        lost_after_s=lost_after_s,
        # A save of a large model takes minutes; nobody waits for a rank whose front is gone longer than this.
        kill_after_s=600,
    )
    descriptor = os.open(folder / "spec.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(spec.tree(), stream, indent=1)
    return folder


def rank_program(folder: Path) -> list[str]:
    """Script and argument that the launcher starts on every node. DistlmError where their path would not arrive."""
    script = str(Path(rank_module.__file__).resolve())
    for path in (script, sys.executable):
        if not shell_safe(path):
            raise DistlmError(
                f"{path}: the launchers' shells break a path with such characters; install distlm elsewhere"
            )
    # A script, because the slurm launcher ignores --module.
    return [script, urllib.parse.quote(str(folder))]


def rank_environment(
    via: str, ranks: int, master: str, port: int, interface: str, join_within_s: float
) -> dict[str, str]:
    """What every rank gets over its node's own environment."""
    mine = {name: value for name, value in clean_environment(os.environ).items() if not _NODE_OWN.fullmatch(name)}
    mine |= _deepspeed_env_file()
    if via in ("local", "no_ssh"):
        # deepspeed numbers the devices from 0, although this job may have been given others.
        for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            if os.environ.get(name):
                mine[name] = os.environ[name]
    if job := os.environ.get("SLURM_JOB_ID"):
        mine["SLURM_JOB_ID"] = job
    mine |= {"DISTLM_RANKS": str(ranks), "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    # Of several fronts (no_ssh) none sees the ranks of the others: that these do not come, the ranks themselves find.
    mine[JOIN_WITHIN] = f"{join_within_s:g}"
    mine |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **root_allowed()}
    mine["PATH"] = _path()
    # Operators that one launcher's environment compiled are compiled anew by another's, for minutes.
    if home := _home():
        mine.setdefault("TORCH_EXTENSIONS_DIR", str(home / ".cache" / "torch_extensions" / f"distlm-{via}"))
    if interface or master.startswith("127."):
        name = interface or "lo"
        mine.setdefault("GLOO_SOCKET_IFNAME", name)
        mine.setdefault("NCCL_SOCKET_IFNAME", name)
    return mine


def launcher_environment(via: str, mpirun: Path | None = None) -> dict[str, str]:
    """The environment of `deepspeed` itself, which finds `mpirun` first."""
    keep_job = {name: value for name, value in os.environ.items() if name.startswith("SLURM")}
    env = clean_environment(os.environ) | keep_job
    env = {
        name: value for name, value in env.items() if not name.startswith(_HANDED_ON) or shell_safe(value)
    } | root_allowed()  # fmt: skip
    env["PATH"] = f"{mpirun.parent}{os.pathsep}{_path()}" if mpirun else _path()
    # Its values are in the specification already, without the quotes that the runner would add.
    env["DS_ENV_FILE"] = f"{_ENV_FILE}.read-by-distlm"
    if via == "pdsh":
        env["PDSH_SSH_ARGS_APPEND"] = f"{env.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes".strip()
    return env


def _deepspeed_env_file() -> dict[str, str]:
    """NAME=VALUE lines of deepspeed's own files, home folder's first; values as they are written."""
    values: dict[str, str] = {}
    for folder in filter(None, (_home(), Path.cwd())):
        path = folder / os.environ.get("DS_ENV_FILE", _ENV_FILE)
        if not _is_file(path):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            name, equals, value = line.strip().partition("=")
            if not name or name.startswith("#"):
                continue
            if not equals:
                raise DistlmError(f"{path}:{number}: {line!r}: expected NAME=VALUE")
            values[name.strip()] = value.strip()
    return values


def _home() -> Path | None:
    """The user's home folder; containers may know neither HOME nor the user."""
    try:
        return Path.home()
    except (RuntimeError, OSError):
        return None


def _is_file(path: Path) -> bool:
    """A file is there; not in a folder that this user may not enter."""
    try:
        return path.is_file()
    except OSError:
        return False


def _path() -> str:
    """PATH with this Python's folder first: mpirun and ninja of the same environment."""
    return os.pathsep.join(filter(None, (str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
