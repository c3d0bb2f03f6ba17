"""The watch over the ranks: who is lost is named, and nobody is called lost who is not."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.deadline import DEADLINE_S, until
from support.threads import ThreadComm

from distlm.errors import DistlmError
from distlm.runtime import alive
from distlm.runtime.alive import Watch
from distlm.runtime.ranks.world import World


def watch(folder: Path, rank: int, node: str = "here", lost_after_s: float = 0.6) -> Watch:
    folder.mkdir(exist_ok=True)
    made = Watch(folder, World(rank, 3, 0, 1, node, "slurm"), lost_after_s)
    made.beat()
    return made


def news_of(one: Watch, others: list[int]) -> str | None:
    """What `one` learns when it looks every 0.1 s for 2 s, by a clock of its own."""
    assert one.wait_for_files(others) == []
    one._local = {}
    return next(filter(None, (one._news(tick / 10) for tick in range(20))), None)


def test_a_silent_rank_is_named_with_its_node(tmp_path: Path) -> None:
    zero, _ = watch(tmp_path, 0), watch(tmp_path, 1, "far")
    news = news_of(zero, [1])
    assert news == "rank 1 on far is lost: no sign of life for 0.6 s (node down?)"


def test_everybody_watches_rank_0_and_rank_0_everybody(tmp_path: Path) -> None:
    watch(tmp_path, 0, "head")
    one, two = watch(tmp_path, 1), watch(tmp_path, 2)
    two.stop = None  # type: ignore[assignment,method-assign]
    assert "rank 0 on head" in (news_of(one, [0, 2]) or "")


def test_ranks_end_with_the_run_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    for value, known in ((f"{starter.pid} {alive.process_start(starter.pid)}", True), (f"{starter.pid} 1", False)):
        monkeypatch.setenv(alive.STARTER, value)
        one = watch(tmp_path, 0)
        assert bool(one._starter) == known, "what cannot be seen from here is not missed"
        assert one._news(0.0) is None
        if known:
            first = one
    starter.kill()
    starter.wait()
    assert first._news(0.1) == f"process {starter.pid}, which started this, is gone (killed?)"
    assert one._news(0.1) is None


def test_the_first_finding_is_what_all_report(tmp_path: Path) -> None:
    zero, one = watch(tmp_path, 0), watch(tmp_path, 1)
    watch(tmp_path, 2, "far")
    assert "rank 2 on far" in (zero._tell(2, "far", "no sign of life"))
    assert "rank 2 on far" in (news_of(one, [0]) or "")
    one._tell(0, "head", "a later rumour")
    assert json.loads((tmp_path / "lost.json").read_text())["rank"] == 2


def test_beating_ended_and_removed_ranks_are_not_lost(tmp_path: Path) -> None:
    zero, one, two = (watch(tmp_path, rank, lost_after_s=0.3) for rank in range(3))
    two.beat(ended=True)
    assert zero.wait_for_files([1, 2]) == []
    zero._local = {}
    for tick in range(30):
        one.beat()
        assert zero._news(tick / 10) is None
    for file in tmp_path.iterdir():
        file.unlink()
    assert zero._news(30.0) is None


def test_a_killed_process_of_this_node_is_noticed_without_waiting(tmp_path: Path) -> None:
    zero = watch(tmp_path, 0, lost_after_s=1000)
    process = multiprocessing.get_context("fork").Process(target=_beat_once, args=(tmp_path,))
    process.start()
    assert zero.wait_for_files([1]) == []
    about = zero._peers[1]
    zero._local = {1: about}
    assert about.started == alive.process_start(about.pid) != ""
    assert zero._news(0.0) is None
    os.kill(about.pid, signal.SIGKILL)
    news = until(lambda: zero._news(0.0), "news of the killed process")
    assert news == f"rank 1 on here is lost: its process {about.pid} is gone (killed?)"
    process.join()


def _beat_once(folder: Path) -> None:
    watch(folder, 1)
    time.sleep(60)


def test_leftovers_of_killed_starts_go_and_those_of_others_stay(tmp_path: Path) -> None:
    """By the stamps of the file system and the counts in the files, whatever this node's clock says."""
    own = watch(tmp_path / "own", 0).folder
    dead, lives, young = (watch(tmp_path / name, 0) for name in ("dead", "lives", "young"))
    day = 86400.0
    for other in (dead, lives):
        os.utime(other.folder, (own.stat().st_mtime - 2 * day,) * 2)
    leftovers = alive._Leftovers(own)
    leftovers.look(100.0, silent_s=60)
    lives.beat()
    os.utime(lives.folder, (own.stat().st_mtime - 2 * day,) * 2)
    leftovers.look(150.0, silent_s=60)
    assert len(list(tmp_path.iterdir())) == 4
    leftovers.look(161.0, silent_s=60)
    assert (
        {path.name for path in tmp_path.iterdir()}
        == {"own", "lives", "young"}
        == {each.folder.name for each in (lives, young)} | {"own"}
    )


@pytest.mark.parametrize("lost_after_s", [0.0, 30.0])
@pytest.mark.parametrize("shared", [True, False])
def test_a_start_that_ends_in_order_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_after_s: float, shared: bool
) -> None:
    monkeypatch.setattr(alive, "VISIBLE_AFTER_S", 0.2)
    roots = [tmp_path / "run", tmp_path / ("run" if shared else "another disk")]
    for root in roots:
        root.mkdir(exist_ok=True)
    barrier, box = threading.Barrier(2), [None] * 2

    def one(rank: int) -> str:
        world, comm = World(rank, 2, 0, 1, f"node{rank}", "slurm"), ThreadComm(rank, 2, barrier, box)
        try:
            with alive.watching(roots[rank], world, comm, lost_after_s):
                comm.allgather(None)
        except DistlmError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as ranks:
        said = list(ranks.map(one, range(2)))
    assert said == ["", ""] if shared else all("not shared, node1 cannot see" in text for text in said)
    assert not list(roots[0].iterdir())


def test_a_suspended_process_does_not_call_the_others_lost(tmp_path: Path) -> None:
    """The whole job stops for longer than the limit of 5 s and goes on (scontrol suspend): both go on."""
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "drivers" / "alive.py"),
        str(tmp_path / "watch"),
    ]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        until(lambda: all((tmp_path / f"watch-{rank}").exists() for rank in range(2)), "both ranks")
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        time.sleep(7)
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        assert [(rank.wait(DEADLINE_S), rank.stderr.read()) for rank in ranks] == [(0, ""), (0, "")]  # type: ignore[union-attr]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("message", ["Connection closed by peer [10.0.0.1]:3", "x: Broken pipe"])
def test_a_broken_connection_waits_for_the_culprit_s_name(tmp_path: Path, message: str) -> None:
    one = watch(tmp_path, 1, lost_after_s=0.3)
    one._local = {}
    started = time.monotonic()
    one._thread.start()
    one.leave(RuntimeError(message))
    assert time.monotonic() - started > 0.3
    assert "rank 1 on here" in (tmp_path / "lost.json").read_text()
