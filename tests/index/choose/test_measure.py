"""Choosing a factory: what is measured, what is on the front, what a budget picks."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.index import config, vectors, write_store

from distlm.analysis.index_choice import tune_index
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.choose.measure import (
    Budget,
    Measured,
    choose,
    default_factories,
    draw_sample,
    measure,
    pareto,
    pick,
    recall,
)
from distlm.index.factory import fit_factory


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder / "datastore", vectors(5000))


def one(name: str, key_bytes: int, query_ms: float, recall: float, perplexity: float | None = None) -> Measured:
    return Measured(name, 8, key_bytes, recall, query_ms, 1000, 1, perplexity)


def test_the_front_holds_what_nothing_beats_and_a_budget_picks_from_it() -> None:
    small, large = one("small", 24, 1.0, 0.6), one("large", 80, 2.0, 0.9)
    slow, poor, same = one("slow", 80, 3.0, 0.9), one("poor", 24, 1.0, 0.5), one("same", 24, 1.0, 0.6)
    measured = [large, slow, poor, small, same]
    assert pareto(measured) == [small, same, large]
    assert pick(measured, Budget()) == large
    assert pick(measured, Budget(key_bytes=40)) == small
    assert pick(measured, Budget(query_ms=2.5)) == large
    assert pick(measured, Budget(recall=0.55)) == small
    assert pick(measured, Budget(key_bytes=40, recall=0.8)) is None


def test_a_sample_is_of_all_shards_and_apart_from_its_queries(store: Datastore) -> None:
    sample = draw_sample(store, 2000, 100, 10, seed=3)
    keys = np.concatenate([store.keys(shard.index) for shard in store.shards]).astype(np.float32)
    assert sample.keys.shape == (2000, 32) and sample.queries.shape == (100, 32)
    assert np.array_equal(sample.keys, keys[sample.rows])
    assert {int(row) // 1500 for row in sample.rows} == {0, 1, 2, 3}
    places = {key.tobytes(): row for row, key in enumerate(keys)}
    assert not {places[query.tobytes()] for query in sample.queries} & set(sample.rows.tolist())
    again = draw_sample(store, 2000, 100, 10, seed=3)
    assert np.array_equal(again.rows, sample.rows)
    distances = ((sample.queries[:5, None].astype(np.float64) - sample.keys[None]) ** 2).sum(-1)
    assert np.array_equal(np.argsort(distances, axis=1, kind="stable")[:, :10], sample.exact[:5])
    with pytest.raises(DistlmError, match="5000 rows are too few for 4995 queries and k=10"):
        draw_sample(store, 2000, 4995, 10, seed=3)


def test_true_keys_in_all_lists_have_every_neighbour(store: Datastore) -> None:
    sample = draw_sample(store, 2000, 100, 300, seed=3)
    factory, _, results = measure("IVF16,Flat", sample, 300, 1, probes=(1, 16, 999))
    assert [result.nprobe for result in results] == [1, 16] and results[1].recall == 1 > results[0].recall
    assert results[0].key_bytes == factory.key_bytes == 136
    assert recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75
    true = np.array([[1, 2, 3], [4, -1, -1]])
    assert recall(np.array([[3, 9, 1], [-1, -1, -1]]), true) == 0.5
    assert recall(true, true) == 1


def test_what_cannot_be_built_is_left_out_with_its_reason(store: Datastore) -> None:
    sample = draw_sample(store, 2000, 50, 10, seed=3)
    told: list[str] = []
    measured, messages = choose(sample, ["IVF16,PQ5", "IVF16,SQ8"], 10, 1, told.append)
    assert told == ["IVF16,PQ5", "IVF16,SQ8"] and {found.factory for found in measured} == {"IVF16,SQ8"}
    assert "PQ5 does not divide the key width 32" in messages[0]
    with pytest.raises(DistlmError, match="none of the factories"):
        choose(sample, ["IVF16,PQ5"], 10, 1, told.append)


@pytest.mark.parametrize("width", [32, 256, 768, 1024])
def test_the_usual_factories_fit_every_width(width: int) -> None:
    for text in default_factories(width, 256):
        fit_factory(text, width, 100_000, 100_000)


def test_the_verb_writes_a_table_a_plot_and_the_pick(store: Datastore) -> None:
    settings = config(store.folder.parent, factory="IVF16,PQ4")
    text = tune_index(settings, ["IVF16,PQ4", "IVF16,SQ8"], 2000, 50, Budget(key_bytes=20))
    folder = Path(settings.run_dir) / "index-tune"
    assert "pick: index.factory=IVF16,PQ4" in text and "| perplexity" in text
    assert json.loads((folder / "pick.json").read_text())["key_bytes"] == 12
    assert (folder / "factories.png").read_bytes()[:4] == b"\x89PNG"
    # Two factories at two numbers of lists, below a head.
    assert len((folder / "factories.csv").read_text().splitlines()) == 1 + 2 * 2
