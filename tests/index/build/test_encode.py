"""Codes do not depend on threads, and are faiss's own."""

import faiss
import numpy as np
import pytest
import torch
from support.index import vectors
from support.sim.devices import ON_DEVICE

from distlm.index.build import torch_lists
from distlm.index.build.encode import BLOCK, Encoder
from distlm.index.factory import fit_factory, inverted_file
from distlm.index.layout import deserialise, serialise
from distlm.index.train.template import train_template


@pytest.mark.parametrize(
    "factory",
    [
        "IVF64,PQ2",
        "PCA16,IVF64,Flat",
        "IVF64_HNSW8,SQ8",
        "L2norm,IVF32,RaBitQ",
        "IVF16,RQ2x4",
        "PCAR16,IVF64,RaBitQ",
        "IVF64_HNSW8,SQ4",
        "IVF32,SQ6",
    ],
)
def test_any_number_of_threads_gives_the_same_bytes(factory: str) -> None:
    keys = vectors(5 * BLOCK + 77).astype(np.float32)
    template = train_template(fit_factory(factory, 32, len(keys), 3000), keys[:3000], 1, 1)
    results = []
    for threads in (1, 2, 3):
        index = deserialise(template)
        with Encoder(index, threads) as encoder:
            encoder.add(keys[:3000], np.arange(3000))
            encoder.add(keys[3000:], np.arange(3000, len(keys)))
        assert index.ntotal == len(keys)
        results.append(serialise(index))
    assert results[0] == results[1] == results[2]
    if "PCA" not in factory:
        stock = deserialise(template)
        stock.add_with_ids(keys, np.arange(len(keys)))
        assert serialise(stock) == results[0]


@pytest.mark.parametrize("device", ["cpu", ON_DEVICE])
@pytest.mark.parametrize("factory", ["IVF64,PQ2", "PCA16,IVF64,SQ8", "IVF64_HNSW8,SQ8"])
def test_lists_that_torch_finds_are_those_of_faiss(factory: str, device: str) -> None:
    keys = vectors(5 * BLOCK + 77).astype(np.float32)
    index = deserialise(train_template(fit_factory(factory, 32, len(keys), 3000), keys[:3000], 1, 1))
    with Encoder(index, 1) as faiss_only, Encoder(index, 2, device) as by_torch:
        expected = [faiss_only.encode(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
        found = [by_torch.encode(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
    assert (np.concatenate(found) == np.concatenate(expected)).all(axis=1).mean() > 0.999


def test_pieces_that_fit_the_device_give_the_same_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers: sums are exact, so ties are ties in products of any shape.
    keys = np.rint(4 * vectors(3000).astype(np.float32))
    index = deserialise(train_template(fit_factory("IVF64,Flat", 32, len(keys), 3000), keys, 1, 1))
    quantizer = inverted_file(index).quantizer
    # Each centroid twice: every key is as near to two of them.
    centroids = np.rint(quantizer.reconstruct_n(0, 32))
    quantizer.reset()
    quantizer.add(np.concatenate([centroids, centroids]))
    whole = torch_lists.TorchLists.of(inverted_file(index), "cpu").nearest(keys)
    assert len(np.unique(whole)) > 20
    rows_of: list[int] = []
    product = torch.addmm

    def counted(bias: torch.Tensor, piece: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        rows_of.append(len(piece))
        return product(bias, piece, centroids)

    monkeypatch.setattr(torch, "addmm", counted)
    for most, rows in ((64 * 4 * 300, 256), (1, 1)):
        monkeypatch.setattr(torch_lists, "PRODUCT_BYTES", most)
        rows_of.clear()
        found = torch_lists.TorchLists.of(inverted_file(index), "cpu").nearest(keys)
        assert max(rows_of) == rows
        assert sum(rows_of) == len(keys)
        assert found.dtype == whole.dtype
        assert np.array_equal(found, whole)


@pytest.mark.parametrize(("factory", "rows"), [("IVF64,PQ2", 8192), ("IVF64,PQ4", 16384), ("IVF64,PQ8", 32768)])
def test_codes_of_whole_and_half_blocks_are_those_of_faiss(factory: str, rows: int) -> None:
    keys = vectors(rows + rows // 2 + 5000).astype(np.float32)
    template = train_template(fit_factory(factory, 32, len(keys), 3000), keys[:3000], 1, 1)
    index, stock = deserialise(template), deserialise(template)
    with Encoder(index, 1) as encoder:
        assert encoder.block == rows
        encoder.add(keys, np.arange(len(keys)))
    stock.add_with_ids(keys, np.arange(len(keys)))
    found, expected = (stored(one, len(keys)) for one in (index, stock))
    # Ties fall either way.
    assert (found != expected).sum() <= 3


def stored(index: object, rows: int) -> np.ndarray:
    """List number and code of each key, uint8 [rows, …]."""
    inner = inverted_file(index)
    lists = inner.invlists
    found = np.zeros((rows, 1 + inner.code_size), np.uint8)
    for number in range(inner.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            found[ids, 0] = number
            found[ids, 1:] = faiss.rev_swig_ptr(lists.get_codes(number), size * inner.code_size).reshape(size, -1)
    return found
