"""Searching: equal to stock faiss, nprobe that reaches the search, −1 that stays −1, brute force that is exact."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.index import WIDTH, config, one_process_build, one_rank, vectors, write_store

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import SearchIndex, brute_search, exact_distances, open_index, run_index_build
from distlm.index.keys import gather_keys
from distlm.index.search.file import search_file
from distlm.runtime.ranks.comm import SingleComm


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run directory with a PCA index of 6,000 keys, and the keys."""
    folder = tmp_path_factory.mktemp("built")
    keys = vectors(6000)
    write_store(folder / "datastore", keys)
    with one_rank(config(folder, factory="PCA16,IVF32,SQ8")) as stage:
        run_index_build(stage)
    return folder, keys


@pytest.fixture
def index(built: tuple[Path, np.ndarray]) -> SearchIndex:
    return open_index(built[0] / "index", Datastore.open(built[0] / "datastore"))


def test_nprobe_reaches_the_lists_behind_a_transform(index: SearchIndex, built: tuple[Path, np.ndarray]) -> None:
    import faiss

    queries = vectors(200, seed=9).astype(np.float32)
    one_process_build(built[0] / "index" / "template.index", built[1], built[0] / "one.index")
    stock = faiss.read_index(str(built[0] / "one.index"))
    for nprobe in (1, 4, 32):
        ids, distances = index.search(queries, 20, nprobe)
        assert index.nprobe == nprobe
        faiss.extract_index_ivf(stock).nprobe = nprobe
        expected_distances, expected = stock.search(queries, 20)
        assert (ids == expected).mean() > 0.999
        np.testing.assert_allclose(distances[ids >= 0], expected_distances[ids >= 0], rtol=1e-4, atol=1e-4)
    assert index.set_nprobe(10**6) == 32
    assert (index.search(queries, 20, 1)[0] != index.search(queries, 20, 32)[0]).any()


def test_stored_keys_find_themselves(index: SearchIndex, built: tuple[Path, np.ndarray]) -> None:
    rows = np.arange(0, 6000, 29)
    ids, distances = index.search(built[1][rows], 1, 4)
    assert (ids[:, 0] == rows).mean() > 0.95
    assert ids.dtype == np.int64 and distances.dtype == np.float32


def test_unreachable_neighbours_are_minus_one_at_infinity(index: SearchIndex) -> None:
    ids, distances = index.search(vectors(10, seed=3), 2000, 1)
    assert ((ids == -1) == np.isinf(distances)).all()
    assert (ids == -1).any(axis=1).all() and (ids[:, 0] >= 0).all()
    everything, _ = index.search(vectors(3, seed=3), 7000, 32)
    assert (np.sort(everything, axis=1)[:, 1000:] == np.arange(6000)).all()


def test_threads_and_neighbouring_queries_do_not_change_results(
    built: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = vectors(700, seed=4)
    datastore = Datastore.open(built[0] / "datastore")
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append(open_index(built[0] / "index", datastore).search(queries, 10, 8))
    cut = open_index(built[0] / "index", datastore).search(queries[:300], 10, 8)
    for ids, distances in results:
        assert (ids == results[0][0]).all() and (distances == results[0][1]).all()
        assert (ids[:300] == cut[0]).all() and (distances[:300] == cut[1]).all()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run directory with a 4-bit index of 6,000 keys, and the keys."""
    folder = tmp_path_factory.mktemp("packed")
    keys = vectors(6000)
    write_store(folder / "datastore", keys)
    with one_rank(config(folder, factory="PCA16,IVF32,PQ16x4")) as stage:
        run_index_build(stage)
    return folder, keys


def test_a_four_bit_file_is_stock_faiss(packed: tuple[Path, np.ndarray]) -> None:
    import faiss

    one_process_build(packed[0] / "index" / "template.index", packed[1], packed[0] / "one.index")
    merged = packed[0] / "index" / "merged.index"
    # Behind a PCA stock faiss's own batches round otherwise: compare the lists, and nearly all of the bytes.
    ours, stock = (np.frombuffer(path.read_bytes(), np.uint8) for path in (merged, packed[0] / "one.index"))
    assert len(ours) == len(stock) and (ours == stock).mean() > 0.99
    assert type(faiss.downcast_index(faiss.extract_index_ivf(faiss.read_index(str(merged))))) is faiss.IndexIVFPQ


def test_fast_scan_finds_what_the_plain_scan_finds(
    packed: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    datastore = Datastore.open(packed[0] / "datastore")
    queries = vectors(300, seed=9).astype(np.float32)
    fast = open_index(packed[0] / "index", datastore)
    monkeypatch.setattr("distlm.index.search.fastscan.MOST_BYTES", 0)
    plain = open_index(packed[0] / "index", datastore)
    assert fast.fast_scan and not plain.fast_scan
    true, _ = brute_search(datastore, queries, 50)
    recalls = []
    for index in (fast, plain):
        ids, distances = index.search(queries, 50, 8)
        assert index.nprobe == 8
        recalls.append(np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(ids, true, strict=True)]))
        assert (np.diff(distances, axis=1) >= 0).all() and all(len(set(row)) == 50 for row in ids.tolist())
    assert recalls[0] > recalls[1] - 0.02
    (ids, distances), (expected, exact) = fast.search(queries, 20, 32), plain.search(queries, 20, 32)
    assert np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(ids, expected, strict=True)]) > 0.9
    # 8-bit tables: a few hundredths of the distance.
    np.testing.assert_allclose(distances, exact, rtol=0.1)


def test_fast_scan_leaves_unreachable_neighbours_minus_one(packed: tuple[Path, np.ndarray]) -> None:
    index = open_index(packed[0] / "index", Datastore.open(packed[0] / "datastore"))
    ids, distances = index.search(vectors(10, seed=3), 2000, 1)
    assert ((ids == -1) == np.isinf(distances)).all()
    assert (ids == -1).any(axis=1).all() and (ids[:, 0] >= 0).all()
    everything, _ = index.search(vectors(3, seed=3), 7000, 32)
    assert (np.sort(everything, axis=1)[:, 1000:] == np.arange(6000)).all()


def test_fast_scan_is_the_same_for_any_threads_and_neighbouring_queries(
    packed: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = vectors(1500, seed=4)
    datastore = Datastore.open(packed[0] / "datastore")
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append(open_index(packed[0] / "index", datastore).search(queries, 100, 8))
    cut = open_index(packed[0] / "index", datastore).search(queries[:1100], 100, 8)
    for ids, distances in results:
        assert (ids == results[0][0]).all() and (distances == results[0][1]).all()
        assert (ids[:1100] == cut[0]).all() and (distances[:1100] == cut[1]).all()


@pytest.mark.parametrize("factory", ["IVF32,PQ16", "IVF32,SQ8", "IVF32,Flat", "IVF32,PQ8x6"])
def test_other_codes_are_searched_as_they_lie(tmp_path: Path, factory: str) -> None:
    write_store(tmp_path / "datastore", vectors(3000))
    with one_rank(config(tmp_path, factory=factory)) as stage:
        run_index_build(stage)
    index = open_index(tmp_path / "index", Datastore.open(tmp_path / "datastore"))
    assert not index.fast_scan
    assert (index.search(vectors(3000)[:50], 5, 32)[0] >= 0).all()


def test_bad_queries_are_refused(index: SearchIndex) -> None:
    good = vectors(2)
    for queries, k, nprobe, words in (
        (good, 0, 1, "knn.k=0"),
        (good, 1, 0, "knn.nprobe=0"),
        (good[:, :5], 1, 1, r"\(2, 5\): expected \[Q, 32\]"),
        (good * np.float16(np.nan), 1, 1, "NaN"),
    ):
        with pytest.raises(DistlmError, match=words):
            index.search(queries, k, nprobe)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_brute_search_is_exact(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.index.search.searcher.BRUTE_CHUNK_BYTES", 1024 * 4 * WIDTH)
    # Far from the origin: the matrix-product form of the distance would lose digits here.
    keys: np.ndarray = (vectors(4000).astype(np.float32) + 20).astype(dtype)
    keys[3000] = keys[10]
    datastore = write_store(tmp_path, keys)
    queries = np.concatenate([keys[:30], (vectors(20, seed=5) + 20).astype(dtype)]).astype(np.float32)
    ids, distances = brute_search(datastore, queries, 7)
    wide = keys.astype(np.float64)
    true = ((queries.astype(np.float64)[:, None] - wide[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, np.sort(true, axis=1)[:, :7], rtol=1e-5)
    np.testing.assert_allclose(distances, np.take_along_axis(true, ids, axis=1), rtol=1e-5)
    assert (ids[:30, 0] == np.arange(30)).all()
    # Equal keys: by id.
    assert ids[10, :2].tolist() == [10, 3000] and distances[10, :2].tolist() == [0, 0]
    assert (distances[:30, 0] == 0).all()


def test_brute_search_equals_faiss_flat(tmp_path: Path) -> None:
    import faiss

    keys = vectors(3000)
    flat = faiss.IndexFlatL2(WIDTH)
    flat.add(keys.astype(np.float32))
    queries = vectors(100, seed=6).astype(np.float32)
    expected, rows = flat.search(queries, 10)
    ids, distances = brute_search(write_store(tmp_path, keys), queries, 10)
    assert (ids == rows).mean() > 0.999
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


def test_brute_search_of_fewer_rows_than_k(tmp_path: Path) -> None:
    datastore = write_store(tmp_path, vectors(5), rows_per_shard=2)
    ids, distances = brute_search(datastore, vectors(3, seed=1), 8)
    assert (np.sort(ids, axis=1) == [-1, -1, -1, 0, 1, 2, 3, 4]).all()
    assert ((ids == -1) == np.isinf(distances)).all()


def test_gather_and_exact_distances(tmp_path: Path) -> None:
    keys = vectors(100)
    datastore = write_store(tmp_path, keys, rows_per_shard=30)
    ids = np.array([99, 0, 30, 29, 0, 60])
    assert (gather_keys(datastore, ids) == keys[ids].astype(np.float32)).all()
    pairs = np.array([[5, -1, 98], [-1, -1, -1]])
    distances = exact_distances(datastore, keys[[5, 6]].astype(np.float32), pairs)
    assert distances[0, 0] == 0 and np.isinf(distances[pairs < 0]).all()
    wide = keys.astype(np.float64)
    assert distances[0, 2] == pytest.approx(((wide[5] - wide[98]) ** 2).sum(), rel=1e-5)


def test_search_file(built: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, keys = built
    np.save(tmp_path / "queries.npy", keys[:50])
    settings = config(folder)
    settings.knn.k, settings.knn.nprobe = 5, 32
    summary = search_file(settings, SingleComm(), tmp_path / "queries.npy", tmp_path / "out.npz")
    assert summary is not None and summary["queries"] == 50
    with np.load(tmp_path / "out.npz") as found:
        assert (found["ids"][:, 0] == np.arange(50)).all() and (found["distances"][:, 0] == 0).all()
        assert (found["values"] == found["ids"] % 97).all()
    np.save(tmp_path / "ints.npy", np.zeros((2, WIDTH), np.int64))
    with pytest.raises(DistlmError, match=r"ints.npy: holds int64 \(2, 32\)"):
        search_file(settings, SingleComm(), tmp_path / "ints.npy", tmp_path / "out.npz")


def test_search_file_says_what_is_asked_in_vain(
    built: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, keys = built
    np.save(tmp_path / "queries.npy", keys[:2])
    settings = config(folder)
    settings.knn.k, settings.knn.nprobe = 5, 10_000
    assert search_file(settings, SingleComm(), tmp_path / "queries.npy", tmp_path / "out.npz")
    assert "index search: knn.nprobe=10000 is more than the index's" in capsys.readouterr().err
    for search in ("index", "brute"):
        settings.knn.k, settings.knn.search = len(keys) + 1, search
        with pytest.raises(
            UsageError, match=rf"knn\.k={len(keys) + 1}: the datastore has {len(keys)} rows; lower knn\.k"
        ):
            search_file(settings, SingleComm(), tmp_path / "queries.npy", tmp_path / "out.npz")


def test_refusals_of_open(built: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, keys = built
    ours = Datastore.open(folder / "datastore")
    other = write_store(tmp_path / "other", keys, model="x" * 32)
    with pytest.raises(DistlmError, match="index of another store") as caught:
        open_index(folder / "index", other)
    assert ours.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)
    with pytest.raises(DistlmError, match="no finished index"):
        open_index(tmp_path / "nowhere", ours)
    copy = tmp_path / "copy"
    copy.mkdir()
    record = json.loads((folder / "index" / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(record))
    data = (folder / "index" / "merged.index").read_bytes()
    (copy / "merged.index").write_bytes(data[:-1])
    with pytest.raises(DistlmError, match=f"{len(data) - 1} bytes, index.json says {len(data)}"):
        open_index(copy, ours)
