"""Opening, refusing, verifying and describing a store."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.records import unsealed

from distlm.datastore.reader import Datastore
from distlm.datastore.verify import datastore_info, verify_datastore
from distlm.errors import DistlmError
from distlm.runtime.files import file_hash


def folder_of(config):
    return Path(config.run_dir) / "datastore"


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    tree = unsealed(path)
    change(tree)
    path.write_text(json.dumps(tree))


def test_an_opened_store_is_mapped_not_read(finished):
    store = Datastore.open(folder_of(finished))
    assert isinstance(store.keys(0), np.memmap)
    assert not store.keys(0).flags.writeable
    assert [shard.first_row for shard in store.shards] == list(np.cumsum([0] + [s.rows for s in store.shards])[:-1])
    assert store.shards[1].keys_hash == file_hash(store.folder / "keys-00001.npy")
    assert store.shards[1].values_hash == file_hash(store.folder / "values-00001.npy")
    assert np.load(store.folder / "keys-00001.npy").shape == (512, store.width)


def test_the_manifest_names_no_time_place_or_rank(finished):
    tree = unsealed(folder_of(finished) / "manifest.json")
    assert set(tree) == {
        "kind", "format", "complete", "rows", "value_dtype", "split", "tap", "rows_per_shard", "key_dtype", "width",
        "vocabulary", "model", "dictionary", "tokens", "context", "shards",
    }  # fmt: skip
    assert set(tree["shards"][0]) == {
        "index", "first_row", "rows", "token_start", "token_end", "keys_xxh3", "values_xxh3", "done",
    }  # fmt: skip
    assert tree["context"]["rule"].endswith("is seen with 32 to 63 tokens before it")


def test_no_store_is_refused(tmp_path):
    with pytest.raises(DistlmError, match=r"no datastore here \(no manifest.json\); run `distlm datastore write`"):
        Datastore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(kind="shopping list"), "not the manifest of a datastore"),
        (lambda tree: tree.update(format=99), "format 99, this version of distlm reads 1"),
        (lambda tree: tree.pop("model"), "missing required field `model`"),
        (lambda tree: tree.update(rows=tree["rows"] + 1), "lists"),
        (lambda tree: tree["shards"].pop(2), "shard 2 does not follow"),
        (lambda tree: tree.update(width=64), r"keys-00000.npy: truncated: \d+ bytes, the manifest says \d+"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(store_copy, change, message):
    edit_manifest(folder_of(store_copy), change)
    with pytest.raises(DistlmError, match=message):
        Datastore.open(folder_of(store_copy))


def test_a_shard_of_another_store_is_refused_by_its_header(store_copy):
    folder = folder_of(store_copy)
    keys = np.load(folder / "keys-00000.npy")
    np.save(folder / "keys-00000.npy", keys.T)
    with pytest.raises(DistlmError, match=r"keys-00000.npy: its .npy header is not the one of this shard"):
        Datastore.open(folder)


def test_another_model_or_dictionary_is_refused(finished):
    store = Datastore.open(folder_of(finished))
    store.require_model(store.model_fingerprint)
    store.require_dictionary(store.dictionary_hash)
    with pytest.raises(DistlmError, match="datastore of another model"):
        store.require_model("f" * 32)
    with pytest.raises(DistlmError, match="datastore of another dictionary"):
        store.require_dictionary("f" * 32)


def test_a_whole_store_has_no_problems(finished):
    assert verify_datastore(folder_of(finished)) == []


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["keys-00002.npy", "values-00004.npy"])
def test_verify_finds_a_flipped_byte(store_copy, name):
    flip(folder_of(store_copy) / name, -3)
    Datastore.open(folder_of(store_copy))
    problems = verify_datastore(folder_of(store_copy))
    assert f"{name}: checksum" in problems[0]
    assert all(name in problem for problem in problems)


def test_verify_finds_what_is_missing_truncated_or_extra(store_copy):
    folder = folder_of(store_copy)
    (folder / "values-00001.npy").unlink()
    (folder / "keys-00002.npy").write_bytes((folder / "keys-00002.npy").read_bytes()[:1000])
    with (folder / "keys-00003.npy").open("ab") as stream:
        stream.write(b"more")
    shutil.copy(folder / "keys-00000.npy", folder / "keys-00099.npy")
    problems = verify_datastore(folder)
    assert [problem.rpartition("/")[2].partition(":")[0] for problem in problems] == [
        "values-00001.npy", "keys-00002.npy", "keys-00003.npy", "keys-00099.npy",
    ]  # fmt: skip
    for problem, kind in zip(problems, ["missing", "truncated", "too long", "not a file of this store"], strict=True):
        assert kind in problem


def test_verify_finds_rows_that_cannot_be_right(store_copy):
    # Files with right checksums and wrong contents, as a careless import would leave them.
    folder = folder_of(store_copy)
    keys, values = np.load(folder / "keys-00001.npy"), np.load(folder / "values-00001.npy")
    keys[7, 3] = np.nan
    keys[9] = np.inf
    values[[5, 6]] = [-4, 100_000]
    np.save(folder / "keys-00001.npy", keys)
    np.save(folder / "values-00001.npy", values)

    def rehash(tree):
        for name in ("keys", "values"):
            tree["shards"][1][f"{name}_xxh3"] = file_hash(folder / f"{name}-00001.npy")

    edit_manifest(folder, rehash)
    problems = verify_datastore(folder)
    assert len(problems) == 2
    assert "keys-00001.npy: keys that are not finite in 2 rows, first in row 7" in problems[0]
    assert "values-00001.npy: a value outside 0.." in problems[1]
    assert "in 2 rows, first in row 5" in problems[1]


def test_info_of_a_finished_store(finished):
    info = datastore_info(folder_of(finished))
    store = Datastore.open(folder_of(finished))
    assert info["rows"] == store.rows
    assert info["shards"] == info["shards_done"] == len(store.shards)
    assert info["fingerprint"] == store.fingerprint
    assert info["bytes"] == store.bytes
    assert json.loads(json.dumps(info)) == info


def test_an_unfinished_store_says_how_far_it_is(store_copy):
    folder = folder_of(store_copy)

    def unfinish(tree):
        tree["complete"] = False
        for shard in tree["shards"]:
            shard.update(keys_xxh3=None, values_xxh3=None, done=False)

    edit_manifest(folder, unfinish)
    with pytest.raises(DistlmError, match="unfinished datastore: 0 of"):
        Datastore.open(folder)
    assert "unfinished" in verify_datastore(folder)[0]
    assert datastore_info(folder)["shards_done"] == 0
    assert datastore_info(folder)["fingerprint"] is None
