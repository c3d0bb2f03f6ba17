"""A folder has one owner also where the file system has no locks, or each node its own: a lease that is renewed, taken
over from a silent owner alone, and given up by whoever finds another's."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import ENVIRONMENT, warm
from support.deadline import DEADLINE_S, until
from support.drivers import lock as lock_driver
from support.drivers import lock_race
from support.shims import shim

from distlm.errors import Busy
from distlm.runtime import lock
from distlm.runtime.locks import lease
from distlm.runtime.locks.lease import locks_span_nodes, new_owner, numbers_of, span_nodes
from distlm.runtime.locks.records import LockOwner
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.records import replaced


@contextmanager
def started(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that wants the lock."""
    process = subprocess.Popen(
        [sys.executable, lock_driver.__file__, str(folder), *words],
        env={**ENVIRONMENT, **warm.COLD, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def holder(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with started(folder, *words, **environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, said, errors


def take(folder: Path) -> list[str]:
    with lock.only_writer(folder, SingleComm(), "writing"):
        return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.2)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process cannot see those of the others, as on another node; and need not wait a minute."""
    monkeypatch.setattr(lease, "place", lambda: "another node")
    monkeypatch.setattr(lease, "STALE_S", 3 * lease.RENEW_S)
    monkeypatch.setattr(lock, "STALE_S", 3 * lease.RENEW_S)


def refused(folder: Path, wanted: dict[tuple[str, ...], str], **environment: str) -> None:
    """All of them at once, in other processes: each waits 5 s for the owner to end."""
    with ExitStack() as open_ones:
        processes = {
            words: open_ones.enter_context(started(folder, *words, **environment)) for words in wanted
        }  # fmt: skip
        for words, process in processes.items():
            code, said, _ = ended(process)
            assert code == 1 and wanted[words] in said, said


def test_one_at_a_time_without_flock(tmp_path: Path) -> None:
    without = shim(no_flock=True)
    with holder(tmp_path, **without) as first:
        owner = f"another run is writing here (pid {first.pid} on "
        refused(tmp_path, {(): owner, ("0/2",): owner}, **without)
        first.kill()
        first.wait()
        with holder(tmp_path, **without) as third:
            assert numbers_of(tmp_path / ".lock") == [2]
            assert ended(third)[0] == 0
    with holder(tmp_path, "1/2", **without) as share, holder(tmp_path, "0/2", **without):
        other = f"(pid {share.pid} on "
        # One after the other: without flock a run and a share that look at the same moment see each other.
        for words, said in (((), f"share 1/2: pid {share.pid}"), (("1/2",), other), (("2/3",), "that run at once")):
            refused(tmp_path, {words: said}, **without)


@pytest.mark.parametrize("without", [True, False], ids=["without flock", "with flock"])
def test_of_many_one_has_it(tmp_path: Path, without: bool) -> None:
    done = subprocess.run(
        [sys.executable, lock_race.__file__, str(tmp_path), "4", "4"],
        env={**ENVIRONMENT, **warm.COLD, **(shim(no_flock=True) if without else {})}, capture_output=True, text=True,
        timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.stdout == "0 16\n", done.stderr


@pytest.mark.usefixtures("elsewhere")
def test_an_owner_on_another_node_is_known_by_its_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "flocked", lambda _stream, _kind: None)
    with holder(tmp_path, **shim(no_flock=True)) as other:
        with pytest.raises(Busy, match=rf"another run is writing here \(pid {other.pid} on "):
            take(tmp_path)
        other.send_signal(signal.SIGSTOP)
        assert take(tmp_path) == [".lock", ".lock.2"]
        assert f"pid {other.pid} on " in (said := capfd.readouterr().err) and "gives no sign of life; waiting" in said
        # It wakes up, finds another's file, and ends.
        other.send_signal(signal.SIGCONT)
        code, _, errors = ended(other)
        assert code == 1 and "distlm: " in errors and "another run is at work here" in errors
    # Nothing is removed where that could hide an owner from one that has looked before.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.2"]
    assert take(tmp_path) == [".lock", ".lock.3"]


def test_a_lock_of_the_file_system_that_holds_on_all_nodes_says_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path) as other:
        monkeypatch.setattr(lease, "place", lambda: "another node")
        other.kill()
        other.wait()
        # Not its silence, however long that is.
        monkeypatch.setattr(lease, "STALE_S", math.inf)
        assert take(tmp_path) == [".lock", ".lock.2"]


def test_an_earlier_start_of_the_same_job_is_waited_for(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "50"}
    with holder(tmp_path, **job) as former, started(tmp_path, **job, SLURM_RESTART_COUNT="1") as again:
        assert again.stderr is not None and again.stdout is not None
        line = again.stderr.readline()
        assert f"start 1 of this same job is writing here (Slurm job 50, pid {former.pid} on " in line
        assert "waiting until it ends or has been silent for 60 s" in line
        # Longer than any other run is waited for.
        time.sleep(6)
        assert again.poll() is None
        former.kill()
        assert again.stdout.readline() == "held\n"
        with started(tmp_path, SLURM_JOB_ID="51", SLURM_RESTART_COUNT="1") as another:
            code, said, _ = ended(another)
            assert code == 1 and f"(Slurm job 50, pid {again.pid} on " in said


@pytest.mark.usefixtures("elsewhere")
def test_an_earlier_start_that_is_silent_is_followed_although_it_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on a node that has lost its network, whose locks the file server keeps."""
    with holder(tmp_path, SLURM_JOB_ID="50") as former:
        former.send_signal(signal.SIGSTOP)
        monkeypatch.setenv("SLURM_JOB_ID", "50")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert take(tmp_path) == [".lock", ".lock.2"]
        former.send_signal(signal.SIGCONT)
        code, _, errors = ended(former)
        assert code == 1 and "another run is at work here" in errors


def test_in_turn_comes_after_the_owner_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "flocked", lambda _stream, _kind: None)
    turns = []
    with holder(tmp_path, **shim(no_flock=True)) as other:

        def turn() -> None:
            turns.append(other.poll())
            if len(turns) == 3:
                other.kill()

        with lock.in_turn(tmp_path / ".lock", "preparing", turn):
            assert turns[:3] == [None] * 3 and other.wait(DEADLINE_S) == -signal.SIGKILL


@pytest.mark.usefixtures("elsewhere")
def test_what_is_just_being_written_is_no_owner_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read counts as silent; one that changes lives."""
    monkeypatch.setattr(lock, "flocked", lambda _stream, _kind: None)
    path = tmp_path / ".lock.7"
    path.write_text("")
    assert take(tmp_path) == [".lock", ".lock.8"]
    about = new_owner("somebody", "writing", "", 0, False)
    stop = threading.Event()

    def beat() -> None:
        nonlocal about
        while not stop.wait(0.05):
            about = replaced(about, beat=about.beat + 1, place="there")
            (tmp_path / ".lock.9").write_text(about.line()[: 20 if about.beat % 2 else None])

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        until((tmp_path / ".lock.9").exists)
        with pytest.raises(Busy):
            take(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_a_folder_that_is_moved_away_fences_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "end_start", lambda text, _code: pytest.fail(text))
    folder = tmp_path / "run"
    with lock.only_writer(folder, SingleComm(), "cleaning"):
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        time.sleep(0.3)
    assert not list(folder.iterdir())


class Clock:
    """Time passes where it is waited for, and what lives writes meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.living = time.monotonic(), list[Path]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for path in self.living:
            about = LockOwner.peek(path)
            assert about is not None
            path.write_text(replaced(about, beat=about.beat + 1).line(), "utf-8")


def shares_on_another_node(folder: Path, count: int, ended: int = 0) -> list[Path]:
    """Files of shares that no process of this node writes."""
    paths = [folder / f".lock-share-{index}-of-{count}.1" for index in range(count)]
    for index, path in enumerate(paths):
        path.with_suffix("").touch()
        about = new_owner(f"pid {index} on another", "writing", "", 0, False)
        path.write_text(replaced(about, place="another node", ended=index < ended).line(), "utf-8")
    return paths


@pytest.mark.parametrize("flock", [True, None], ids=["locks of each node", "no locks"])
@pytest.mark.parametrize("share", [None, lock.Share(0, 8)], ids=["all", "other shares"])
def test_killed_shares_on_other_nodes_are_all_free_after_one_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: lock.Share | None, flock: bool | None
) -> None:
    monkeypatch.setattr(lock, "locks_span_nodes", lambda _folder: False)
    monkeypatch.setattr(lock, "flocked", lambda _stream, _kind: flock)
    clock = Clock(monkeypatch)
    paths, began = shares_on_another_node(tmp_path, 16, ended=3), clock.now
    with lock.only_writer(tmp_path, SingleComm(), "writing", share):
        assert lease.STALE_S < clock.now - began < 1.1 * lease.STALE_S
    paths, clock.living = shares_on_another_node(tmp_path, 16), []
    for living, named in (([5], "share 5/16.*pid 5 on another"), ([5, 9], "share 5/16.*pid 5 on another")):
        began, clock.living = clock.now, [paths[index] for index in living]
        with pytest.raises(Busy, match=named) as refusal, lock.only_writer(tmp_path, SingleComm(), "writing", share):
            pass
        assert clock.now - began < 10 and "pid 4 on" not in str(refusal.value)


@contextmanager
def no_writes_beyond(size: int) -> Iterator[None]:
    """Of this process, into any file: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 20, 60])
def test_a_renewal_that_cannot_be_written_gives_no_folder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    fenced: list[str] = []
    monkeypatch.setattr(lease, "end_start", lambda text, _code: fenced.append(text))
    held = lease.claim(tmp_path / ".lock", 0, new_owner("somebody", "writing", "", 0, False))
    assert held is not None
    path = tmp_path / ".lock.1"

    def beat() -> int:
        about = LockOwner.peek(path)
        return 0 if about is None else about.beat

    until(lambda: beat() > 1)
    with no_writes_beyond(size):
        before = held._record.beat
        until(lambda: held._record.beat > before + 3 or not held._thread.is_alive())
        rival = lease.Rival(tmp_path / ".lock")
        rival.look()
        assert rival.number == 1 and rival.record is not None, "others still see whose it is"
    failed = held._record.beat
    until(lambda: beat() > failed or not held._thread.is_alive())
    assert not fenced and held._thread.is_alive()
    held.release()
    about = LockOwner.peek(path)
    assert about is not None and about.ended


def test_a_lease_that_cannot_be_written_at_first_leaves_none(tmp_path: Path) -> None:
    with no_writes_beyond(0), pytest.raises(OSError, match="File too large"):
        lease.claim(tmp_path / ".lock", 0, new_owner("somebody", "writing", "", 0, False))
    assert not list(tmp_path.iterdir())


MOUNTS = """\
22 1 0:20 / / rw,relatime - overlay overlay rw
30 22 0:31 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none
31 22 0:32 / /nolock rw - nfs server:/x rw,vers=3,nolock,local_lock=all
32 22 0:33 / /scratch rw - lustre mds:/scratch rw,flock
33 22 0:34 / /scratch/here rw - lustre mds:/here rw,localflock
34 22 0:35 / /none rw - lustre mds:/none rw,noflock
35 22 0:36 / /bee rw - beegfs beegfs_nodev rw
36 22 0:37 / /with\\040blank rw - fuse.sshfs host: rw
37 22 0:38 / /gpfs rw - gpfs gpfs rw
""".splitlines()


@pytest.mark.parametrize(
    ("folder", "spans"),
    [("/tmp/x", True), ("/home/me", True), ("/nolock/a", False), ("/scratch/a", True), ("/scratch/here/a", False),
     ("/none", False), ("/bee/run", False), ("/with blank/run", False), ("/gpfs/run", True), ("/homeless", True)],
)  # fmt: skip
def test_which_file_systems_lock_on_all_nodes(folder: str, spans: bool) -> None:
    assert span_nodes(Path(folder), MOUNTS) is spans
    assert isinstance(locks_span_nodes(Path("/")), bool)


def test_the_locks_of_a_folder_are_known_from_its_work() -> None:
    for name in (".lock", ".lock.3", ".lock-share-0-of-2", ".lock-share-0-of-2.1"):
        assert lock.is_lock(Path("x", name))
    for name in ("lock", ".locked", "keys.npy", ".lock3"):
        assert not lock.is_lock(Path("x", name))
    assert os.fspath(lock._share_lock(Path("x"), lock.Share(0, 2))).endswith(".lock-share-0-of-2")
