"""The written store: rows, values and keys, restarts, refusals."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_text
from support.disk import small_disk
from support.present import present
from support.records import alter
from support.store import add_checkpoint, file_hashes, ready_run, tiny_config

from distlm.config.load import load_config
from distlm.data.dictionary import Dictionary
from distlm.data.records import SplitFacts, TextSource, TokenSettings, TokensMeta
from distlm.data.tokens import TokenFiles
from distlm.datastore import writer
from distlm.datastore.manifest import write_sidecar
from distlm.datastore.reader import Datastore
from distlm.datastore.verify import verify_datastore
from distlm.datastore.writer import plan_datastore, run_datastore_write
from distlm.errors import DistlmError, Stopped
from distlm.models.io import load_model
from distlm.runtime.files import bytes_below
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage


def write(config, **changes):
    config = dataclasses.replace(config, datastore=dataclasses.replace(config.datastore, **changes))
    with open_stage("datastore", config) as stage:
        return run_datastore_write(stage)


def store_of(config):
    return Datastore.open(RunDir.of(config).datastore)


def train_ids(config):
    return np.asarray(TokenFiles.open(RunDir.of(config).tokens(config)).split("train"))


def all_keys(store):
    return np.concatenate([store.keys(shard.index) for shard in store.shards])


def test_values_are_the_tokens_after_the_context_window_in_order(finished):
    store, ids = store_of(finished), train_ids(finished)
    assert store.rows == len(ids) - 32
    assert len(store.shards) > 5
    values = np.concatenate([store.values(shard.index) for shard in store.shards])
    assert values.dtype == np.int32
    np.testing.assert_array_equal(values, ids[32:])


def test_a_key_is_the_tapped_state_that_predicts_its_value(finished):
    store, ids = store_of(finished), train_ids(finished)
    model, _ = load_model(RunDir(Path(finished.run_dir)).model_checkpoint(finished))
    keys = all_keys(store)
    assert keys.dtype == np.float16
    assert keys.shape == (store.rows, 32)
    # Row 1000 is position 1000 % 32 of block 1000 // 32; its sequence starts one window earlier. The last row is in
    # the short last block.
    for row in (0, 31, 32, 1000, store.rows - 1):
        first = row // 32 * 32
        target = 32 + row
        # Position t of the inputs is token t - 1; EOS (2) stands before token 0.
        inputs = np.concatenate([[ids[first - 1] if first else 2], ids[first:target]])
        with torch.no_grad():
            tapped = model(torch.from_numpy(inputs.astype(np.int64))[None], tap="last_ffn_input").tapped
        np.testing.assert_allclose(keys[row].astype(np.float32), tapped[0, -1].numpy(), atol=4e-3)


def test_float32_keys_and_another_tap(ready):
    write(ready, key_dtype="float32", tap="output", split="valid")
    store = store_of(ready)
    assert store.key_dtype == np.float32
    assert store.tap == "output"
    model, _ = load_model(RunDir(Path(ready.run_dir)).model_checkpoint(ready))
    ids = np.asarray(TokenFiles.open(RunDir(Path(ready.run_dir)).tokens(ready)).split("valid")).astype(np.int64)
    inputs = torch.from_numpy(np.concatenate([[2], ids[:63]]))[None]
    with torch.no_grad():
        hidden = model(inputs).hidden
    np.testing.assert_allclose(store.keys(0)[:32], hidden[0, 32:], atol=1e-5)


def test_the_rounded_shard_size_alone_decides_the_bytes(ready, finished):
    # 512 rows are 4 batches of 4 blocks of 32; 600 round down to the same 512.
    write(ready, rows_per_shard=600)
    assert file_hashes(Path(ready.run_dir) / "datastore") == file_hashes(Path(finished.run_dir) / "datastore")


def test_writing_a_finished_store_again_changes_nothing(store_copy):
    folder = Path(store_copy.run_dir) / "datastore"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    summary = write(store_copy)
    assert summary["rows_written"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


def test_the_summary_and_the_record(ready):
    summary = write(ready)
    store = store_of(ready)
    assert summary["rows"] == summary["rows_written"] == store.rows
    assert summary["bytes"] == store.bytes == sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    lines = list(RunDir(Path(ready.run_dir)).metrics.read("datastore write"))
    assert lines[-1].values["rows"] == store.rows
    assert present(lines[-1].number("stage/seconds")) > 0


def test_a_stop_signal_leaves_an_unfinished_store_that_the_next_start_finishes(ready, finished, monkeypatch):
    # Rounds of one unit, four to a shard.
    monkeypatch.setattr("distlm.runtime.units.rounds._GROWTH", 1)
    with open_stage("datastore", ready) as stage:
        calls = 0

        def agreed(_comm):
            nonlocal calls
            calls += 1
            return calls == 13

        # The signal arrives while the last unit of the third shard is written.
        stage.stop.agreed = agreed  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            run_datastore_write(stage)
    with pytest.raises(DistlmError, match=r"unfinished datastore: 3 of \d+ shards done; run `distlm datastore write`"):
        store_of(ready)
    kept = Path(ready.run_dir) / "datastore" / "keys-00002.npy"
    written = kept.stat().st_mtime_ns
    summary = write(ready)
    assert summary["rows_written"] == summary["rows"] - 3 * 512
    assert kept.stat().st_mtime_ns == written
    assert file_hashes(Path(ready.run_dir) / "datastore") == file_hashes(Path(finished.run_dir) / "datastore")


def test_what_a_kill_after_the_last_step_leaves_is_cleared_away(store_copy, finished):
    folder = Path(store_copy.run_dir) / "datastore"
    store = Datastore.open(folder)
    write_sidecar(folder, store.manifest.settings, store.shards[0])
    (folder / ".keys-00001.npy.4711.tmp").write_bytes(b"half")
    assert len(verify_datastore(folder)) == 2
    assert write(store_copy)["rows_written"] == 0
    assert file_hashes(folder) == file_hashes(Path(finished.run_dir) / "datastore")


def test_a_sidecar_of_other_settings_does_not_vouch_for_a_shard(store_copy, finished):
    # As left behind when someone removes the manifest alone.
    folder = Path(store_copy.run_dir) / "datastore"
    store = Datastore.open(folder)
    other = dataclasses.replace(store.manifest.settings, model="f" * 32)
    for shard in store.shards:
        write_sidecar(folder, other, shard)
    (folder / "manifest.json").unlink()
    assert write(store_copy)["rows_written"] == store.rows
    assert file_hashes(folder) == file_hashes(Path(finished.run_dir) / "datastore")


@pytest.mark.parametrize("damage", ["removed", "truncated", "value file removed"])
def test_a_damaged_shard_of_a_finished_store_is_written_again(store_copy, finished, damage):
    folder = Path(store_copy.run_dir) / "datastore"
    if damage == "truncated":
        data = (folder / "keys-00003.npy").read_bytes()
        (folder / "keys-00003.npy").write_bytes(data[:-10])
    else:
        (folder / ("keys-00003.npy" if damage == "removed" else "values-00003.npy")).unlink()
    with pytest.raises(DistlmError, match=r"-00003.npy: (missing|truncated)"):
        Datastore.open(folder)
    assert write(store_copy)["rows_written"] == 512
    assert file_hashes(folder) == file_hashes(Path(finished.run_dir) / "datastore")


def test_other_settings_are_refused_and_named(store_copy):
    # Without the run directory's own record: the store itself must refuse.
    (Path(store_copy.run_dir) / "configs" / "datastore.yaml").unlink()
    with pytest.raises(DistlmError) as caught:
        write(store_copy, tap="output", key_dtype="float32", context_window=16)
    message = str(caught.value)
    assert "datastore.tap: 'last_ffn_input' there, 'output' now" in message
    assert "datastore.key_dtype: 'float16' there, 'float32' now" in message
    assert "datastore.context_window: 32 there, 16 now" in message
    assert "remove the folder" in message
    assert store_of(store_copy).tap == "last_ffn_input"


def test_another_model_is_refused(store_copy):
    add_checkpoint(store_copy, seed=5, step=24)
    with pytest.raises(DistlmError, match=r"other settings \(model \(checkpoint\): '\w+' there, '\w+' now\)"):
        write(store_copy)


def test_keys_that_do_not_fit_float16_are_an_error_that_names_the_row(tmp_path):
    config = ready_run(tmp_path, lines=60, key_scale=1e5)
    with pytest.raises(DistlmError) as caught:
        write(config)
    assert "keys-00000.npy: shard 0 row 0 (token 32 of the split)" in str(caught.value)
    assert "does not fit float16 (largest 65504); set datastore.key_dtype=float32" in str(caught.value)
    assert list((tmp_path / "run" / "datastore").glob("*.npy")) == []
    with pytest.raises(DistlmError, match="unfinished datastore: 0 of"):
        store_of(config)
    (tmp_path / "run" / "configs" / "datastore.yaml").unlink()
    shutil.rmtree(tmp_path / "run" / "datastore")
    write(config, key_dtype="float32")
    assert np.abs(all_keys(store_of(config))).max() > 65504


def test_a_model_that_gives_nan_is_an_error(tmp_path):
    config = ready_run(tmp_path, lines=60, key_scale=float("nan"))
    with pytest.raises(DistlmError, match=r"shard 0 row 0 .* the model gives NaN there"):
        write(config)


def test_a_full_disk_is_refused_before_anything_is_computed(ready, monkeypatch):
    # shutil.disk_usage is replaced: a disk that is really full would need a file system of one's own.
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(DistlmError, match=r"datastore \(\d+ of \d+ shards\) needs .* the disk has 1.0 kB free"):
        write(ready)
    assert not list((Path(ready.run_dir) / "datastore").glob("*.npy"))


def test_a_damaged_shard_needs_no_room_beside_the_one_that_is_written_again(store_copy, monkeypatch):
    folder = Path(store_copy.run_dir) / "datastore"
    before, room = file_hashes(folder), bytes_below(folder)
    with (folder / "keys-00000.npy").open("ab") as stream:
        stream.write(b"x")
    small_disk(monkeypatch, folder, room + (folder / "keys-00000.npy").stat().st_size // 2)
    write(store_copy)
    assert file_hashes(folder) == before


def test_a_model_of_another_dictionary_is_refused(ready):
    card = RunDir(Path(ready.run_dir)).model_checkpoint(ready) / "model.json"
    alter(card, dictionary="0" * 32)
    with pytest.raises(DistlmError, match="wrong dictionary for a model"):
        write(ready)
    assert not (Path(ready.run_dir) / "datastore").exists()


def test_an_unknown_tap_names_the_ones_there_are(ready):
    with pytest.raises(DistlmError, match=r"datastore.tap='middle'.*last_ffn_input"):
        write(ready, tap="middle")


def test_a_folder_of_other_files_is_left_alone(ready):
    folder = Path(ready.run_dir) / "datastore"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(DistlmError, match=r"files that are not a datastore \(thesis.tex\)"):
        write(ready)
    assert (folder / "thesis.tex").read_text() == "precious"


def test_two_writers_at_once_are_refused(ready, monkeypatch):
    import fcntl
    import time

    folder = Path(ready.run_dir) / "datastore"
    folder.mkdir()
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DistlmError, match="another run is writing this datastore"):
            write(ready)


def test_a_finished_store_is_found_finished_without_its_lock(store_copy, monkeypatch):
    """It may be read-only."""
    monkeypatch.setattr(writer, "only_writer", None)
    folder = Path(store_copy.run_dir) / "datastore"
    (folder / ".lock").unlink()
    before = file_hashes(folder)
    assert write(store_copy)["rows_written"] == 0
    assert file_hashes(folder) == before


def test_the_plan_agrees_with_what_is_written(finished):
    plan, store = plan_datastore(finished, 2), store_of(finished)
    headers = 128 * 2 * len(store.shards)
    assert plan.disk_bytes == store.bytes - headers
    assert f"{store.rows} rows x 32 float16 in {len(store.shards)} shards" in plan.work
    assert plan.seconds is not None


def test_the_plan_of_wikitext103_needs_the_papers_disk(tmp_path):
    # Sparse token files with the real counts: only their sizes are read.
    counts = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for split, count in counts.items():
        with (tokens / f"{split}.bin").open("wb") as stream:
            stream.truncate(4 * count)
    dictionary = Dictionary([f"w{i}" for i in range(70_000)], [1] * 70_000)
    dictionary.save(tokens / "dict.txt")
    splits = {split: SplitFacts(count, 0, 0, "0" * 32) for split, count in counts.items()}
    TokensMeta(
        dtype="int32", vocabulary=len(dictionary), types=len(dictionary), dictionary=dictionary.hash, splits=splits,
        settings=TokenSettings("folder"), source=TextSource("folder"), edition=None,
    ).write(tokens / "meta.json")  # fmt: skip
    config = load_config(
        "wikitext103", [f"run_dir={tmp_path / 'run'}", f"data.tokens_dir={tokens}", "launch.threads=1"]
    )
    plan = plan_datastore(config, 8)
    assert "103225485 rows x 1024 float16 in 104 shards" in plan.work
    # knnlm.md: keys 211.4 GB in float16, values 0.41 GB in int32.
    assert plan.disk_bytes == pytest.approx(211.8e9, rel=1e-3)
    # Never a whole shard of 2 GB: the model, one batch of 6,144 tokens, and four batches of keys.
    assert plan.memory_bytes < 2.5e9


def test_the_plan_without_token_files_says_so(tmp_path):
    text = write_text(tmp_path / "text")
    plan = plan_datastore(tiny_config(tmp_path / "run", text), 2)
    assert any("no token files yet" in note for note in plan.notes)
    assert plan.disk_bytes > 0
