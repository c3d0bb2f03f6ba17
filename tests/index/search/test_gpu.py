"""Searching on a GPU: what is believed of it, and what is said where there is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.index import config, one_rank, vectors, write_store

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import open_index, run_index_build
from distlm.index.layout import Array
from distlm.index.search import gpu as gpu_search
from distlm.index.search import searcher as search
from distlm.index.search.gpu import check_agreement
from distlm.index.search.searcher import SearchIndex


def build(folder: Path, factory: str = "PCA16,IVF16,PQ8") -> Datastore:
    write_store(folder / "datastore", vectors(4000))
    with one_rank(config(folder, factory=factory)) as stage:
        run_index_build(stage)
    return Datastore.open(folder / "datastore")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Array, Array]:
    """Squared L2 and ids [64, 100] of a real search, some rows not full."""
    folder = tmp_path_factory.mktemp("found")
    store = build(folder, "IVF64,SQ8")
    ids, distances = open_index(folder / "index", store).search(vectors(64, seed=3), 100, 1)
    assert (ids < 0).any()
    return distances, ids


def test_fp16_sums_are_believed(found: tuple[Array, Array]) -> None:
    distances, ids = found
    rounded = distances.astype(np.float16).astype(np.float32)
    order = np.argsort(rounded, axis=1, kind="stable")
    mine = np.take_along_axis(rounded, order, 1), np.take_along_axis(ids, order, 1)
    assert check_agreement(found, found) == check_agreement(mine, found) == 1
    # A near tie at the k-th place may fall otherwise.
    fewer = ids.copy()
    fewer[ids[:, -1] >= 0, -1] = 10**6
    assert 0.97 < check_agreement((distances, fewer), found) < 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shuffled", r"only \d+\.\d% of the processor's neighbours"),
        ("reversed", "neighbours out of order"),
        ("repeated", "the same neighbour twice"),
        ("scaled", r"a distance off by 5\.0%"),
        ("empty", r"only 0\.0% of"),
    ],
)
def test_what_faulty_builds_return_is_not(found: tuple[Array, Array], damage: str, message: str) -> None:
    distances, ids = (array.copy() for array in found)
    if damage == "shuffled":
        ids = np.roll(ids, 1, axis=0)
    elif damage == "reversed":
        distances, ids = distances[:, ::-1], ids[:, ::-1]
    elif damage == "repeated":
        ids[:, 1] = ids[:, 0]
    elif damage == "scaled":
        distances *= 1.05
    else:
        ids[:] = -1
    with pytest.raises(DistlmError, match=message) as caught:
        check_agreement((distances, ids), found)
    assert "set knn.scan=queries" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    store = build(tmp_path)
    with pytest.raises(DistlmError, match=r"knn\.scan=gpu: (faiss-gpu is missing|this process sees no GPU)"):
        open_index(tmp_path / "index", store, scan="gpu")


class StandIn:
    """The lists of an inverted file on the processor, distances rounded as on a GPU. Wrong after `believed` calls."""

    def __init__(self, inner: object, believed: int = 99) -> None:
        self.inner, self.calls, self.believed = inner, 0, believed

    def search(self, queries: Array, k: int, nprobe: int) -> tuple[Array, Array]:
        self.calls += 1
        self.inner.nprobe = nprobe  # type: ignore[attr-defined]
        distances, ids = self.inner.search(queries, k)  # type: ignore[attr-defined]
        return distances.astype(np.float16).astype(np.float32), ids if self.calls <= self.believed else ids[::-1]


def test_search_by_a_stand_in_for_the_gpu_is_compared_once_for_each_k_and_nprobe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(tmp_path)
    monkeypatch.setattr(search, "GPU_BATCH", 100)
    queries = vectors(250, seed=8)
    expected = open_index(tmp_path / "index", store).search(queries, 20, 4)
    for believed in (0, 99):
        monkeypatch.setattr(search, "GpuLists", lambda inner, believed=believed: StandIn(inner, believed))
        index = open_index(tmp_path / "index", store, scan="gpu")
        if not believed:
            with pytest.raises(DistlmError, match="disagree"):
                index.search(queries, 20, 4)
            continue
        ids, distances = index.search(queries, 20, 4)
        used: Any = index._gpu
        assert used.calls == 3
        assert np.array_equal(ids, expected[0])
        np.testing.assert_allclose(distances, expected[1], rtol=1e-3)
        checked: list[int] = []
        monkeypatch.setattr(search, "check_agreement", lambda found, wanted, log=checked: log.append(len(found[1])))
        for k, nprobe in ((20, 4), (20, 8), (10, 8), (20, 8)):
            index.search(queries, k, nprobe)
        assert checked == [gpu_search.COMPARED] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("factory", ["IVF16,PQ8", "PCA16,IVF16,SQ8"])
def test_the_gpu_finds_what_the_processor_finds(factory: str, tmp_path: Path) -> None:
    store = build(tmp_path, factory)
    queries = vectors(5000, seed=9)
    ids, distances = open_index(tmp_path / "index", store).search(queries, 100, 4)
    index: SearchIndex = open_index(tmp_path / "index", store, scan="gpu")
    near, far = index.search(queries, 100, 4)
    assert check_agreement((far, near), (distances, ids)) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_4_bit_codes_are_refused_by_name(tmp_path: Path) -> None:
    store = build(tmp_path, "IVF16,PQ16x4")
    with pytest.raises(DistlmError, match="build an index with 8-bit codes"):
        open_index(tmp_path / "index", store, scan="gpu")
