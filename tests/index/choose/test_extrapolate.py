"""What samples say of a whole store."""

import numpy as np
import pytest

from distlm.index.choose.extrapolate import recall_at, time_at
from distlm.index.choose.measure import Question, Sample, exact_places, measure
from distlm.index.choose.proposals import (
    LEAST_KEYS_PER_LIST,
    Proposal,
    asked_for,
    code_proposals,
    list_proposals,
    lists_of,
)
from distlm.index.factory import fit_factory


def test_time_is_a_part_that_grows_with_the_codes_and_one_that_does_not() -> None:
    assert time_at([100, 200], [1.5, 2.0], 1000) == pytest.approx(6.0)
    assert time_at([100, 200], [2.0, 1.9], 1000) == 1.9, "noise is no gain"
    assert time_at([100, 200], [0.1, 2.0], 400) == 4.0, "and no part of it is negative"
    assert time_at([100], [2.0], 100) == 2.0


def test_recall_follows_a_power_of_the_keys() -> None:
    met = [1.2, 0.6, 0.3]
    first, second, third = (1 - np.exp(-count) for count in met)
    assert recall_at([1000, 4000], [first, second], 16_000) == pytest.approx(third)
    assert recall_at([1000, 4000], [0.5, 0.9], 10**30) == 1
    assert recall_at([1000, 4000], [0.7, 0.7], 10**8) == pytest.approx(0.7)
    assert recall_at([4000], [0.7], 4000) == 0.7
    assert 0 <= recall_at([1000, 4000], [1.0, 0.0], 10**9) <= 1


@pytest.mark.parametrize("code", ["IVF1,Flat", "PCA16,IVF1,SQ4"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_recall_of_the_whole_store_is_near_what_two_samples_say(code: str, decay: float) -> None:
    """Of 32,000 keys, from 2,000 and 8,000 of them, nearer than these have it themselves."""
    rows, k = 32_000, 160
    spread = np.arange(1, 33) ** -decay
    keys = (np.random.default_rng(0).standard_normal((rows + 200, 32)) * spread).astype(np.float32)
    keys, queries = keys[:-200], keys[-200:]
    whole = Sample(keys, np.arange(rows), queries, exact_places(keys, queries, k), 1.0)
    proposal = Proposal(code.replace("IVF1", "IVF512"), 512, rows)
    samples = [whole.part(2000, 10, 1), whole.part(8000, 40, 1)]
    question = Question(rows, k, probes=(8, 32))
    told = measure(proposal, samples, question)
    found = measure(proposal, [whole], question)
    for one, true in zip(told, found, strict=True):
        assert (one.factory, one.nprobe, one.candidates) == (true.factory, true.nprobe, true.candidates)
        assert true.store_recall == true.recall and true.store_ms == true.query_ms
        assert one.store_recall == pytest.approx(true.recall, abs=0.06), (one, true)
        if abs(one.recall - true.recall) > 0.05:
            assert abs(one.store_recall - true.recall) < abs(one.recall - true.recall)
    # 128 and 256 lists of the samples are the same multiple of √keys.
    assert [proposal.at(count) for count in (2000, 8000, rows)] == [
        proposal.factory.replace("IVF512", f"IVF{lists}") for lists in (128, 256, 512)
    ]


@pytest.mark.parametrize("width", [4, 32, 256, 768, 1024])
def test_what_is_proposed_fits_every_width_and_can_be_trained(width: int) -> None:
    rows, sample = 1_000_000, 1 << 20
    codes = code_proposals(width, rows, sample)
    names = " ".join(code.factory for code in codes)
    assert all(name in names for name in ("SQ4", "SQ6", "SQ8", "RaBitQ", "PQ", f"PCA{max(4, width // 2)}"))
    lists = list_proposals(codes[:2], rows, [50_000, 200_000], sample)
    assert {one.lists for one in lists} == {1024, 2048, 8192, 16384}, "√N to 16·√N, and 4·√N is there"
    assert any("HNSW" in one.factory for one in lists) and not any("HNSW" in one.factory for one in codes)
    for one in [*codes, *lists]:
        assert not fit_factory(one.factory, width, rows, sample).messages or "PQ" in one.factory
        used = fit_factory(one.at(50_000), width, 50_000, 50_000, LEAST_KEYS_PER_LIST).used
        assert used == one.at(50_000), "a sample has so many lists as are asked for"


def test_lists_that_few_keys_can_train_stay_as_they_are() -> None:
    assert asked_for("IVF64,PQ8", 10**6).at(5000) == "IVF64,PQ8"
    assert asked_for("IVF16384,PQ8", 10**6).at(10_000) == "IVF1638,PQ8"
    assert lists_of(4, 10**6, 1 << 20) == 4096 and lists_of(16, 10**6, 40_000) == 1024 and lists_of(4, 1, 1) == 1
