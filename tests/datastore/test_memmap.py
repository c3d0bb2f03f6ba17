"""Raw memory maps of the original: to a store and back, byte for byte; other sizes, values and types are refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import distlm
from support.disk import small_disk
from support.store import arguments, file_hashes, tiny_config

from distlm.config.schema import RunConfig
from distlm.data.tokens import TokenFiles
from distlm.datastore.exchange import memmap
from distlm.datastore.exchange.arrays import write_datastore
from distlm.datastore.exchange.memmap import RawStore, export_memmap, import_memmap
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import StoreSummary
from distlm.errors import DistlmError
from distlm.runtime.files import bytes_below
from distlm.runtime.stage import open_stage


def exported(config: RunConfig, prefix: Path, **types: str) -> dict[str, Any]:
    with open_stage("datastore", config) as stage:
        return export_memmap(stage, str(prefix), **types)


def imported(config: RunConfig, prefix: Path) -> StoreSummary:
    with open_stage("datastore", config) as stage:
        return import_memmap(stage, str(prefix))


def raw(config: RunConfig, prefix: Path, values: str = "int64") -> tuple[np.memmap, np.memmap]:
    """The files as the original opens them: the number of rows and the width are typed in."""
    ids = TokenFiles.open(Path(config.run_dir) / "tokens").split("train")
    rows = len(ids) - 32
    keys = np.memmap(f"{prefix}_keys.npy", np.float16, "r+", shape=(rows, 32))
    return keys, np.memmap(f"{prefix}_vals.npy", values, "r+", shape=(rows, 1))


@pytest.mark.parametrize("values", ["int64", "int32", "int16"])
def test_there_and_back_is_byte_equal(
    finished: RunConfig, ready: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    monkeypatch.setattr(memmap, "PIECE_BYTES", 100 * 4 * 32)  # several pieces in a shard
    exported(finished, tmp_path / "dstore", value_dtype=values)
    keys, tokens = raw(finished, tmp_path / "dstore", values)
    store = Datastore.open(Path(finished.run_dir) / "datastore")
    assert np.array_equal(keys, np.concatenate([store.keys(shard.index) for shard in store.shards]))
    assert np.array_equal(tokens[:, 0], np.concatenate([store.values(shard.index) for shard in store.shards]))
    assert imported(ready, tmp_path / "dstore")["rows"] == len(keys)
    assert file_hashes(Path(ready.run_dir) / "datastore") == file_hashes(Path(finished.run_dir) / "datastore")


def test_keys_in_fp32_and_back(finished: RunConfig, ready: RunConfig, tmp_path: Path) -> None:
    exported(finished, tmp_path / "dstore", key_dtype="float32")
    with pytest.raises(
        DistlmError, match=r"float32 keys, datastore.key_dtype=float16; set datastore.key_dtype=float32"
    ):
        imported(ready, tmp_path / "dstore")
    config = tiny_config(Path(ready.run_dir), Path(ready.data.text_dir), ["datastore.key_dtype=float32"])
    imported(config, tmp_path / "dstore")
    again = Datastore.open(Path(ready.run_dir) / "datastore")
    assert again.key_dtype == np.float32
    first = Datastore.open(Path(finished.run_dir) / "datastore").keys(0)
    assert np.array_equal(again.keys(0), first.astype(np.float32))


def test_what_is_there_is_not_overwritten(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "dstore_vals.npy").write_bytes(b"mine")
    with pytest.raises(DistlmError, match=r"dstore_vals.npy: is there already"):
        exported(finished, tmp_path / "dstore")
    assert [path.name for path in tmp_path.glob("*dstore*")] == ["dstore_vals.npy"]


def test_a_killed_export_begins_anew_on_a_disk_that_just_fits_and_an_error_leaves_nothing(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(finished, tmp_path / "whole" / "dstore")
    size = bytes_below(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(memmap, "_export_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            exported(finished, tmp_path / "out" / "dstore")
    assert bytes_below(tmp_path / "out") == size
    with monkeypatch.context() as patch:
        small_disk(patch, tmp_path / "out", size + size // 50)
        exported(finished, tmp_path / "out" / "dstore")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")
    wide = np.full((300, 32), 1e6, np.float32)
    write_datastore(tmp_path / "wide", wide, np.zeros(300, np.int64))
    config = tiny_config(tmp_path / "run", Path(finished.data.text_dir), [f"datastore.folder={tmp_path / 'wide'}"])
    with pytest.raises(DistlmError, match="do not fit float16; use --keys float32"):
        exported(config, tmp_path / "none" / "dstore", key_dtype="float16")
    assert not list((tmp_path / "none").iterdir())


def test_overflowed_values_are_refused(finished: RunConfig, ready: RunConfig, tmp_path: Path) -> None:
    exported(finished, tmp_path / "dstore", value_dtype="int16")
    with pytest.raises(DistlmError, match=r"int16 values, and the dictionary has 32769 words: ids above 32767"):
        RawStore(str(tmp_path / "dstore")).value_dtype(len(raw(finished, tmp_path / "dstore", "int16")[0]), 32769)
    raw(finished, tmp_path / "dstore", "int16")[1][700] = -5
    with pytest.raises(DistlmError, match=r"row 700 holds -5, the token there is \d+: a negative id: int16"):
        imported(ready, tmp_path / "dstore")
    with pytest.raises(DistlmError, match="unfinished datastore"):
        Datastore.open(Path(ready.run_dir) / "datastore")


def test_other_values_and_zeros_at_the_end_are_refused(finished: RunConfig, ready: RunConfig, tmp_path: Path) -> None:
    exported(finished, tmp_path / "dstore")
    values = raw(finished, tmp_path / "dstore")[1]
    kept, values[:] = np.array(values), np.roll(values, 1)
    with pytest.raises(DistlmError, match=r"row \d+ holds .*another dictionary, text or context; .*data.dictionary="):
        imported(ready, tmp_path / "dstore")
    values[:] = kept
    values[1200:] = 0
    with pytest.raises(DistlmError, match=r"row 1200 holds 0, .*only zeros from there on"):
        imported(ready, tmp_path / "dstore")
    values[:] = kept
    imported(ready, tmp_path / "dstore")
    assert file_hashes(Path(ready.run_dir) / "datastore") == file_hashes(Path(finished.run_dir) / "datastore")


@pytest.mark.parametrize(
    ("rows", "value", "said"),
    [
        (slice(-300, None), 0, r"the key of row \d+ is all zeros: it was never written"),
        (slice(700, 705), 0, r"the key of row 700 is all zeros"),
        (slice(700, 701), np.nan, r"the key of row 700 holds nan; write the store anew with the program"),
        (slice(700, 701), np.inf, r"the key of row 700 holds inf"),
    ],
)
def test_keys_that_nobody_wrote_are_refused(
    finished: RunConfig, ready: RunConfig, tmp_path: Path, rows: slice, value: float, said: str
) -> None:
    exported(finished, tmp_path / "dstore")
    keys, _ = raw(finished, tmp_path / "dstore")
    keys[rows] = value
    keys.flush()
    with pytest.raises(DistlmError, match=rf"dstore_keys.npy: {said}"):
        imported(ready, tmp_path / "dstore")
    assert not (Path(ready.run_dir) / "datastore" / "keys-00001.npy").exists()


def test_files_of_another_size_are_refused(finished: RunConfig, ready: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"dstore_keys.npy: no such file; --prefix is"):
        imported(ready, tmp_path / "dstore")
    exported(finished, tmp_path / "dstore")
    for name, row in (("vals", "2, 4 or 8 bytes"), ("keys", "32 numbers of 2 or 4 bytes")):
        with (tmp_path / f"dstore_{name}.npy").open("ab") as stream:
            stream.write(b"\0" * 64)
        with pytest.raises(DistlmError, match=rf"dstore_{name}.npy: \d+ bytes are not \d+ rows of {row}"):
            imported(ready, tmp_path / "dstore")


@pytest.mark.multiprocess
def test_two_ranks_write_what_one_writes(finished: RunConfig, tmp_path: Path) -> None:
    exported(finished, tmp_path / "one")
    text = Path(finished.data.text_dir)
    shutil.copytree(finished.run_dir, tmp_path / "run")
    command = [*arguments(tmp_path / "run", text), "--prefix", str(tmp_path / "two")]
    assert "rows=" in distlm("datastore", "export-memmap", *command, ranks=2).stdout
    for name in ("keys", "vals"):
        assert (tmp_path / f"one_{name}.npy").read_bytes() == (tmp_path / f"two_{name}.npy").read_bytes()
