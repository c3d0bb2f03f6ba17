"""The search stage: what its files hold, that it continues where it stopped, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.knn import copy_run, in_stage, one_writer_at_a_time
from support.records import alter
from support.store import add_checkpoint, file_hashes

from distlm.config import load_config
from distlm.data.blocks import Blocks, eval_blocks
from distlm.data.tokens import TokenFiles
from distlm.datastore.extract import hidden_states
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import brute_search
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search import neighbours, work
from distlm.knnlm.search import stage as search
from distlm.knnlm.search.cut import Cut, cut_of, planned_cut
from distlm.knnlm.search.neighbours import Neighbours, read_unit, unit_folder
from distlm.knnlm.search.rescore import row_ranges
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.io import load_model
from distlm.runtime.checked import problem
from distlm.runtime.rundir import RunDir


def parts(config):
    run = RunDir.of(config)
    return run, Datastore.open(run.datastore), TokenFiles.open(run.tokens(config))


def joined(neighbours, name):
    return np.concatenate([np.asarray(getattr(unit, name)) for unit in neighbours.units()])


def all_keys(store):
    return np.concatenate([np.asarray(store.keys(shard.index)) for shard in store.shards]).astype(np.float64)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_token_is_there_once_with_the_models_probability(searched, split):
    run, store, tokens = parts(searched)
    ids = tokens.split(split)
    neighbours = Neighbours.open(run.neighbours(split))
    np.testing.assert_array_equal(joined(neighbours, "targets"), ids)
    model, _ = load_model(run.model_checkpoint(searched))
    blocks = eval_blocks(ids, searched.knn.context_window, searched.knn.block)
    # Block by block: other batches than the stage makes, so equal up to rounding.
    alone = [hidden_states(model, ids, blocks, [i], store.tap, with_log_probs=True) for i in range(len(blocks))]
    np.testing.assert_allclose(joined(neighbours, "log_probs"), np.concatenate([x.log_probs for x in alone]), atol=1e-5)
    queries = np.concatenate([x.keys for x in alone])
    np.testing.assert_allclose(joined(neighbours, "queries"), queries, atol=2e-3)
    assert joined(neighbours, "queries").dtype == store.key_dtype
    assert neighbours.tokens == len(ids) == sum(len(unit) for unit in neighbours.units())
    assert len(neighbours.manifest.units) > 1


def test_neighbours_are_rows_of_the_store_at_their_true_distance(searched):
    run, store, _ = parts(searched)
    neighbours = Neighbours.open(run.neighbours("valid"))
    keys = all_keys(store)
    values = np.concatenate([np.asarray(store.values(shard.index)) for shard in store.shards])
    ids, queries = joined(neighbours, "ids"), joined(neighbours, "queries").astype(np.float64)
    distances = joined(neighbours, "distances")
    assert ids.min() >= 0
    np.testing.assert_array_equal(joined(neighbours, "values"), values[ids])
    np.testing.assert_allclose(distances, ((queries[:, None] - keys[ids]) ** 2).sum(-1), rtol=1e-5, atol=1e-4)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert neighbours.manifest.distances == "exact"
    assert not any(map(problem, neighbours.written()))


def test_brute_force_finds_the_nearest_rows_of_all(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.search=brute", "knn.splits=[valid]")
    in_stage("knn", config, run_search)
    run, store, _ = parts(config)
    neighbours = Neighbours.open(run.neighbours("valid"))
    queries = joined(neighbours, "queries").astype(np.float64)
    true = np.sort(((queries[:, None] - all_keys(store)) ** 2).sum(-1), axis=1)[:, : config.knn.k]
    np.testing.assert_allclose(joined(neighbours, "distances"), true, rtol=1e-5, atol=1e-5)
    assert neighbours.manifest.index == "brute"
    ids, _ = brute_search(store, queries.astype(np.float32), config.knn.k)
    assert (joined(neighbours, "ids") == ids).mean() > 0.99


def test_quantised_distances_are_the_indexs_own_and_say_so(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.distances=quantised", "knn.splits=[valid]")
    in_stage("knn", config, run_search)
    run, _, _ = parts(config)
    quantised = Neighbours.open(run.neighbours("valid"))
    plain = copy_run(indexed, tmp_path / "plain", "knn.candidates=1", "knn.splits=[valid]")
    in_stage("knn", plain, run_search)
    exact = Neighbours.open(RunDir.of(plain).neighbours("valid"))
    assert quantised.manifest.distances == "quantised"
    ids = joined(quantised, "ids")
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.sort(joined(exact, "ids"), axis=1))
    assert not np.allclose(joined(quantised, "distances"), joined(exact, "distances"), rtol=1e-3)
    assert (np.diff(joined(quantised, "distances"), axis=1) >= 0).all()


@pytest.mark.parametrize("how", ["brute", "index"])
def test_dot_products_weigh_the_neighbours_that_l2_found(indexed, tmp_path, how):
    l2 = copy_run(indexed, tmp_path / "l2", f"knn.search={how}", "knn.splits=[valid]", "knn.candidates=1")
    in_stage("knn", l2, run_search)
    config = copy_run(indexed, tmp_path / "dot", f"knn.search={how}", "knn.splits=[valid]", "knn.similarity=dot")
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    run, store, _ = parts(config)
    found, other = (Neighbours.open(RunDir(Path(c.run_dir)).neighbours("valid")) for c in (config, l2))
    ids, distances = joined(found, "ids"), joined(found, "distances")
    np.testing.assert_array_equal(np.sort(ids), np.sort(joined(other, "ids")))
    dots = np.einsum("qd,qkd->qk", joined(found, "queries").astype(np.float64), all_keys(store)[ids])
    dots[ids < 0] = -np.inf
    np.testing.assert_allclose(distances, dots.max(axis=1, keepdims=True) - dots, atol=1e-3)
    assert (np.diff(np.where(ids < 0, 1e9, distances)) >= 0).all() and (ids >= 0).all(axis=1).any()
    results = json.loads(run.results.read_text("utf-8"))
    assert results["settings"]["similarity"] == "dot" and "weighed by the dot product" in results["exactness"]
    assert results["splits"]["valid"]["knn"]["loss_nats"] <= results["splits"]["valid"]["lm"]["loss_nats"]
    # Each row's nearest is at 0: λ does not depend on it.
    assert "knn_buckets" not in results["splits"]["valid"] and results["settings"]["adaptive"]["buckets"] == 0


def test_by_dot_product_fewer_neighbours_are_searched_by_themselves(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.similarity=dot", "knn.splits=[valid]")
    folders, fewer = {}, dataclasses.replace(config, knn=dataclasses.replace(config.knn, k=8, ks=[8]))
    for one in (config, fewer):
        assert in_stage("knn", one, run_search)["tokens"] > 0
        folders[one.knn.k] = RunDir.of(one).kept_neighbours("valid")
    whole, own = (joined(Neighbours.open(folder), "ids") for folder in folders.values())
    assert own.shape[1] == 8 and (np.sort(whole[:, :8]) != np.sort(own)).any()
    l2 = copy_run(indexed, tmp_path / "l2", "knn.k=8", "knn.ks=[8]", "knn.splits=[valid]", "knn.candidates=1")
    in_stage("knn", l2, run_search)
    found = joined(Neighbours.open(RunDir.of(l2).neighbours("valid")), "ids")
    np.testing.assert_array_equal(np.sort(own), np.sort(found))
    fewer.knn.folder = str(folders[16].parent)
    with pytest.raises(DistlmError, match=r"by their dot product: the first 8 are not those of knn.k=8; use knn.k=16"):
        in_stage("knn", fewer, run_tune)


def test_dot_products_of_encoded_keys_are_refused(indexed, tmp_path):
    with pytest.raises(UsageError, match=r"knn.similarity='dot': is computed from the true keys"):
        copy_run(indexed, tmp_path / "run", "knn.similarity=dot", "knn.distances=quantised")


def test_fewer_rows_than_k_are_marked_absent(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.k=4000", "knn.ks=[4000]", "knn.nprobe=1", "knn.splits=[valid]")
    in_stage("knn", config, run_search)
    neighbours = Neighbours.open(RunDir.of(config).neighbours("valid"))
    ids, values, distances = (joined(neighbours, name) for name in ("ids", "values", "distances"))
    absent = ids < 0
    assert absent.any()
    assert not absent.all(axis=1).any()
    np.testing.assert_array_equal(values[absent], -1)
    assert np.isinf(distances[absent]).all()
    assert np.isfinite(distances[~absent]).all()
    assert (np.diff(absent.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("stop_after", [1, 5, 11, 14])
def test_a_stopped_search_continues_to_the_same_files(indexed, searched, tmp_path, monkeypatch, stop_after):
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    calls = 0

    class Killed(BaseException):
        pass

    def dying(act, items):
        nonlocal calls
        for item in items:
            calls += 1
            if calls > stop_after:
                raise Killed
            act([item])
        return len(items)

    monkeypatch.setattr(search, "_counted", dying)
    with pytest.raises(Killed):
        in_stage("knn", config, run_search)
    folder = RunDir.of(config).neighbours("valid")
    with pytest.raises(DistlmError, match="has not finished"):
        Neighbours.open(folder)
    monkeypatch.undo()
    in_stage("knn", config, run_search)
    assert file_hashes(folder) == file_hashes(RunDir(Path(searched.run_dir)).neighbours("valid"))


def test_a_search_that_an_older_version_began_is_continued_as_it_was_cut(indexed, tmp_path, monkeypatch):
    """It had units of knn.blocks_per_unit blocks; one of them is there."""
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    folder, knn = RunDir.of(config).neighbours("valid"), config.knn
    real, older = work.SplitWork.search_units, Cut(knn.batch_blocks, knn.blocks_per_unit)

    def one(self, numbers):
        if numbers[0]:
            raise DistlmError("enough")
        real(self, numbers)

    with monkeypatch.context() as patch:
        patch.setattr("distlm.knnlm.search.cut.planned_cut", lambda blocks, knn: older)
        patch.setattr(work.SplitWork, "search_units", one)
        with pytest.raises(DistlmError, match="enough"):
            in_stage("knn", config, run_search)
    assert [path.name for path in (folder / "found").glob("unit-*")] == ["unit-00000"]
    in_stage("knn", config, run_search)
    manifest = Neighbours.open(folder).manifest
    assert (manifest.batch_blocks, manifest.blocks_per_unit) == (knn.batch_blocks, knn.blocks_per_unit)
    assert planned_cut(manifest.blocks, knn) != older
    # A finished one answers for more units, too.
    assert in_stage("knn", config, run_search)["tokens"] == 0


@pytest.mark.parametrize(("begun", "then"), [("queries", "lists"), ("lists", "queries")])
def test_a_begun_search_goes_on_with_another_scan(indexed, searched, tmp_path, monkeypatch, begun, then):
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    folder, real = RunDir.of(config).neighbours("valid"), work.SplitWork.write_found

    def one(self, number, states, ids, distances):
        if number:
            raise DistlmError("enough")
        real(self, number, states, ids, distances)

    config.knn.scan = begun
    with monkeypatch.context() as patch:
        patch.setattr(work.SplitWork, "write_found", one)
        with pytest.raises(DistlmError, match="enough"):
            in_stage("knn", config, run_search)
    written = []

    def every(self, number, *found):
        written.append(number)
        real(self, number, *found)

    monkeypatch.setattr(work.SplitWork, "write_found", every)
    config.knn.scan = then
    in_stage("knn", config, run_search)
    cut, other = (
        planned_cut(Neighbours.open(folder).manifest.blocks, dataclasses.replace(config.knn, scan=scan))
        for scan in (begun, then)
    )
    manifest = Neighbours.open(folder).manifest
    assert cut != other and Cut(manifest.batch_blocks, manifest.blocks_per_unit) == cut
    assert written and 0 not in written
    if begun == "queries":
        assert file_hashes(folder) == file_hashes(RunDir(Path(searched.run_dir)).neighbours("valid"))
    # A finished one answers, however it was cut.
    for scan in ("queries", "lists"):
        config.knn.scan = scan
        assert in_stage("knn", config, run_search)["tokens"] == 0


def test_units_fit_the_blocks():
    knn = load_config("wikitext103", ["data.text_dir=unused"]).knn
    assert planned_cut(500, knn) == Cut(1, 1) and planned_cut(5000, knn) == Cut(1, 9)
    knn = dataclasses.replace(knn, batch_blocks=2)
    # Few long blocks go one by one; many, or short ones, as they are asked for.
    assert planned_cut(34, knn) == Cut(1, 1) and planned_cut(5000, knn) == Cut(2, 8)
    short = dataclasses.replace(knn, context_window=64, block=192)
    assert planned_cut(34, short) == Cut(2, 2)
    assert planned_cut(34, dataclasses.replace(knn, scan="lists")) == Cut(1, 16)
    cut = Cut(2, 6)
    assert cut.units(8) == [range(6), range(6, 8)] and cut.passes(range(1, 4)) == [range(1, 3), range(3, 4)]
    rows = row_ranges([998_400] * 103 + [390_285])
    assert sum(unit.rows for unit in rows) == 103_225_485 and 4096 <= len(rows) < 4300
    assert [unit.rows for unit in row_ranges([5000, 100])] == [4096, 904, 100]


@pytest.mark.parametrize("search", ["index", "brute"])
@pytest.mark.parametrize("scan", ["queries", "lists", "gpu"])
def test_a_cut_of_another_scan_is_kept_and_no_other(tmp_path, scan, search):
    knn = load_config("wikitext103", ["data.text_dir=unused", f"knn.scan={scan}", f"knn.search={search}"]).knn
    knn = dataclasses.replace(knn, batch_blocks=2)
    nothing = np.zeros(470, np.int64)
    blocks, path = Blocks(nothing, nothing, nothing), tmp_path / "plan.json"
    for kept in (Cut(1, 1), Cut(1, 16), Cut(2, 16), Cut(2, 4)):
        path.write_text(json.dumps(dataclasses.asdict(kept)), "utf-8")
        assert cut_of(blocks, knn, path) == (planned_cut(470, knn) if kept == Cut(2, 4) else kept)


def test_several_groups_give_the_same_files_as_one(indexed, searched, tmp_path, monkeypatch):
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    monkeypatch.setattr(search, "plan_groups", lambda queries, k, width: [[i] for i in range(len(queries))])
    in_stage("knn", config, run_search)
    one, other = (RunDir(Path(c.run_dir)).neighbours("valid") for c in (config, searched))
    assert file_hashes(one) == file_hashes(other)


def test_a_finished_search_is_not_repeated(searched, tmp_path, monkeypatch):
    config = copy_run(searched, tmp_path / "run")
    monkeypatch.setattr(work, "token_states", None)
    assert in_stage("knn", config, run_search)["tokens"] == 0


def test_another_run_that_searches_the_split_is_not_disturbed(indexed, tmp_path, monkeypatch):
    monkeypatch.setattr("distlm.runtime.lock._PATIENCE_S", 0.1)
    config = copy_run(indexed, tmp_path / "run", "knn.splits=[valid]")
    folder = RunDir.of(config).neighbours("valid")
    one_writer_at_a_time(folder, lambda: in_stage("knn", config, run_search))


def test_one_split_can_be_searched_alone(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run")
    in_stage("knn", config, lambda stage: run_search(stage, "test"))
    run = RunDir.of(config)
    assert Neighbours.open(run.neighbours("test")).manifest.split == "test"
    assert not run.neighbours("valid").exists()


def test_a_store_of_another_model_is_refused(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run")
    add_checkpoint(config, seed=1)
    with pytest.raises(DistlmError, match="datastore of another model"):
        in_stage("knn", config, run_search)
    assert not (Path(config.run_dir) / "neighbours").exists()


def test_neighbours_of_another_search_are_refused(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    path = RunDir.of(config).neighbours("valid") / "manifest.json"
    alter(path, datastore="0" * 32)
    with pytest.raises(DistlmError, match="results of another datastore"):
        in_stage("knn", config, run_search)


def test_too_long_context_names_the_fields_and_the_limit(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run")
    config.knn.context_window = 80
    with pytest.raises(DistlmError, match=r"knn.context_window=80 .*max_positions=96; choose knn.context_window=64"):
        in_stage("knn", config, run_search)
    config.knn.context_window, config.knn.block = 0, 2048
    with pytest.raises(DistlmError, match=r"knn.block=2048 .*max_positions=96; choose knn.block=96 or less"):
        in_stage("knn", config, run_search)


def test_unknown_split_is_named_and_can_be_mended_in_place(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run")
    config.knn.splits = ["valid", "dev"]
    with pytest.raises(DistlmError, match="no split 'dev'"):
        in_stage("knn", config, run_search)
    assert not (RunDir.of(config).neighbours("valid") / "plan.json").exists()
    config.knn.splits = ["valid"]
    in_stage("knn", config, run_search)
    assert Neighbours.open(RunDir.of(config).neighbours("valid")).tokens > 0


def test_missing_index_names_its_command(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run")
    shutil.rmtree(Path(config.run_dir) / "index")
    with pytest.raises(DistlmError, match="distlm index build"):
        in_stage("knn", config, run_search)


def test_an_index_that_finds_none_of_its_own_keys_is_refused(indexed, tmp_path, monkeypatch):
    config = copy_run(indexed, tmp_path / "run")

    def misaligned(self, queries, k, nprobe):
        ids, distances = real(self, queries, k, nprobe)
        return (ids + 1000) % self.rows, distances

    from distlm.index.search.searcher import SearchIndex

    real = SearchIndex.search
    monkeypatch.setattr(SearchIndex, "search", misaligned)
    with pytest.raises(DistlmError, match="self-test failed"):
        in_stage("knn", config, run_search)


def test_cut_and_missing_units_are_refused(searched, tmp_path):
    folder = RunDir(Path(copy_run(searched, tmp_path / "run").run_dir)).neighbours("valid")
    path = unit_folder(folder, 1) / "ids.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DistlmError, match=r"ids.npy: missing or cut"):
        Neighbours.open(folder)
    path.write_bytes(whole[:-8] + b"\x01" * 8)
    assert [file.path for file in Neighbours.open(folder).written() if problem(file)] == [path]
    np.save(path, np.load(unit_folder(folder, 0) / "ids.npy"))
    shutil.rmtree(unit_folder(folder, 0))
    with pytest.raises(DistlmError, match="unit-00000"):
        Neighbours.open(folder)
    with pytest.raises(DistlmError, match="no search results"):
        Neighbours.open(folder.parent / "other")


def test_a_unit_is_whole_or_absent(searched, tmp_path, monkeypatch):
    unit = read_unit(unit_folder(RunDir(Path(searched.run_dir)).neighbours("valid"), 0))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(neighbours, "sync_file", full_disk)
    with pytest.raises(DistlmError, match="no space left"):
        neighbours.write_unit(tmp_path / "unit-00000", unit)
    assert list(tmp_path.iterdir()) == []
