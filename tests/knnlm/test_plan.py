"""What the plan says before the search against what the search leaves."""

from pathlib import Path

import pytest
from support.present import present

from distlm.config import load_config
from distlm.knnlm import plan
from distlm.knnlm.plan import plan_search
from distlm.runtime.rundir import RunDir


@pytest.fixture(autouse=True)
def a_machine_of_known_speed(monkeypatch):
    """Times are compared here, and the speed of a busy machine, measured twice, differs."""
    monkeypatch.setattr(plan, "machine_flops", lambda: 5e10)
    monkeypatch.setattr(plan, "rank_flops", lambda threads, ranks: 5e10)


def test_disk_is_announced_within_a_fifth(searched):
    run = RunDir(Path(searched.run_dir))
    arrays = sum(path.stat().st_size for path in (run.root / "neighbours").rglob("*.npy"))
    announced = plan_search(searched, 1)
    # Exact distances: the units of 2k candidates beside those of k, and fp32 distances, while the search runs.
    more = 1106 * 16 * 16
    peak = 2 * arrays + more + 1106 * 4 * 32
    assert arrays < announced.disk_bytes < peak
    assert "1106 queries x 16 neighbours among 4311 rows (valid, test)" in announced.line()


def test_wikitext103_needs_what_the_arithmetic_says(monkeypatch):
    sizes = {"valid": 217_646, "test": 245_569}

    def counts(config, splits=None):
        return plan._Counts(sum(sizes[split] for split in splits or sizes), 103_225_485, 267_744, (), True)

    monkeypatch.setattr(plan, "_count", counts)
    config = load_config("wikitext103", ["data.text_dir=unused"])
    exact = plan_search(config, 32)
    # 1024 neighbours of 16 bytes, chosen among 2048, and a key of 2 kB a token: all are found, then valid is written.
    found, kept, scores = 32768 + 2048, 16384 + 2048, 8192
    assert exact.disk_bytes == pytest.approx(463_215 * found + 217_646 * (kept + scores), rel=0.01)
    paper = plan_search(load_config("wikitext103-paper", ["data.text_dir=unused"]), 32)
    assert paper.disk_bytes == pytest.approx(463_215 * kept + 245_569 * (kept + 4096), rel=0.01)
    assert any("13.4 GB are free again" in note and "211.4 GB of keys are read once" in note for note in exact.notes)
    assert present(plan_search(config, 64).seconds) == pytest.approx(present(exact.seconds) / 2, rel=0.5)
    config.knn.distances = "quantised"
    quantised = plan_search(config, 32)
    assert quantised.disk_bytes < exact.disk_bytes / 2
    assert quantised.memory_bytes < exact.memory_bytes


def test_fast_scan_costs_memory_and_saves_time(monkeypatch):
    counts = plan._Counts(200_000, 2_000_000, 30_000, (), True)
    monkeypatch.setattr(plan, "_count", lambda config, splits=None: counts)
    eight, four = (
        plan_search(load_config("wikitext2-small", [f"index.factory=IVF2048,{code}", "data.text_dir=unused"]), 1)
        for code in ("PQ64", "PQ128x4")
    )
    # The same bytes on disk, and once more in memory: 72 a key, and at most 32 more codes a list.
    extra = four.memory_bytes - eight.memory_bytes
    assert 2_000_000 * 72 < extra < 2_000_000 * 72 + 2048 * 32 * 64 + 1
    assert present(four.seconds) < present(eight.seconds)
    assert any("repacks for FastScan, 0.1 GB" in note for note in four.notes)
    assert not any("FastScan" in note for note in eight.notes)
    monkeypatch.setattr(plan, "MOST_BYTES", 1 << 20)
    large = plan_search(load_config("wikitext2-small", ["index.factory=IVF2048,PQ128x4", "data.text_dir=unused"]), 1)
    assert large.memory_bytes == eight.memory_bytes and present(large.seconds) > present(eight.seconds)


def test_without_tokens_the_assumption_is_told(tmp_path):
    announced = plan_search(load_config("demo", [f"run_dir={tmp_path}"]), 1)
    assert "no token files yet" in announced.line()
