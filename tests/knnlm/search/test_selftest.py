"""The self-test: a sound search passes, every kind of broken one stops with its reason, leaving it out is recorded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.present import present

from distlm.config.schema import KnnConfig
from distlm.datastore.exchange.arrays import write_datastore
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import open_index
from distlm.index.search.searcher import SearchIndex, brute_search
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.search.neighbours import Neighbours, unit_folder
from distlm.knnlm.search.selftest import check_kept, search_problem, self_test
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.rundir import RunDir


def test_a_sound_search_passes_and_its_figures_are_in_the_results(searched):
    results = json.loads(RunDir(Path(searched.run_dir)).results.read_text())
    test = results["self_test"]
    assert test["run"]
    assert test["nprobe"] == searched.knn.nprobe
    assert 0.5 < test["expected"] <= 1
    assert test["found"] >= 0.95 * test["expected"]
    assert test["checked"] > 500
    assert "stored keys find their own row among 16" in results_table(
        Results.read(RunDir(Path(searched.run_dir)).results)
    )


def test_the_expectation_is_of_the_keys_own_codes(indexed):
    """A key that is nearer to its own code than the k-th neighbour is always found; the others mostly are not."""
    run = RunDir(Path(indexed.run_dir))
    store = Datastore.open(run.datastore)
    index = open_index(run.index, store)
    rows = np.arange(0, 512, 2)
    keys = np.asarray(store.keys(0)[rows], np.float32)
    encoded = index.encoded_distances(keys)
    ids, distances = index.search(keys, 1024, index.nlist)
    place = (ids == rows[:, None]).argmax(axis=1)
    there = (ids == rows[:, None]).any(axis=1)
    own = np.take_along_axis(distances, place[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(encoded[there], own[there], rtol=1e-3, atol=1e-4)
    assert there.mean() > 0.5
    assert (encoded[~there] >= 0.99 * distances[~there, -1]).all()


@pytest.mark.parametrize("case, reason", [
    ("shifted", "found their own row among 16"), ("unsorted", "not sorted"), ("outside", "was found, the store has"),
    ("twice", "found twice"), ("nan", "undefined"), ("probes", "1 lists were searched"),
])  # fmt: skip
def test_a_broken_search_stops_with_the_reason(indexed, tmp_path, monkeypatch, case, reason):
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    real = SearchIndex.search

    def broken(self, queries, k, nprobe):
        ids, distances = real(self, queries, k, nprobe)
        if case == "shifted":
            ids = np.where(ids < 0, -1, (ids + 1000) % self.rows)
        elif case == "unsorted":
            distances = distances[:, ::-1].copy()
            ids = ids[:, ::-1].copy()
        elif case == "outside":
            ids[3, 2] = -7
        elif case == "twice":
            ids[5, 1] = ids[5, 0]
        elif case == "nan":
            distances[2, 4] = np.nan
        elif case == "probes":
            self.set_nprobe(1)
        return ids, distances

    monkeypatch.setattr(SearchIndex, "search", broken)
    with pytest.raises(DistlmError, match=f"self-test failed: .*{reason}"):
        in_stage("knn", config, run_search)
    assert not RunDir.of(config).neighbours("valid").exists()


def test_brute_force_and_absent_neighbours_pass(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.search=brute", "knn.splits=[test]")
    in_stage("knn", config, run_search)
    test = Neighbours.open(RunDir.of(config).neighbours("test")).manifest.self_test
    assert test.nprobe is None
    assert present(test.found) >= present(test.expected) > 0.5
    ids, distances = np.array([[4, 2, -1]]), np.array([[0.5, 1.0, np.inf]], np.float32)
    assert search_problem(ids, distances, 5) is None
    assert "infinite" in present(search_problem(np.array([[4, 2, 3]]), distances, 5))


def replace(path: Path, array: np.ndarray) -> None:
    """Another file in its place: the run's files may be links."""
    path.unlink()
    np.save(path, array)


@pytest.mark.parametrize("name, reason", [("values", "values are not those"), ("distances", "not sorted"),
                                          ("ids", "the store has rows")])  # fmt: skip
def test_damaged_neighbours_stop_the_evaluation(searched, tmp_path, name, reason):
    # Checksums would find it before.
    config = copy_run(searched, tmp_path / "run", "launch.verify=false")
    path = unit_folder(RunDir.of(config).neighbours("test"), 0) / f"{name}.npy"
    array = np.load(path)
    replace(path, {"values": array[::-1], "distances": array[:, ::-1], "ids": array + 10**6}[name])
    with pytest.raises(DistlmError, match=rf"test, unit 0: self-test failed: .*{reason}"):
        in_stage("knn", config, run_evaluate)


def test_leaving_it_out_is_in_the_result(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.self_test=false", "knn.splits=[valid]")
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    results = json.loads(RunDir.of(config).results.read_text())
    assert results["self_test"] == {"run": False, "checked": 0}
    assert "not run" in results_table(Results.read(RunDir.of(config).results))


def test_every_unit_of_the_kept_files_is_sampled(searched):
    run = RunDir(Path(searched.run_dir))
    neighbours = Neighbours.open(run.neighbours("valid"))
    assert len(neighbours.manifest.units) <= check_kept(neighbours, Datastore.open(run.datastore))


def test_copies_of_a_key_answer_for_it(tmp_path):
    """A text that repeats itself has more equal keys than a search returns."""
    random = np.random.default_rng(0)
    different = random.standard_normal((20, 8)).astype(np.float32)
    store = write_datastore(tmp_path / "store", np.tile(different, (100, 1)), np.zeros(2000, int))
    knn = KnnConfig(k=4)
    source: Any = SimpleNamespace(
        knn=knn, datastore=store, index=None, search=lambda keys, k: brute_search(store, keys, k)
    )
    assert present(self_test(source).found) == 1
    ids, distances = brute_search(store, different, 4)
    # Copies of another key answer for nothing.
    source.search = lambda keys, k: tuple(np.resize(found, (len(keys), 4)) for found in (ids + 1, distances))
    with pytest.raises(DistlmError, match="found their own row among 4") as caught:
        self_test(source)
    assert "build the index" not in str(caught.value) and "datastore verify" in str(caught.value)


def test_what_is_asked_in_vain_is_said_before_the_search(indexed, tmp_path, capsys):
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]", "knn.nprobe=500")
    in_stage("knn", config, run_search)
    assert capsys.readouterr().err.count("knn.nprobe=500 is more than the index's 16 lists: all are searched") == 1
    config.knn.k = 10**6
    with pytest.raises(UsageError, match=r"knn.k=1000000: the datastore has \d+ rows; lower knn.k"):
        in_stage("knn", config, run_search)
