"""Which factory strings are taken, how they are fitted to few keys, and what the refusals say."""

import pytest

from distlm.errors import DistlmError
from distlm.index.factory import fit_factory


def test_enough_keys_leave_the_factory_as_asked() -> None:
    plan = fit_factory("IVF64,PQ8", 32, 100_000, 1 << 20)
    assert (plan.used, plan.nlist, plan.code_size, plan.key_bytes, plan.messages) == ("IVF64,PQ8", 64, 8, 16, [])


@pytest.mark.parametrize(
    ("rows", "nlist"), [(39 * 64, 64), (39 * 64 - 1, 32), (39 * 4, 4), (39 * 4 - 1, 2), (77, 1), (1, 1)]
)
def test_lists_are_scaled_to_39_keys_each(rows: int, nlist: int) -> None:
    plan = fit_factory("IVF64,Flat", 32, rows, 1 << 20)
    assert (plan.nlist, plan.used) == (nlist, f"IVF{nlist},Flat")
    assert bool(plan.messages) == (nlist != 64)


def test_a_small_sample_scales_lists_too_and_is_named() -> None:
    plan = fit_factory("PCA16,IVF1024_HNSW8,SQ8", 32, 10**6, 5000)
    assert (plan.used, plan.sample) == ("PCA16,IVF128_HNSW8,SQ8", 5000)
    assert "index.sample" in plan.messages[0]


def test_sample_is_256_per_list_and_enough_for_pq() -> None:
    assert fit_factory("IVF1024,PQ8", 32, 10**7, 1 << 20).sample == 262_144
    assert fit_factory("IVF16,PQ8", 32, 10**7, 1 << 20).sample == 65_536
    assert fit_factory("IVF16,PQ8x4", 32, 10**7, 1 << 20).sample == 65_536


def test_a_quantiser_of_more_bits_has_more_keys() -> None:
    ten, twelve = (fit_factory(f"IVF16,PQ8x{bits}", 32, 10**7, 1 << 20) for bits in (10, 12))
    assert (ten.sample, twelve.sample) == (262_144, 1 << 20) and ten.messages == twelve.messages == []
    # The message can be followed.
    few = fit_factory("IVF16,PQ8x12", 32, 10**7, 100_000)
    assert few.sample == 100_000 and "100000 keys train 4096 centroids roughly (wanted: 159744" in few.messages[0]
    assert fit_factory("IVF16,PQ8x12", 32, 10**7, 159_744).messages == []


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Flat", "IndexFlat.*knn.search=brute"),
        ("HNSW16", "IndexHNSWFlat.*IVF…,PQ"),
        ("PQ8", "IndexPQ "),
        ("IDMap,Flat", "IndexIDMap"),
        ("IVF16,PQ8,RFlat", "IndexRefineFlat"),
        ("IMI2x3,PQ8", "without a plain number of lists"),
        ("IVF16,PQ8+8", "knn.distances=exact"),
        ("IVF16,PQ8x4fs", "FastScan.*use IVF16,PQ8x4 "),
        ("IVF16,PQ8x4fsr", "FastScan.*use IVF16,PQ8x4 "),
        ("IVF16,RaBitQfs", "FastScan.*use IVF16,RaBitQ "),
        ("IVF16,LSQ4x4", "IndexIVFLocalSearchQuantizer is not one of"),
        ("IVF16,PQ7", "index.factory='IVF16,PQ7': PQ7 does not divide the key width 32; choose one of 1, 2, 4, 8"),
        ("PCA10,IVF16,PQ4", "PQ4 does not divide the key width 10 after the transform; choose one of 1, 2, 5, 10"),
        ("IVF16,Nonsense", "index.factory='IVF16,Nonsense': faiss cannot build"),
    ],
)
def test_refusals_name_the_field_and_the_mend(factory: str, words: str) -> None:
    with pytest.raises(DistlmError, match=words):
        fit_factory(factory, 32, 100_000, 1 << 20)


def test_too_few_keys_for_pq() -> None:
    with pytest.raises(DistlmError, match=r"at least 256 training keys and there are 200; use index.factory=IVF1,SQ8"):
        fit_factory("IVF4,PQ8", 32, 200, 1 << 20)
    assert "roughly (wanted: 9984" in fit_factory("IVF4,PQ8", 32, 300, 1 << 20).messages[0]
    assert fit_factory("IVF4,PQ8x4", 32, 700, 1 << 20).messages == []


def test_empty_store_and_sample() -> None:
    with pytest.raises(DistlmError, match="empty"):
        fit_factory("IVF4,Flat", 32, 0, 10)
    with pytest.raises(DistlmError, match=r"index\.sample=0"):
        fit_factory("IVF4,Flat", 32, 10, 0)
