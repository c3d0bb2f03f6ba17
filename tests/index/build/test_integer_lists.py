"""Lists that integers find are the nearest, whatever the keys, and the same in any blocks and threads."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from support.index import vectors

from distlm.index.build import integer_lists
from distlm.index.build.encode import BLOCK, Encoder
from distlm.index.build.integer_lists import IntegerLists, multiplies_int8, pays
from distlm.index.factory import fit_factory, inverted_file
from distlm.index.layout import deserialise, serialise
from distlm.index.train.template import train_template

nearest = IntegerLists.nearest
needs_vnni = pytest.mark.skipif(not multiplies_int8(), reason="no VNNI")


def lists_of(centroids: np.ndarray) -> IntegerLists:
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return IntegerLists(index)


def drawn(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys fp32 [1500, 48] and centroids fp32 [200, 48]."""
    random = np.random.default_rng(3)
    keys, centroids = random.standard_normal((1500, 48)), random.standard_normal((200, 48))
    if kind == "clustered":
        keys = centroids[random.integers(0, 200, 1500)] + 0.3 * keys
    elif kind == "one large value":
        keys[:, 5] *= 1000
        centroids[:, 5] *= 900
    elif kind == "far from zero":
        keys, centroids = keys + 300, centroids + 300
    elif kind == "keys far off":
        keys = 500 + 40 * keys
    elif kind == "keys close together":
        keys = 1e-3 * keys + centroids[7]
    elif kind == "twice the same":
        centroids[100:] = centroids[:100]
    elif kind == "all the same":
        centroids[:] = centroids[0]
    elif kind == "small":
        keys, centroids = 1e-12 * keys, 1e-12 * centroids
    elif kind == "some huge":
        keys[::7] *= 1e19
    return keys.astype(np.float32), centroids.astype(np.float32)


@needs_vnni
@pytest.mark.parametrize("kind", [
    "normal", "clustered", "one large value", "far from zero", "keys far off", "keys close together", "twice the same",
    "all the same", "small", "some huge",
])  # fmt: skip
@pytest.mark.parametrize("most", [0, 3, 64, 200])
def test_a_list_is_the_nearest(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_lists, "MOST_CANDIDATES", most)
    keys, centroids = drawn(kind)
    found = lists_of(centroids).nearest(keys)
    assert found.dtype == np.int64 and found.shape == (1500,)
    true = np.square(keys[:, None].astype(np.float64) - centroids).sum(axis=2)
    own, least = true[np.arange(1500), found], true.min(axis=1)
    # Candidates are compared in fp32; a row of faiss's own, of more, loses what its matrix product loses.
    size = np.square(keys, dtype=np.float64).sum(axis=1) + np.square(centroids, dtype=np.float64).sum(axis=1).max()
    allowed = 1e-6 * least if most == 200 and kind != "some huge" else 4e-6 * size
    assert (own <= least + allowed).all()


@needs_vnni
def test_of_equals_the_first_is_taken_and_blocks_do_not_matter() -> None:
    keys, centroids = drawn("twice the same")
    lists = lists_of(centroids)
    whole = lists.nearest(keys)
    assert whole.max() < 100 and len(np.unique(whole)) > 50
    for rows in (1, 7, 1000):
        assert np.array_equal(
            np.concatenate([lists.nearest(keys[at : at + rows]) for at in range(0, 1500, rows)]), whole
        )
    assert len(lists.nearest(keys[:0])) == 0


@needs_vnni
@pytest.mark.parametrize("factory", ["IVF64,PQ2", "PCA16,IVF64,SQ8", "IVF64,RaBitQ", "IVF64_HNSW8,SQ4"])
def test_an_index_is_that_of_faiss_on_any_number_of_threads(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = vectors(5 * BLOCK + 77).astype(np.float32)
    template = train_template(fit_factory(factory, 32, len(keys), 3000), keys[:3000], 1, 1)
    plain = added(template, keys, 1)
    monkeypatch.setattr(integer_lists, "LEAST_WORK", 0)
    monkeypatch.setattr(integer_lists, "LEAST_LISTS", 1)
    takes = IntegerLists.takes(inverted_file(deserialise(template)), len(keys))
    assert takes is ("HNSW" not in factory)
    assert added(template, keys, 1) == added(template, keys, 2) == added(template, keys, 3) == plain


def added(template: bytes, keys: np.ndarray, threads: int) -> bytes:
    index = deserialise(template)
    with Encoder(index, threads, keys=len(keys)) as encoder:
        encoder.add(keys[:3000], np.arange(3000))
        encoder.add(keys[3000:], np.arange(3000, len(keys)))
    return serialise(index)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of IntegerLists.nearest from now on."""
    calls: list[int] = []

    def counting(self: IntegerLists, rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        return nearest(self, rows)

    monkeypatch.setattr(IntegerLists, "nearest", counting)
    return calls


@needs_vnni
def test_keys_of_which_many_centroids_are_left_are_left_to_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_lists, "LEAST_WORK", 0)
    monkeypatch.setattr(integer_lists, "LEAST_LISTS", 1)
    keys = vectors(3000).astype(np.float32)
    template = train_template(fit_factory("IVF64,Flat", 32, len(keys), 3000), keys, 1, 1)
    calls = counted(monkeypatch)
    monkeypatch.setattr(integer_lists, "MOST_CANDIDATES", 0)
    left = added(template, keys, 1)
    assert not calls
    monkeypatch.setattr(integer_lists, "MOST_CANDIDATES", 64)
    assert added(template, keys, 1) == left
    assert calls


@needs_vnni
def test_training_by_integers_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = vectors(9000, 64, clusters=300)
    plan = fit_factory("IVF128,PQ8", 64, len(keys), len(keys))
    plain = train_template(plan, keys, 1, 1)
    monkeypatch.setattr(integer_lists, "LEAST_WORK", 0)
    monkeypatch.setattr(integer_lists, "LEAST_LISTS", 1)
    calls = counted(monkeypatch)
    integers = [train_template(plan, keys, 1, threads) for threads in (1, 2, 3)]
    assert len(calls) > 3 * 10
    assert integers[0] == integers[1] == integers[2] == plain


def test_few_keys_and_other_processors_are_left_to_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pays(4096, 1024, 1000) and not pays(16, 1024, 10**9)
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : avx512_vnni\n")
    monkeypatch.setattr(integer_lists, "_CPU", tmp_path / "cpuinfo")
    multiplies_int8.cache_clear()
    assert not pays(4096, 1024, 10**9)
    monkeypatch.setattr(integer_lists, "_CPU", tmp_path / "none")
    multiplies_int8.cache_clear()
    assert not pays(4096, 1024, 10**9)
    monkeypatch.undo()
    multiplies_int8.cache_clear()
