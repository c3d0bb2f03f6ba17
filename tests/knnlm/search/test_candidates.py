"""knn.candidates: exact distances choose k among more neighbours of the index."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.store import file_hashes

from distlm.config import load_config
from distlm.config.schema import KnnConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import brute_search, open_index, run_index_build
from distlm.index.search.candidates import candidates_of, is_coarse, refuse_too_many
from distlm.index.search.file import search_file
from distlm.index.search.searcher import exactly_ordered
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.plan import plan_search
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


def ids_and_queries(neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    units = list(neighbours.units())
    ids, queries = (np.concatenate([np.asarray(getattr(unit, name)) for unit in units]) for name in ("ids", "queries"))
    return ids, queries


def searched_with(indexed, folder: Path, *settings: str) -> Neighbours:
    config = copy_run(indexed, folder, "knn.splits=[valid]", *settings)
    if any(setting.startswith("index.factory") for setting in settings):
        in_stage("index", config, run_index_build)
    in_stage("knn", config, run_search)
    return Neighbours.asked(RunDir.of(config), "valid", config.knn)


def true_share(neighbours: Neighbours, store: Datastore) -> float:
    """Of the k nearest of all keys that were found."""
    ids, queries = ids_and_queries(neighbours)
    nearest, _ = brute_search(store, queries.astype(np.float32), neighbours.k)
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, nearest, strict=True)]))


@pytest.mark.parametrize(
    ("asked", "said", "mend"),
    [
        ({"k": 1500}, r"knn\.candidates=3000: .*at most 2048; set knn\.candidates=2048 or less", {"candidates": 2048}),
        ({"k": 3000}, r"knn\.k=3000: .*set knn\.k=2048", {"k": 2048, "candidates": 2048}),
        ({"nprobe": 4096}, r"knn\.nprobe=4096: .*set knn\.nprobe=2048", {"nprobe": 2048}),
        ({"k": 1500}, r"or knn\.scan=queries", {"scan": "queries"}),
        ({"k": 1500}, "candidates", {"search": "brute"}),
    ],
)
def test_more_than_a_gpu_takes_is_refused_before_work(asked, said, mend):
    """Coarse codes are asked for twice knn.k, and it is their number that is to be set."""
    knn = KnnConfig(scan="gpu", **asked)
    with pytest.raises(UsageError, match=said):
        refuse_too_many(knn, candidates_of(knn, 1_000_000, coarse=True), 5000)
    knn = replace(knn, **mend)
    refuse_too_many(knn, candidates_of(knn, 1_000_000, coarse=True), 5000)
    refuse_too_many(KnnConfig(scan="gpu", nprobe=4096), 2048, 1024)


def test_every_search_says_before_work_what_a_gpu_does_not_take(indexed, tmp_path, monkeypatch):
    monkeypatch.setattr("distlm.index.search.candidates.MOST_ON_GPU", 10)
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]", "knn.scan=gpu")
    opened = open_index
    monkeypatch.setattr("distlm.knnlm.search.source.open_index", lambda path, store, scan, copies: opened(path, store))
    monkeypatch.setattr("distlm.knnlm.search.stage.self_test", None)
    for search in (
        lambda: in_stage("knn", config, run_search),
        lambda: plan_search(config, 1),
        lambda: search_file(config, SingleComm(), store_queries(config, tmp_path), tmp_path / "out.npz"),
    ):
        with pytest.raises(UsageError, match=r"knn\.k=16: knn\.scan=gpu takes at most 10; set knn\.k=10 or less"):
            search()


def store_queries(config, folder: Path) -> Path:
    np.save(folder / "queries.npy", Datastore.open(RunDir.of(config).datastore).keys(0)[:4])
    return folder / "queries.npy"


@pytest.mark.parametrize("factory", ["PCAR16,IVF16_HNSW8,RaBitQ", "IVF16,PQ4", "PCA8,IVF16,SQ4", "IVF16,SQ6"])
def test_the_nearest_of_more_candidates_are_kept(indexed, tmp_path, factory):
    """Through every stage, with the codes that index.factory=auto and `index tune` may choose."""
    name = f"index.factory={factory}"
    found = searched_with(indexed, tmp_path / "run", name, "knn.candidates=64", "knn.nprobe=16")
    config = copy_run(indexed, tmp_path / "plain", name, "knn.candidates=1", "knn.nprobe=16", "knn.splits=[valid]")
    assert found.k == 16 and found.manifest.candidates == 64
    store = Datastore.open(RunDir(tmp_path / "run").datastore)
    index = open_index(RunDir(tmp_path / "run").index, store)
    ids, queries = ids_and_queries(found)
    wanted, _ = index.search(queries.astype(np.float32), 64, 16)
    wanted, _ = exactly_ordered(store, queries, wanted, 16)
    assert (ids == wanted).mean() > 0.99, "but for ties"
    in_stage("index", config, run_index_build)
    in_stage("knn", config, run_search)
    plain = Neighbours.asked(RunDir.of(config), "valid", config.knn)
    assert not plain.manifest.candidates
    fine = factory == "IVF16,SQ6"
    more, few = true_share(found, store), true_share(plain, store)
    assert more > few + (0 if fine else 0.05) and (more > 0.99 if fine else more > 0.8)


def test_by_default_coarse_codes_get_twice_as_many(indexed, tmp_path, capsys):
    coarse = searched_with(indexed, tmp_path / "coarse")
    assert coarse.manifest.candidates == 32 and "exact distances choose 16 of 32" in capsys.readouterr().err
    assert not searched_with(indexed, tmp_path / "fine", "index.factory=IVF16,SQ8").manifest.candidates
    for other in ("knn.search=brute", "knn.distances=quantised", "knn.similarity=dot"):
        assert not searched_with(indexed, tmp_path / other, other).manifest.candidates


def test_how_many_there_are() -> None:
    knn = KnnConfig(k=10)
    assert (candidates_of(knn, 1000, True), candidates_of(knn, 1000, False), candidates_of(knn, 15, True)) == (
        20,
        10,
        15,
    )
    assert [candidates_of(KnnConfig(k=10, candidates=count), 1000, True) for count in (1, 10, 70)] == [10, 10, 70]
    assert candidates_of(KnnConfig(k=10, candidates=70, distances="exact"), 40, False) == 40
    assert is_coarse(64, 1024) and is_coarse(127, 256) and not is_coarse(128, 256)


def test_a_search_that_was_begun_keeps_its_number(indexed, tmp_path):
    """An older version took k. What it has finished is the answer, also where it has finished one split of two."""
    old = copy_run(indexed, tmp_path / "run", "knn.candidates=1", "knn.splits=[valid]")
    in_stage("knn", old, run_search)
    root = Path(old.run_dir) / "neighbours"
    (label,) = (path.name for path in root.iterdir())
    (root / label).rename(root / label.replace("_c1", ""))
    before = file_hashes(root)
    now = copy_run(old, tmp_path / "now", "knn.splits=[valid,test]")
    in_stage("knn", now, run_search)
    assert before.items() <= file_hashes(tmp_path / "now" / "neighbours").items()
    for split in ("valid", "test"):
        found = Neighbours.asked(RunDir.of(now), split, now.knn)
        assert not found.manifest.candidates and found.folder.parent.name == label.replace("_c1", "")


def test_a_number_that_is_asked_for_has_files_of_its_own(searched, tmp_path):
    first = copy_run(searched, tmp_path / "run")
    before = file_hashes(Path(first.run_dir) / "neighbours")
    more = copy_run(first, tmp_path / "more", "knn.candidates=48", "knn.splits=[valid]")
    in_stage("knn", more, run_search)
    run = RunDir.of(more)
    assert run.label.endswith("_exact_c48_k16") and before.items() <= file_hashes(run.root / "neighbours").items()
    # The first neighbours of those of a larger k answer.
    fewer = copy_run(more, tmp_path / "fewer", "knn.candidates=48", "knn.splits=[valid]", "knn.k=8")
    kept = file_hashes(Path(fewer.run_dir) / "neighbours")
    in_stage("knn", fewer, run_search)
    assert file_hashes(Path(fewer.run_dir) / "neighbours") == kept
    # A folder that somebody names must have been searched so.
    folder = RunDir.of(first).neighbours("valid").parent
    named = copy_run(first, tmp_path / "named", "knn.candidates=48", "knn.splits=[valid]", f"knn.folder={folder}")
    with pytest.raises(DistlmError, match=r"of 32 candidates, knn.candidates=48; use knn.candidates=0"):
        in_stage("knn", named, run_tune)


def test_results_say_what_more_candidates_would_find(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run", "knn.candidates=64")
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    results = Results.read(RunDir.of(config).results)
    ladder = given(results.ladder)
    assert ladder is not None and ladder.searched == 64
    rungs = {one.candidates: one for one in given(ladder.candidates)}
    assert list(rungs) == [16, 32, 64]
    assert rungs[16].recall < rungs[32].recall < rungs[64].recall == ladder.rescored.recall
    assert rungs[64].loss_nats == ladder.rescored.loss_nats
    assert f"of 32 {rungs[32].perplexity:.2f} (recall" in results_table(results)


@pytest.mark.parametrize("other", ["knn.search=brute", "knn.distances=quantised", "knn.similarity=dot"])
def test_candidates_without_a_choice_are_refused(other: str) -> None:
    with pytest.raises(UsageError, match=r"knn.candidates=1000: is for neighbours of an index that exact squared L2"):
        load_config("demo", ["knn.candidates=1000", other])
    assert load_config("demo", ["knn.candidates=1", other]).knn.candidates == 1
