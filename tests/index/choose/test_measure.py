"""Choosing a factory: what is measured, what is on the front, what a budget picks."""

from pathlib import Path

import numpy as np
import pytest
from support.index import config, vectors, write_store
from support.pictures import description

from distlm.analysis.index_choice import tune_index
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.choose.measure import (
    Budget,
    KnownOf,
    Question,
    draw_sample,
    measure,
    measure_all,
    pareto,
    pick,
    recall,
)
from distlm.index.choose.proposals import asked_for
from distlm.index.records import Candidate, TunedIndex


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder / "datastore", vectors(5000))


def one(name: str, key_bytes: int, query_ms: float, recall: float) -> Candidate:
    return Candidate(name, 8, 10, key_bytes, 2000, 16, recall, query_ms, recall, query_ms, 0.0, 1000, 1)


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
    question = Question(store.rows, 300, exact=False, probes=(1, 16, 999))
    results = measure(asked_for("IVF16,Flat", store.rows), [sample], question)
    assert [result.nprobe for result in results] == [1, 16] and results[1].recall == 1 > results[0].recall
    assert results[0].key_bytes == 136 and (results[0].keys, results[0].lists) == (2000, 16)
    assert recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75
    true = np.array([[1, 2, 3], [4, -1, -1]])
    assert recall(np.array([[3, 9, 1], [-1, -1, -1]]), true) == 0.5
    assert recall(true, true) == 1


def test_what_cannot_be_built_is_left_out_with_its_reason(store: Datastore) -> None:
    sample = draw_sample(store, 2000, 50, 10, seed=3)
    told: list[str] = []
    asked = [asked_for(text, store.rows) for text in ("IVF16,PQ5", "IVF16,SQ8")]
    measured, messages = measure_all(asked, [sample], Question(store.rows, 10), told.append)
    assert told == ["IVF16,PQ5", "IVF16,SQ8"] and {found.factory for found in measured} == {"IVF16,SQ8"}
    assert "PQ5 does not divide the key width 32" in messages[0]
    settings = config(store.folder.parent)
    with pytest.raises(DistlmError, match="none of the factories"):
        tune_index(settings, ["IVF16,PQ5"], 2000, 50, Budget())


def test_more_candidates_find_more_of_the_neighbours(store: Datastore) -> None:
    """Of codes of two bytes; where exact distances do not choose, there is nothing to choose from."""
    sample = draw_sample(store, 4000, 100, 40, seed=3)
    asked, question = asked_for("IVF16,PQ2", store.rows), Question(store.rows, 50, probes=(16,))
    few, many = measure(asked, [sample], question)
    assert (few.candidates, many.candidates) == (50, 100)
    assert few.recall + 0.1 < many.recall and few.rescore_ms > 0
    assert [found.candidates for found in measure(asked, [sample], Question(store.rows, 50, False, probes=(16,)))] == [
        50
    ]


def test_samples_that_as_many_keys_train_have_centroids_of_their_own(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie behind another PCA."""
    monkeypatch.setattr("distlm.index.factory.MOST_KEYS_PER_LIST", 1)
    whole = draw_sample(store, 4000, 50, 40, seed=3)
    samples = [whole.part(1000, 10, seed=3), whole]
    asked, question = asked_for("PCA4,IVF16,Flat", store.rows), Question(store.rows, 50, exact=False, probes=(2,))
    known: KnownOf = {}
    alone, shared = measure(asked, samples, question), measure(asked, samples, question, known)
    assert [one.recall for one in shared] == [one.recall for one in alone]
    assert [one.store_recall for one in shared] == [one.store_recall for one in alone]
    few, many = (next(iter(known[len(sample.keys)].items())) for sample in samples)
    assert few[0] == many[0] and not np.array_equal(few[1], many[1])


def test_the_verb_writes_a_table_a_plot_and_the_pick(store: Datastore) -> None:
    settings = config(store.folder.parent, factory="IVF16,PQ4")
    text = tune_index(settings, ["IVF16,PQ4", "IVF16,SQ8"], 2000, 50, Budget(key_bytes=20))
    folder = Path(settings.run_dir) / "index-tune"
    assert "pick: index.factory=IVF16,PQ4" in text and "| perplexity" in text
    assert "knn.candidates=512" in text and "extrapolated from both" in text
    record = TunedIndex.read(folder / "pick.json")
    assert record.pick in record.measured and record.pick is not None and record.pick.key_bytes == 12
    assert (record.rows, record.k, record.most_bytes, record.least_recall) == (5000, 256, 20, 0)
    seen = description(folder / "factories.png")
    assert seen.startswith(f"{len(pareto(record.measured))} of 8 are on the front")
    assert f"The pick finds {record.pick.store_recall:.1%} in {record.pick.whole_ms:.2f} ms; the fastest" in seen
    # Two factories at two numbers of lists, for k and 2k candidates, below a head.
    assert len((folder / "factories.csv").read_text().splitlines()) == 1 + 2 * 2 * 2 == 1 + len(record.measured)
    assert "Nothing measured" in tune_index(settings, ["IVF16,PQ4"], 2000, 50, Budget(key_bytes=9))
    assert description(folder / "factories.png").endswith("None stays within the budget.")


def test_without_factories_codes_and_numbers_of_lists_are_tried(tmp_path: Path) -> None:
    store = write_store(tmp_path / "datastore", vectors(8000))
    settings = config(tmp_path)
    settings.knn.k = 20
    text = tune_index(settings, [], 10_000, 100, Budget(key_bytes=24))
    record = TunedIndex.read(tmp_path / "index-tune" / "pick.json")
    factories = {found.factory for found in record.measured}
    for code in ("SQ4", "SQ6", "SQ8", "PCAR16,", "PCAR32,", "PQ2", "PQ4x4", "PCA8,", "PCA16,"):
        assert any(code in factory for factory in factories), code
    assert len({found.lists for found in record.measured}) > 1
    assert record.pick is not None and record.pick.key_bytes <= 24
    assert f"Measured on 7900 sampled keys of {store.rows}." in text, "nearly all of the store"
    assert all(found.recall == found.store_recall for found in record.measured)
