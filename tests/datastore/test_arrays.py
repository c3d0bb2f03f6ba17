"""A datastore from arrays: what was given, in the format that the rest reads, whole or refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.disk import small_disk
from support.index import config
from support.knn import in_stage

import distlm
from distlm.datastore.exchange import arrays
from distlm.datastore.manifest import read_manifest
from distlm.datastore.verify import verify_datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import open_index, run_index_build
from distlm.runtime.lock import is_lock
from distlm.runtime.rundir import RunDir


def some(rows: int = 700, width: int = 8, dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((rows, width)).astype(dtype), random.integers(0, 50, rows)


@pytest.mark.parametrize("dtype, key_dtype, kept", [
    ("float16", None, "float16"), ("float64", None, "float32"), ("float32", "float16", "float16"),
    ("float16", "float32", "float32"),
])  # fmt: skip
def test_rows_are_those_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, key_dtype: Any, kept: str
) -> None:
    # More than one piece a shard.
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 4 * 8 * 100)
    keys, values = some(dtype=dtype)
    store = distlm.write_datastore(tmp_path / "s", keys, values, key_dtype=key_dtype, rows_per_shard=256)
    assert len(store) == 700 and len(store.shards) == 3 and store.vocabulary == values.max() + 1
    found = store[:]
    assert found.keys.dtype == kept and found.values.dtype == np.int32
    np.testing.assert_array_equal(found.keys, keys.astype(kept))
    np.testing.assert_array_equal(found.values, values)
    assert verify_datastore(tmp_path / "s") == []
    again = distlm.Datastore.open(tmp_path / "s")
    assert again.fingerprint == store.fingerprint
    other = distlm.write_datastore(tmp_path / "other", keys * 2, values, key_dtype=key_dtype, rows_per_shard=256)
    assert other.fingerprint != store.fingerprint


def test_an_index_is_built_of_it(tmp_path: Path) -> None:
    keys, values = some(3000, 32)
    store = distlm.write_datastore(tmp_path / "store", keys, values)
    own = config(tmp_path / "run", factory="IVF16,Flat")
    own.datastore.folder = str(tmp_path / "store")
    in_stage("index", own, run_index_build)
    ids, distances = open_index(RunDir.of(own).index, store).search(np.asarray(keys[:50], np.float32), 1, 16)
    assert ids[:, 0].tolist() == list(range(50)) and distances.max() < 1e-2


def test_a_killed_start_is_begun_anew_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = some()
    real = arrays._write

    def killed(folder: Path, settings: Any, shard: Any, *given: Any) -> Any:
        if shard.index == 1:
            raise KeyboardInterrupt
        return real(folder, settings, shard, *given)

    monkeypatch.setattr(arrays, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        distlm.write_datastore(tmp_path / "s", keys, values, rows_per_shard=256)
    assert not read_manifest(tmp_path / "s").complete
    with pytest.raises(DistlmError, match=r"call distlm\.write_datastore again with the same"):
        distlm.Datastore.open(tmp_path / "s")
    monkeypatch.undo()
    with pytest.raises(DistlmError, match="not empty"):
        distlm.write_datastore(tmp_path / "s", keys, values, rows_per_shard=100)
    # The disk just holds the store: what is there already needs no room beside it.
    small_disk(monkeypatch, tmp_path / "s", 700 * (8 * 2 + 4) + 2500)
    np.testing.assert_array_equal(
        distlm.write_datastore(tmp_path / "s", keys, values, rows_per_shard=256)[:].keys, keys
    )
    with pytest.raises(DistlmError, match=r"not empty \(keys-00000\.npy"):
        distlm.write_datastore(tmp_path / "s", keys, values, rows_per_shard=256)
    (tmp_path / "s" / "keys-00001.npy").write_bytes(b"")
    with pytest.raises(DistlmError, match=r"truncated.*remove the folder and call distlm\.write_datastore again"):
        distlm.Datastore.open(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    assert len(distlm.write_datastore(tmp_path / "s", keys, values, rows_per_shard=256)) == len(keys)
    (tmp_path / "file").touch()
    with pytest.raises(DistlmError, match="is a file"):
        distlm.write_datastore(tmp_path / "file", keys, values)


def test_keys_that_are_no_numbers_are_refused_by_row(tmp_path: Path) -> None:
    keys, values = some(dtype="float32")
    for wrong in (np.nan, np.inf, 1e6):
        keys[333, 3] = wrong
        with pytest.raises(DistlmError, match="row 333 holds a number that is not finite or does not fit float16"):
            distlm.write_datastore(tmp_path / "s", keys, values, key_dtype="float16", rows_per_shard=256)
        assert [path for path in (tmp_path / "s").iterdir() if not is_lock(path)] == []
    # What the message advises works there, too.
    keys[333, 3] = 1e6
    store = distlm.write_datastore(tmp_path / "s", keys, values, key_dtype="float32", rows_per_shard=256)
    np.testing.assert_array_equal(store[:].keys, keys)


KEYS, VALUES = some()


@pytest.mark.parametrize("keys, values, more, message", [
    (KEYS[0], VALUES, {}, "keys: float16 [8]"), (KEYS.astype(int), VALUES, {}, "keys: int64 [700, 8]"),
    (KEYS[:0], VALUES[:0], {}, "keys: float16 [0, 8]"), (KEYS, VALUES[1:], {}, "values: int64 [699]"),
    (KEYS, VALUES * 1.0, {}, "values: float64 [700]"), (KEYS, VALUES - 1, {}, "values: -1 to"),
    (KEYS, VALUES, {"vocabulary": 10}, "ids from 0 to 9"), (KEYS, VALUES + (1 << 31), {}, "ids from 0 to 2147483647"),
    (KEYS, VALUES, {"key_dtype": "bfloat16"}, "key_dtype='bfloat16'"),
    (KEYS, VALUES, {"rows_per_shard": 0}, "rows_per_shard=0"),
])  # fmt: skip
def test_what_is_no_store_is_refused_before_anything_is_written(
    tmp_path: Path, keys: Any, values: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        distlm.write_datastore(tmp_path / "s", keys, values, **more)
    assert not (tmp_path / "s").exists()
