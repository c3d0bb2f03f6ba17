"""4-bit codes: how they were compared is stated, and one search configuration is searched in one way."""

import json
import shutil

import pytest
from msgspec import UNSET
from support.knn import copy_run, in_stage
from support.records import unsealed
from support.store import file_hashes, tiny_config

from distlm.errors import DistlmError
from distlm.index import run_index_build
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search import work
from distlm.knnlm.search.neighbours import MANIFEST, PLAN, Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.rundir import RunDir

FOUR = ["index.factory=IVF16,PQ16x4", "knn.distances=quantised"]


@pytest.fixture(scope="module")
def four(indexed, tmp_path_factory):
    """A run with an index of 4-bit codes; read only."""
    config = copy_run(indexed, tmp_path_factory.mktemp("four") / "run", *FOUR)
    in_stage("index", config, run_index_build)
    return config


def scanned(config, scan, *more):
    """Of the same run directory, with another knn.scan."""
    other = tiny_config(config.run_dir, config.data.text_dir, [*FOUR, f"knn.scan={scan}", *more])
    in_stage("knn", other, run_search)
    return other


def without_fast_scan(path):
    """As an older version wrote it."""
    tree = unsealed(path)
    del tree["fast_scan"]
    path.write_text(json.dumps(tree), "utf-8")


@pytest.mark.parametrize(("first", "then", "fast"), [("queries", "lists", True), ("lists", "queries", False)])
def test_all_splits_are_searched_in_one_way_which_is_stated(four, tmp_path, first, then, fast):
    config = copy_run(four, tmp_path / "run", *FOUR)
    scanned(config, first, "knn.splits=[valid]")
    run = RunDir.of(config)
    assert Neighbours.open(run.neighbours("valid")).manifest.fast_scan is fast
    with pytest.raises(DistlmError, match=rf"valid: 4-bit codes were compared .*; set knn\.scan={first}, or remove"):
        scanned(config, then)
    assert not run.neighbours("test").exists()
    # What is finished answers.
    before = file_hashes(run.root / "neighbours")
    scanned(config, then, "knn.splits=[valid]")
    assert file_hashes(run.root / "neighbours") == before
    config = scanned(config, first)
    for function in (run_tune, run_evaluate):
        in_stage("knn", config, function)
    assert Results.read(run.results).settings.fast_scan is fast


def test_a_begun_search_goes_on_in_its_own_way_alone(four, tmp_path, monkeypatch):
    config = copy_run(four, tmp_path / "run", *FOUR, "knn.splits=[valid]")
    real = work.SplitWork.write_found

    def one(self, number, *found):
        if number:
            raise DistlmError("enough")
        real(self, number, *found)

    with monkeypatch.context() as patch:
        patch.setattr(work.SplitWork, "write_found", one)
        with pytest.raises(DistlmError, match="enough"):
            in_stage("knn", config, run_search)
    folder = RunDir.of(config).neighbours("valid")
    with pytest.raises(DistlmError, match=r"FastScan's tables of 8 bits there, knn\.scan=lists compares them as they"):
        scanned(config, "lists", "knn.splits=[valid]")
    # An older version did not state it: its searches are continued, and read, as they are.
    without_fast_scan(folder / PLAN)
    scanned(config, "lists", "knn.splits=[valid]")
    assert Neighbours.open(folder).manifest.fast_scan is UNSET
    in_stage("knn", config, run_search)
    in_stage("knn", config, run_tune)


def test_splits_that_were_searched_in_two_ways_are_not_evaluated_together(four, tmp_path):
    config = copy_run(four, tmp_path / "run", *FOUR)
    other = copy_run(four, tmp_path / "other", *FOUR)
    scanned(config, "queries", "knn.splits=[valid]")
    scanned(other, "lists", "knn.splits=[test]")
    folder = RunDir.of(config).neighbours("test")
    shutil.copytree(RunDir.of(other).neighbours("test"), folder)
    in_stage("knn", config, run_tune)
    with pytest.raises(DistlmError, match=r"fast_scan False, .*valid has True: the neighbours belong to another"):
        in_stage("knn", config, run_evaluate)
    without_fast_scan(folder / MANIFEST)
    in_stage("knn", config, run_evaluate)


def test_other_codes_state_nothing(searched):
    assert Neighbours.open(RunDir.of(searched).neighbours("valid")).manifest.fast_scan is UNSET
