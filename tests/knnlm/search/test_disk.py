"""A search and a cache ask for the disk of all their splits before they work, and for no more than they will hold."""

import pytest
from support.knn import copy_run, in_stage

from distlm.errors import DistlmError
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.plan import plan_search
from distlm.knnlm.search import states, units
from distlm.knnlm.search.disk import TokenBytes, peak_bytes
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.search.work import SplitWork
from distlm.runtime.files import bytes_below
from distlm.runtime.rundir import RunDir


def test_the_peak_is_that_of_the_splits_one_after_the_other():
    of = TokenBytes.of(width=1024, item=2, k=1024, candidates=2048)
    assert (of.kept, of.found, of.scores) == (2060 + 16384, 2060 + 32768, 8192)
    assert peak_bytes([10], of) == 10 * of.written
    # The most is there while a large split is written: the first one beside what was found of all.
    assert peak_bytes([10, 1], of) == 11 * of.found + 10 * (of.scores + of.kept)
    assert peak_bytes([1, 10], of) == 11 * of.kept + 10 * (of.scores + of.found)
    assert peak_bytes([3, 4], TokenBytes.of(1024, 2, 1024)) == 7 * of.kept
    assert peak_bytes([], of) == 0


def asked(monkeypatch):
    """What is asked of the disk; nothing is refused."""
    found = []
    monkeypatch.setattr(units, "require_free_disk", lambda folder, needed, what: found.append(needed))
    return found


def test_a_search_asks_once_for_what_all_splits_hold_at_most(indexed, tmp_path, monkeypatch):
    config = copy_run(indexed, tmp_path / "run")
    needed, held, real = asked(monkeypatch), [], SplitWork.finish

    def finish(self):
        """Before it removes what only the search needs."""
        held.append(bytes_below(RunDir.of(config).root / "neighbours", ".npy"))
        real(self)

    monkeypatch.setattr(SplitWork, "finish", finish)
    in_stage("knn", config, run_search)
    assert len(needed) == 1 and len(held) == 2
    # Besides the heads of the files.
    assert needed[0] < max(held) < 1.3 * needed[0]
    assert needed[0] == plan_search(config, 1).disk_bytes
    in_stage("knn", config, run_search)
    assert len(needed) == 1, "a finished search needs nothing"


def test_a_search_of_two_splits_is_refused_before_any_work(indexed, tmp_path, monkeypatch):
    """The disk has room for each of them, and not for both."""
    config = copy_run(indexed, tmp_path / "run")
    found = asked(monkeypatch)
    for split in config.knn.splits:
        one = copy_run(indexed, tmp_path / split, f"knn.splits=[{split}]")
        in_stage("knn", one, run_search)
    free = max(found) + 1

    def require(folder, needed, what):
        if needed > free:
            raise DistlmError(f"{folder}: {what} needs {needed}")

    monkeypatch.setattr(units, "require_free_disk", require)
    monkeypatch.setattr("distlm.knnlm.search.work.token_states", None)
    with pytest.raises(DistlmError, match="`distlm knn search` needs"):
        in_stage("knn", config, run_search)
    assert not list((tmp_path / "run").rglob("unit-*"))


def test_a_cache_asks_for_states_and_cache_of_all_splits_before_it_works(indexed, tmp_path, monkeypatch):
    config = copy_run(indexed, tmp_path / "run", "cache.use=true", "cache.windows=[20,50]")
    needed = asked(monkeypatch)
    in_stage("knn", config, run_cache)
    run = RunDir.of(config)
    written = sum(bytes_below(run.root / name, ".npy") for name in ("states", "cache"))
    assert len(needed) == 1 and needed[0] == pytest.approx(written, rel=0.1)
    monkeypatch.setattr(states, "token_states", None)
    in_stage("knn", config, run_cache)
    assert needed[1:] in ([], [0])
