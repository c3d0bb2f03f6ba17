"""The training sample is a pure function of seed and store."""

from pathlib import Path

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_train
from distlm.index.build.sample import sample_counts, sample_rows


def test_counts_are_proportional_and_exact() -> None:
    assert sample_counts([1000, 1000, 500], 250) == [100, 100, 50]
    for sample in (1, 7, 333, 2499, 2500, 9999):
        counts = sample_counts([1000, 1000, 500], sample)
        assert sum(counts) == min(sample, 2500)
        assert all(count <= rows for count, rows in zip(counts, [1000, 1000, 500], strict=True))


def test_counts_do_not_overflow_at_full_size() -> None:
    counts = sample_counts([998_400] * 103 + [390_285], 1 << 20)
    assert sum(counts) == 1 << 20
    assert max(counts) - min(counts[:-1]) <= 1


def test_rows_are_sorted_unique_and_keyed_by_seed_and_shard() -> None:
    rows = sample_rows(1, 0, 10_000, 500)
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 0 and rows.max() < 10_000
    assert (rows == sample_rows(1, 0, 10_000, 500)).all()
    assert (rows != sample_rows(1, 1, 10_000, 500)).any()
    assert (rows != sample_rows(2, 0, 10_000, 500)).any()
    # Spread over the whole shard, not its beginning.
    assert 4000 < rows.mean() < 6000


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    keys = vectors(2000)
    keys[1700, 3] = bad
    write_store(tmp_path / "datastore", keys)
    words = "shard 1 row 200 has NaN or infinite keys"
    with one_rank(config(tmp_path, factory="IVF8,SQ8")) as stage, pytest.raises(DistlmError, match=words):
        run_index_train(stage)
    assert not (tmp_path / "index" / "template.json").exists()


def test_add_refuses_a_key_that_the_sample_missed(tmp_path: Path) -> None:
    keys = vectors(3000)
    missed = next(row for row in range(1500) if row not in set(sample_rows(1, 0, 1500, 100)))
    keys[missed, 0] = np.nan
    write_store(tmp_path / "datastore", keys)
    with one_rank(config(tmp_path, factory="IVF2,SQ8", sample=200)) as stage:
        run_index_train(stage)
        with pytest.raises(DistlmError, match=f"shard 0 row {missed} has NaN"):
            run_index_add(stage)
    assert not (tmp_path / "index" / "parts" / "part-00000.json").exists()
