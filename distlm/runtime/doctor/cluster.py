"""`distlm doctor --cluster`: what a job over several ranks and nodes needs, checked by all ranks together.

Start it as the job will be started: `srun -N2 --ntasks-per-node=4 distlm doctor --cluster --folder /shared/runs`.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from distlm.errors import DistlmError
from distlm.runtime.alive import VISIBLE_AFTER_S
from distlm.runtime.doctor.checks import FEW_SHM, LEAST_DISK, MORE_SHM, Check
from distlm.runtime.doctor.machine import BROKE_OFF
from distlm.runtime.files import format_bytes
from distlm.runtime.lock import flocked
from distlm.runtime.locks.lease import STALE_S, locks_span_nodes
from distlm.runtime.ranks.comm import Comm, open_comm
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.ranks.device import default_device
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.ranks.world import World

SKEW_S = 2.0
"""Clocks may differ by this much: more confuses make-like tools, logs and time stamps of records."""
RENAMES = 200


@dataclass(frozen=True)
class Cluster:
    """All ranks of this start."""

    world: World
    comm: Comm
    worlds: list[World]
    folder: Path

    def everywhere(self, value: Any) -> dict[str, list[Any]]:
        """Node → what its ranks say."""
        found: dict[str, list[Any]] = {}
        for world, item in zip(self.worlds, self.comm.allgather(value), strict=True):
            found.setdefault(world.node, []).append(item)
        return found


def cluster_checks(world: World, folder: Path) -> list[Check]:
    """One line a check, the same on every rank. Collective. Raises DistlmError when the ranks cannot join."""
    try:
        comm = open_comm(world)
    except DistlmError as error:
        if world.rank != 0:
            # The report is rank 0's, which may not be there.
            raise
        return [Check("join", "fail", str(error), "start all ranks with one launcher, on nodes that reach each other")]
    cluster = Cluster(world, comm, comm.allgather(world), folder)
    checks: list[Check] = []
    for probe in PROBES:
        checks += _guarded(probe, cluster)
    comm.close()
    return checks


def _guarded(probe: Callable[[Cluster], Iterator[Check]], cluster: Cluster) -> list[Check]:
    try:
        return list(probe(cluster))
    except (OSError, RuntimeError, DistlmError) as error:
        found = f"{cluster.world}: {type(error).__name__}: {error}"
        return [Check(probe.__name__.lstrip("_"), "fail", found, BROKE_OFF)]


def _ranks(cluster: Cluster) -> Iterator[Check]:
    worlds = cluster.worlds
    nodes: dict[str, list[World]] = {}
    for world in worlds:
        nodes.setdefault(world.node, []).append(world)
    shape = ", ".join(f"{node}: ranks {' '.join(str(w.rank) for w in there)}" for node, there in nodes.items())
    wrong = [str(world) for number, world in enumerate(worlds) if world.rank != number or world.size != len(worlds)]
    if wrong:
        yield Check("world", "fail", f"the ranks disagree: {'; '.join(wrong)}", "start them with one launcher")
        return
    yield Check("world", "ok", f"{len(worlds)} ranks on {len(nodes)} nodes from {worlds[0].source} ({shape})")
    uneven = {node: len(there) for node, there in nodes.items() if len(there) != there[0].local_size}
    doubled = [node for node, there in nodes.items() if len({w.local_rank for w in there}) != len(there)]
    if uneven or doubled:
        found = f"on {', '.join({*uneven, *doubled})} the local ranks are not 0, 1, 2, …"
        yield Check("local ranks", "fail", found, "unset LOCAL_RANK and LOCAL_WORLD_SIZE: the launcher sets them")
    cores = cluster.everywhere(usable_cores())
    few = [f"{node} has {min(there)}" for node, there in cores.items() if min(there) < 2]
    found = f"per rank {min(min(c) for c in cores.values())} or more{'; ' * bool(few)}{', '.join(few)}"
    yield Check("cores", "warn" if few else "ok", found, "give --cpus-per-task, also to srun" if few else "")


def _collectives(cluster: Cluster) -> Iterator[Check]:
    kind = type(cluster.comm).__name__.removesuffix("Comm")
    start = time.perf_counter()
    cluster.comm.barrier()
    answer = cluster.comm.allgather(cluster.world.rank)
    good = answer == list(range(cluster.comm.size))
    text = f"allgather over {cluster.comm.size} ranks in {time.perf_counter() - start:.4f} s"
    mend = "" if good else f"the collectives of {kind} give wrong answers here: use another MPI, or --mpi=none"
    yield Check(f"stages: {kind}", "fail" if mend else "ok", text if good else f"allgather returned {answer}", mend)


def _training_group(cluster: Cluster) -> Iterator[Check]:
    import torch
    import torch.distributed as dist

    join_group(cluster.world)
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or "chosen by host name"
    yield from _all_reduce("gloo", torch.ones(1 << 20), cluster, f"interface {interface}")
    device = default_device(cluster.world)
    if device.type != "cpu":
        name = dist.get_default_backend_for_device(device)
        interface = os.environ.get("NCCL_SOCKET_IFNAME") or f"chosen by {name}"
        yield from _all_reduce(name, torch.ones(1 << 24, device=device), cluster, f"interface {interface}")
    dist.barrier()


def _all_reduce(name: str, tensor: Any, cluster: Cluster, note: str) -> Iterator[Check]:
    import torch.distributed as dist

    dist.all_reduce(tensor)
    tensor.fill_(1)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    right = float(tensor.flatten()[-1]) == cluster.world.size
    rate = tensor.numel() * tensor.element_size() / (time.perf_counter() - start)
    text = f"all_reduce at {format_bytes(rate)}/s or so; {note}"
    if right:
        yield Check(name, "ok", text)
    else:
        mend = f"training would be wrong: name another interface in {name.upper()}_SOCKET_IFNAME"
        yield Check(name, "fail", f"the sum over the ranks is wrong; {text}", mend)


def _master(cluster: Cluster) -> Iterator[Check]:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address:
        yield Check("master", "ok", "not needed by these collectives")
        return
    try:
        mine = socket.gethostbyname(address)
    except OSError as error:
        mine = f"unknown ({error})"
    seen = {node: there[0] for node, there in cluster.everywhere(mine).items()}
    blind = [node for node, found in seen.items() if found.startswith("unknown")]
    text = f"{address}:{port} is " + ", ".join(sorted(set(seen.values())))
    if blind:
        mend = "set MASTER_ADDR to an address instead of a name"
        yield Check("master", "fail", f"{text}; {', '.join(blind)} cannot resolve it", mend)
    else:
        yield Check("master", "ok", text)


def _shared_folder(cluster: Cluster) -> Iterator[Check]:
    comm, rank = cluster.comm, cluster.world.rank
    token = comm.bcast(uuid.uuid4().hex[:12])
    work = cluster.folder / f".distlm-doctor-{token}"
    made = True
    if rank == 0:
        try:
            work.mkdir(parents=True)
        except OSError:
            made = False
    if not comm.bcast(made):
        yield Check("folder", "fail", f"{cluster.folder}: rank 0 cannot write there", "choose another with --folder")
        return
    try:
        start = time.monotonic()
        while not work.exists() and time.monotonic() - start < VISIBLE_AFTER_S:
            time.sleep(0.02)
        late = cluster.everywhere(time.monotonic() - start if work.exists() else None)
        blind = [node for node, there in late.items() if None in there]
        if blind:
            mend = "put the run directory where all nodes mount it"
            yield Check("folder", "fail", f"{cluster.folder}: not shared, {', '.join(blind)} cannot see it", mend)
            return
        slowest = max(max(there) for there in late.values())
        yield Check("folder", "ok", f"{cluster.folder}: seen by all nodes, after {slowest:.2f} s at most")
        yield from _atomic_rename(cluster, work)
        yield from _locks(cluster, work)
    finally:
        comm.barrier()
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def _atomic_rename(cluster: Cluster, work: Path) -> Iterator[Check]:
    """Rank 0 replaces a file again and again; the others must always read a whole one."""
    place, ended = work / "renamed", work / "ended"
    size = 1 << 16
    comm, rank = cluster.comm, cluster.world.rank
    if rank == 0:
        place.write_bytes(bytes(size))
    comm.barrier()
    torn = reads = 0
    if rank == 0:
        for number in range(RENAMES):
            temporary = work / f"temporary-{number}"
            temporary.write_bytes(bytes([number % 256]) * size)
            temporary.replace(place)
        ended.touch()
    else:
        deadline = time.monotonic() + VISIBLE_AFTER_S
        while not ended.exists() and time.monotonic() < deadline:
            try:
                data = place.read_bytes()
            except OSError:
                # A stale handle of a network file system; a reader tries again.
                continue
            reads += 1
            torn += len(data) != size or len(set(data)) != 1
    torn_in_all, reads_in_all = (sum(comm.allgather(count)) for count in (torn, reads))
    text = f"{reads_in_all} reads of a file that was replaced {RENAMES} times, {torn_in_all} of them torn"
    mend = "choose another file system for run_dir=: records could be read half-written here" if torn_in_all else ""
    yield Check("rename", "fail" if mend else "ok", text, mend)


def _locks(cluster: Cluster, work: Path) -> Iterator[Check]:
    """Whether one of all ranks creates a file, and a lock of rank 0's holds on all nodes."""
    comm, rank = cluster.comm, cluster.world.rank
    comm.barrier()
    try:
        os.close(os.open(work / "exclusive", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        made = True
    except FileExistsError:
        made = False
    makers = sum(comm.allgather(made))
    with (work / "lock").open("a+") as stream:
        # Rank 0 first; it holds the lock until all have tried.
        mine = flocked(stream, fcntl.LOCK_EX) if rank == 0 else None
        comm.barrier()
        if rank != 0:
            mine = flocked(stream, fcntl.LOCK_EX)
        own = [node for node, got in cluster.everywhere(mine is True and rank != 0).items() if any(got)]
        without = [node for node, none in cluster.everywhere(mine is None).items() if any(none)]
        comm.barrier()
    silence = f"where a killed run was, another node's waits for {STALE_S:g} s of silence"
    if makers != 1:
        mend = "choose another file system for run_dir="
        found = f"{makers} ranks have each created the same file: two runs would not notice each other"
        yield Check("locks", "fail", found, mend)
    elif without:
        text = f"no flock on {', '.join(without)}: a run's folder is kept by signs of life alone, and {silence}"
        yield Check("locks", "warn", text)
    elif own and locks_span_nodes(work):
        mend = "have it mounted with locks over nodes, or choose another file system for run_dir="
        yield Check("locks", "fail", f"rank 0's lock does not hold on {', '.join(own)}, though the mount says so", mend)
    elif own:
        text = f"flock is each node's own (not on {', '.join(own)}): folders are kept by signs of life, and {silence}"
        yield Check("locks", "warn", text)
    else:
        yield Check("locks", "ok", f"one of {comm.size} ranks creates a file; flock holds on all nodes")


def _clocks(cluster: Cluster) -> Iterator[Check]:
    cluster.comm.barrier()
    # Each rank reads its clock when it leaves the barrier: the difference holds the barrier's own spread, milliseconds.
    times = cluster.everywhere(time.time())
    first = {node: min(there) for node, there in times.items()}
    spread = max(first.values()) - min(first.values())
    latest = max(first, key=lambda node: first[node])
    good = spread < SKEW_S
    text = f"{spread:.2f} s apart at most" + ("" if good else f" ({latest} is ahead); mend NTP on the nodes")
    # Whose clock stamps files: the node's own, or that of a server.
    stamps = [ahead for there in cluster.everywhere(_stamp(cluster.folder)).values() for ahead in there if ahead]
    apart = max(stamps, key=abs, default=0.0)
    if abs(apart) >= SKEW_S:
        way = "ahead of" if apart > 0 else "behind"
        text += f"; {cluster.folder} stamps files {abs(apart):.0f} s {way} a node's clock: mend NTP on its server, too"
    yield Check("clocks", "ok" if good and abs(apart) < SKEW_S else "warn", text)


def _stamp(folder: Path) -> float | None:
    """Seconds by which a new file's time is ahead of this node's clock; None where none can be made."""
    path = folder / f".distlm-doctor-{uuid.uuid4().hex[:12]}"
    try:
        path.touch()
        ahead = path.stat().st_mtime - time.time()
        path.unlink()
    except OSError:
        return None
    return ahead


def _room(cluster: Cluster) -> Iterator[Check]:
    existing = cluster.folder
    while not existing.exists():
        existing = existing.parent
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    mine = (shutil.disk_usage(existing).free, shm, psutil.virtual_memory().available)
    found = {node: there[0] for node, there in cluster.everywhere(mine).items()}
    least = [min(values[i] for values in found.values()) for i in range(3)]
    names = ("free in the folder", "in /dev/shm", "of memory available")
    text = ", ".join(f"{format_bytes(free)} {name}" for free, name in zip(least, names, strict=True))
    mends = ["free some, or choose another folder"] if least[0] < LEAST_DISK else []
    mends += [MORE_SHM] if least[1] <= FEW_SHM else []
    yield Check("room", "warn" if mends else "ok", f"least over the nodes: {text}", "; ".join(mends))


def _versions(cluster: Cluster) -> Iterator[Check]:
    names = ("distlm", "torch", "deepspeed", "numpy", "mpi4py", "faiss-cpu", "faiss-gpu", "safetensors")
    mine = {}
    for name in names:
        try:
            mine[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {node: there[0] for node, there in cluster.everywhere(mine).items()}
    different = [
        f"{name}: " + ", ".join(f"{node} {versions.get(name, 'none')}" for node, versions in found.items())
        for name in names
        if len({versions.get(name) for versions in found.values()}) > 1
    ]
    text = "; ".join(different) or "the same on all nodes"
    mend = "use one environment on all nodes" if different else ""
    yield Check("versions", "fail" if different else "ok", text, mend)


def _requeue(cluster: Cluster) -> Iterator[Check]:
    if not os.environ.get("SLURM_JOB_ID"):
        yield Check("requeue", "ok", "no Slurm job: whoever starts the ranks starts them again after exit code 75")
        return
    found = {node: there[0] for node, there in cluster.everywhere(_scontrol()).items()}
    without = [node for node, works in found.items() if not works]
    if without:
        text = (
            f"scontrol does not work on {', '.join(without)}: jobs there cannot requeue themselves, submit them again"
        )
        yield Check("requeue", "warn", text)
    else:
        yield Check("requeue", "ok", "scontrol works on all nodes")


def _scontrol() -> bool:
    if shutil.which("scontrol") is None:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


PROBES: tuple[Callable[[Cluster], Iterator[Check]], ...] = (
    _ranks, _collectives, _training_group, _master, _shared_folder, _clocks, _room, _versions, _requeue,
)  # fmt: skip
