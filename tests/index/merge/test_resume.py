"""A merge that was cut short goes on with the units that are missing, and only with those."""

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.index import config, one_process_build, one_rank, vectors, write_store

from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_merge, run_index_train
from distlm.index.merge import journal, write
from distlm.index.merge.join import join_indexes
from distlm.index.merge.write import write_unit
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import StopFlag

KEYS = vectors(6000)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("distlm.index.merge.stage.UNIT_BYTES", 20_000)
    monkeypatch.setattr(journal, "SAVE_S", 0.0)
    monkeypatch.setattr(write, "ROUND_UNITS", 1)
    write_store(tmp_path / "datastore", KEYS)
    with one_rank(config(tmp_path, factory="IVF32,SQ8")) as stage:
        run_index_train(stage)
        run_index_add(stage)
    return tmp_path


def merge(run_dir: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> int:
    """Units written by a merge that fails at the unit after `most`."""
    written = 0

    def counted(*arguments: Any) -> str:
        nonlocal written
        if written == most:
            raise OSError(errno.EIO, "the power went")
        written += 1
        return write_unit(*arguments)

    monkeypatch.setattr(write, "write_unit", counted)
    with one_rank(config(run_dir, factory="IVF32,SQ8")) as stage:
        if most < 99:
            with pytest.raises(DistlmError, match="input/output error"):
                run_index_merge(stage)
        else:
            run_index_merge(stage)
    monkeypatch.setattr(write, "write_unit", write_unit)
    return written


def test_the_missing_units_are_written_and_the_bytes_are_those_of_one_process(
    added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge(shutil.copytree(added, added / "undisturbed"), monkeypatch, 99)
    assert merge(added, monkeypatch, 5) == 5
    assert not (added / "index" / "merged.index").exists()
    # The unit that was recorded last may not be the one that was written last.
    assert whole - 5 <= merge(added, monkeypatch, 99) <= whole - 3
    one_process_build(added / "index" / "template.index", KEYS, added / "one.index")
    assert (added / "index" / "merged.index").read_bytes() == (added / "one.index").read_bytes()
    assert not list((added / "index").glob(".merged*"))


def test_parts_that_were_written_again_are_merged_anew(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merge(shutil.copytree(added, added / "undisturbed"), monkeypatch, 99)
    merge(added, monkeypatch, 5)
    part = added / "index" / "parts" / "part-00001.index"
    part.touch()
    assert merge(added, monkeypatch, 99) == whole


def test_units_that_do_not_read_as_they_were_written_are_written_again(
    added: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge(shutil.copytree(added, added / "undisturbed"), monkeypatch, 99)
    merge(added, monkeypatch, 5)
    unfinished = added / "index" / ".merged.index.tmp"
    data = bytearray(unfinished.read_bytes())
    # As after a crash of the machine: the journal says that it is there.
    data[len(data) // 50] ^= 1
    unfinished.write_bytes(data)
    assert whole - 4 <= merge(added, monkeypatch, 99) <= whole - 2
    expected = (added / "undisturbed" / "index" / "merged.index").read_bytes()
    assert (added / "index" / "merged.index").read_bytes() == expected


def test_writes_that_another_rank_wrote_over_are_found(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merge(shutil.copytree(added, added / "undisturbed"), monkeypatch, 99)

    def over(path: Path, edges: list[write.Edges]) -> list[int]:
        with path.open("r+b") as stream:
            stream.seek(edges[2].places[0][0])
            stream.write(bytes(16))
        return lost(path, edges)

    lost = write._lost_units
    monkeypatch.setattr(write, "_lost_units", over)
    with (
        one_rank(config(added, factory="IVF32,SQ8")) as stage,
        pytest.raises(DistlmError, match=rf"1 of {whole} pieces do not read back"),
    ):
        run_index_merge(stage)
    monkeypatch.setattr(write, "_lost_units", lost)
    assert not (added / "index" / "merged.index").exists()
    assert merge(added, monkeypatch, 99) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_too_small_leaves_the_parts_and_no_index(added: Path) -> None:
    # Blocks are reserved before the first unit is written, so a disk cannot fill up in the middle.
    disk = added / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        shutil.copytree(added / "index" / "parts", disk / "parts")
        before = {path: path.read_bytes() for path in (disk / "parts").iterdir()}
        paths = sorted((disk / "parts").glob("*.index"))
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        for check in (True, False):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(DistlmError, match=r"disk|No space"):
                if not check:
                    # Somebody else takes the space between the check and the reservation.
                    patch.setattr(write, "require_free_disk", lambda *_: None)
                join_indexes(SingleComm(), StopFlag(), paths, disk / "all.index", "keep")
            assert {path: path.read_bytes() for path in (disk / "parts").iterdir()} == before
            assert sorted(path.name for path in disk.iterdir()) == ["filler", "parts"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
