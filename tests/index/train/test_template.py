"""A template is the same for any number of threads and shares, as good as faiss's, and goes on after a kill."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store
from support.records import alter

from distlm.errors import DistlmError
from distlm.index import run_index_train
from distlm.index.build.encode import transforms_of
from distlm.index.factory import fit_factory, inverted_file
from distlm.index.layout import deserialise, serialise
from distlm.index.train import kept, kmeans
from distlm.index.train.exact import Exact, largest
from distlm.index.train.kept import Kept
from distlm.index.train.kmeans import means
from distlm.index.train.sample import BLOCK, ArraySample, held_by, some_of
from distlm.index.train.team import Team
from distlm.index.train.template import train_template
from distlm.runtime.ranks.comm import SingleComm

FACTORIES = [
    "IVF64,PQ4",
    "PCA16,IVF64,SQ8",
    "IVF64_HNSW8,Flat",
    "L2norm,IVF32,RaBitQ",
    "IVF16,RQ2x4",
    pytest.param("OPQ4,IVF8,PQ4x4", marks=pytest.mark.slow),
    "PCAR16,IVF64_HNSW8,RaBitQ",
    "PCA16,IVF32,SQ4",
    "IVF32,SQ6",
]


def trained(factory: str, keys: np.ndarray, threads: int = 1) -> bytes:
    return train_template(fit_factory(factory, keys.shape[1], len(keys), len(keys)), keys, 1, threads)


@pytest.mark.parametrize("factory", FACTORIES)
def test_any_number_of_threads_trains_the_same_bytes(factory: str) -> None:
    keys = vectors(5000)
    assert trained(factory, keys, 1) == trained(factory, keys, 2) == trained(factory, keys, 3)


@pytest.mark.parametrize("factory", ["IVF16,PQ4", "IVF64_HNSW8,SQ8", "PCA16,IVF64,Flat", "PCAR24,IVF64_HNSW8,SQ6"])
def test_the_file_is_what_faiss_writes_of_the_same_centroids(factory: str) -> None:
    keys = vectors(12_000)
    index = deserialise(trained(factory, keys))
    assert index.is_trained and inverted_file(index).is_trained and index.ntotal == 0
    again = faiss.deserialize_index(np.frombuffer(serialise(index), np.uint8))
    again.add(keys.astype(np.float32))
    inverted_file(again).nprobe = 4
    # A key is the nearest to itself, or to what its code stands for.
    found = again.search(keys[:200].astype(np.float32), 5)[1]
    assert (found == np.arange(200)[:, None]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("width", [8, 64])
def test_centroids_are_as_good_as_those_of_faiss(width: int) -> None:
    keys = vectors(20_000, width, clusters=300)
    wide = keys.astype(np.float32)
    stock = faiss.Kmeans(width, 64, niter=10, seed=1, max_points_per_centroid=1000)
    stock.train(wide)
    ours = kmeans.kmeans(held_by(0, 1, ArraySample(keys), np.arange(len(keys))), 64, 10, 1, Team())
    objective = [float(faiss.knn(wide, np.ascontiguousarray(c), 1)[0].sum()) for c in (stock.centroids, ours)]
    # Both stop in some local optimum: over ten draws they differ by up to 3 % here, on either side.
    assert objective[1] < 1.03 * objective[0]


def test_a_transform_is_that_of_faiss() -> None:
    keys = vectors(9000) + np.float16(3)
    index = fit_factory("PCA8,IVF4,Flat", 32, len(keys), len(keys)).build()
    transforms_of(index)[0].train(keys.astype(np.float32))
    own = deserialise(trained("PCA8,IVF4,Flat", keys))
    theirs, ours = (transforms_of(i)[0].apply(keys[:500].astype(np.float32)) for i in (index, own))
    # The sign of a direction is free.
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=0.02)


def test_sums_have_the_same_bits_in_any_order() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(50_000) * 10.0 ** random.integers(-6, 4, 50_000)).astype(np.float32)
    exact = Exact.of(SingleComm(), largest(values[:, None]), len(values))
    orders = [random.permutation(len(values)) for _ in range(5)]
    assert len({float(np.add.reduce(exact(values[order]))) for order in orders}) == 1
    assert len({float(np.cumsum(values[order].astype(np.float64))[-1]) for order in orders}) > 1
    assert np.isclose(float(exact(values).sum()), values.astype(np.float64).sum(), rtol=1e-9)
    keys = vectors(100)
    assert (Exact.of(SingleComm(), 60_000, 4096)(keys, half=True) == keys).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_hold_every_row_once_in_whole_blocks(size: int) -> None:
    keys = np.arange(33_000, dtype=np.float32)[:, None]
    places = some_of(33_000, 30_000, 1, 9)
    shares = [held_by(rank, size, ArraySample(keys), places) for rank in range(size)]
    assert np.array_equal(np.concatenate([share.vectors for share in shares])[:, 0], places)
    assert all(share.first % BLOCK == 0 or not len(share.vectors) for share in shares)
    asked = some_of(30_000, 77, 1, 8)
    assert np.array_equal(np.concatenate([share.at(asked) for share in shares])[:, 0], places[asked])


def test_an_empty_cluster_takes_half_of_another() -> None:
    sums, sizes = np.array([[8.0, 4.0], [0, 0], [0, 0]]), np.array([4, 0, 0])
    now = means(sums, sizes, np.zeros((3, 2), np.float32), 1, 0)
    assert len(np.unique(now, axis=0)) == 3
    np.testing.assert_allclose(now, np.broadcast_to([2.0, 1.0], (3, 2)), rtol=3e-3)
    # Nothing to halve: the centroids stay where they were.
    assert np.array_equal(means(np.zeros((2, 1)), np.array([1, 0]), np.ones((2, 1), np.float32), 1, 0), [[0], [1]])


def test_a_quantiser_of_9_bits_that_fewer_keys_trained_is_taken_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("distlm.index.factory", "distlm.index.build.template"):
        monkeypatch.setattr(f"{module}.MOST_KEYS_PER_LIST", 2)
    write_store(tmp_path / "datastore", vectors(3000))
    with one_rank(config(tmp_path, factory="IVF4,PQ2x9")) as stage:
        assert run_index_train(stage)["sample"] == 1024
        # What earlier versions trained it on.
        alter(tmp_path / "index" / "template.json", sample=512)
        assert run_index_train(stage)["done_before"]
        alter(tmp_path / "index" / "template.json", sample=513)
        with pytest.raises(DistlmError, match=r"trained with sample 513, now 1024"):
            run_index_train(stage)


def test_a_killed_kmeans_goes_on_from_its_last_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LEAST_S", 0.0)
    for run in ("whole", "killed"):
        write_store(tmp_path / run / "datastore", vectors(6000))
    with one_rank(config(tmp_path / "whole", factory="IVF32,PQ4")) as stage:
        run_index_train(stage)
    expected = (tmp_path / "whole/index/template.index").read_bytes()
    done: list[int] = []
    original, folder = Kept.save, tmp_path / "killed/index"

    class Killed(BaseException):
        pass

    def save(self: Kept, iterations: int, centroids: np.ndarray) -> None:
        original(self, iterations, centroids)
        done.append(iterations)
        if len(done) in (4, 6):
            raise Killed

    monkeypatch.setattr(Kept, "save", save)
    for left in (4, 6):
        with one_rank(config(tmp_path / "killed", factory="IVF32,PQ4")) as stage, pytest.raises(Killed):
            run_index_train(stage)
        assert done[-1] == left
        assert sorted(path.name for path in folder.glob(".kmeans*")) == [f".kmeans-{left}.npy", ".kmeans.json"]
    with one_rank(config(tmp_path / "killed", factory="IVF32,PQ4")) as stage:
        run_index_train(stage)
    assert done == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (folder / "template.index").read_bytes() == expected
    assert not list(folder.glob(".kmeans*"))
    # A damaged state counts for nothing.
    state = Kept(tmp_path, "key")
    original(state, 3, np.ones((2, 2), np.float32))
    assert state.load() is not None and Kept(tmp_path, "other").load() is None
    path = tmp_path / ".kmeans-3.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert state.load() is None
