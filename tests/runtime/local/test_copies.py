"""Copies on a node's disk: checked on the way, taken again after a kill, removed at the end, refused with reason."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.config import config_of

from distlm.errors import Busy, DistlmError, Stopped, UsageError
from distlm.runtime import checked
from distlm.runtime.checked import Written
from distlm.runtime.files import file_hash
from distlm.runtime.local import copies as module
from distlm.runtime.local.copies import Wanted, copied, read_in_place
from distlm.runtime.local.place import identity
from distlm.runtime.stage import Stage, open_stage


@pytest.fixture
def files(tmp_path: Path) -> list[Written]:
    """Three files as they were written."""
    folder = tmp_path / "store"
    folder.mkdir()
    made = []
    for number in range(3):
        path = folder / f"keys-{number}.npy"
        path.write_bytes(os.urandom(1000 + number))
        made.append(Written(path, file_hash(path), "copy it again"))
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def opened(tmp_path: Path, disk: Path) -> Iterator[Callable[..., Stage]]:
    """A stage of a run whose copies go to `disk`, or where `stage_in` says."""
    with ExitStack() as stack:

        def stage(stage_in: str = str(disk), *words: str, run: str = "run") -> Stage:
            config = config_of("demo", [f"run_dir={tmp_path / run}", f"launch.stage_in={stage_in}", *words])
            return stack.enter_context(open_stage("index", config))

        yield stage


def groups(files: list[Written]) -> list[Wanted]:
    return [Wanted(files[0].path.parent, files)]


def test_files_are_read_from_copies_that_are_gone_afterwards(files, disk, opened, capsys):
    with copied(opened(), "index add", groups(files)) as copies:
        for file in files:
            copy = copies[file.path]
            assert disk in copy.parents and copy.read_bytes() == file.path.read_bytes()
    assert list(disk.iterdir()) == []
    said = capsys.readouterr().err
    assert "index add: copying to" in said and "3003/3003 bytes (100%)" in said


def test_copying_is_a_reading_that_later_stages_remember(files, opened, monkeypatch, tmp_path):
    monkeypatch.setenv(checked.VARIABLE, str(tmp_path / "checked"))
    stage = opened()
    with copied(stage, "index add", groups(files[:2])):
        pass
    monkeypatch.setattr(checked, "file_hash", lambda path, _like: pytest.fail(f"{path} is read again"))
    stage.require_whole(files[0].path.parent, files[:2])
    with pytest.raises(pytest.fail.Exception):
        stage.require_whole(files[0].path.parent, files)
    assert read_in_place(files, groups(files[:2])) == files[2:]


@pytest.mark.parametrize("place", [0, 500, -1])
def test_a_byte_that_rotted_is_found_while_it_is_copied(files, disk, opened, place):
    data = bytearray(files[1].path.read_bytes())
    data[place] ^= 1
    files[1].path.write_bytes(data)
    said = r"keys-1\.npy: damaged: its checksum is .* was written; copy it again"
    with pytest.raises(DistlmError, match=said), copied(opened(), "index add", groups(files)):
        pytest.fail("it was given to the stage")
    assert list(disk.iterdir()) == []


def test_without_verify_it_is_copied_as_it_is(files, opened):
    files[1].path.write_bytes(b"other")
    with copied(opened("", "launch.verify=false"), "index add", []) as nothing:
        assert nothing == {}
    stage = opened(str(files[0].path.parent.parent), "launch.verify=false")
    with copied(stage, "index add", groups(files)) as found:
        assert found[files[1].path].read_bytes() == b"other"


def test_a_missing_file_is_named(files, disk, opened):
    files[2].path.unlink()
    said = r"keys-2\.npy: missing; copy it again"
    with pytest.raises(DistlmError, match=said), copied(opened(), "index add", groups(files)):
        pass
    assert list(disk.iterdir()) == []


def test_an_error_of_the_stage_leaves_no_copies(files, disk, opened):
    with pytest.raises(DistlmError, match="of the stage"), copied(opened(), "index add", groups(files)):
        assert len(list(disk.rglob("*.npy"))) == 3
        raise DistlmError("of the stage")
    assert list(disk.iterdir()) == []


def test_a_stop_breaks_off_a_copy_and_leaves_none(files, disk, opened, monkeypatch):
    stage, chunks, read = opened(), module._chunks, []

    def stopped(file: Written) -> Iterator[bytes]:
        for chunk in chunks(file):
            stage.stop.reason = "SIGTERM"
            read.append(chunk)
            yield chunk

    monkeypatch.setattr(module, "_chunks", stopped)
    monkeypatch.setattr(module, "_CHUNK", 100)
    with pytest.raises(Stopped), copied(stage, "index add", groups(files)):
        pytest.fail("it went on")
    assert len(read) == 1 and list(disk.iterdir()) == []


def test_what_a_killed_start_left_is_taken_where_it_is_whole(files, disk, opened, capsys, monkeypatch):
    stage = opened()
    left = killed(stage, groups(files))
    first, second, third = sorted(left.iterdir(), key=lambda path: path.name.rpartition("-")[2])
    second.write_bytes(b"cut")
    third.unlink()
    (left / ".half.tmp").write_bytes(b"half")
    (left / "of-another-index").write_bytes(b"old")
    made = first.stat().st_ino
    capsys.readouterr()
    with copied(stage, "index add", groups(files)) as copies:
        assert copies[files[0].path].stat().st_ino == made
        assert sorted(left.iterdir()) == sorted(copies.values())
        assert all(file_hash(copies[file.path]) == file.hash for file in files)
    assert "2003/2003 bytes" in capsys.readouterr().err
    assert list(disk.iterdir()) == []


def test_what_a_dead_run_left_is_removed_by_others_and_what_a_living_one_uses_is_not(files, disk, opened):
    dead, living = opened(run="dead"), opened(run="living")
    left = killed(dead, groups(files))
    (disk / "distlm-elsewhere-1").mkdir()
    (disk / "distlm-elsewhere-1.lock").touch()
    with copied(living, "index add", groups(files)) as theirs:
        assert not left.exists()
        with copied(opened(), "index add", groups(files)) as ours:
            assert not set(ours.values()) & set(theirs.values())
        assert all(path.exists() for path in theirs.values())
    # Whose node cannot be asked is left alone.
    assert sorted(path.name for path in disk.iterdir()) == ["distlm-elsewhere-1", "distlm-elsewhere-1.lock"]


def test_the_same_work_twice_at_once_is_refused(files, disk, opened, monkeypatch):
    monkeypatch.setattr("distlm.runtime.local.place._PATIENCE_S", 0)
    stage = opened()
    with copied(stage, "index add", groups(files)) as copies:
        said = rf"in use by the same stage of the same run \(.*pid {os.getpid()} on "
        with pytest.raises(Busy, match=said), copied(stage, "index add", groups(files)):
            pass
        assert all(path.exists() for path in copies.values())


def test_too_little_room_is_said_before_a_byte_is_copied(files, disk, opened, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    said = rf"launch\.stage_in=\S+: {disk} on {socket.gethostname()} has 2\.0 kB free, and the copies need 3\.0 kB; .*"
    with pytest.raises(DistlmError, match=said), copied(opened(), "index add", groups(files)):
        pass
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("scratch", UsageError, "launch.stage_in=scratch: must be an absolute path"),
        ("$NOT_SET_HERE/x", DistlmError, r"launch.stage_in=\$NOT_SET_HERE/x: NOT_SET_HERE has no value on "),
        ("{tmp}/no/such", DistlmError, "launch.stage_in=.*/no/such: on .*; name a folder that every node has"),
        ("{tmp}/store/keys-0.npy", DistlmError, "keys-0.npy.*; name a folder that every node has"),
    ],
)
def test_a_place_that_cannot_be(files, opened, tmp_path, text, kind, said):
    with pytest.raises(kind, match=said), copied(opened(text.format(tmp=tmp_path)), "index add", groups(files)):
        pass


def test_variables_are_those_of_the_node_and_the_environment_stands_for_the_setting(files, disk, opened, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(disk))
    monkeypatch.setenv("DISTLM_STAGE_IN", "${NODE_DISK}/mine")
    with copied(opened(""), "index add", groups(files)) as copies:
        assert all(disk / "mine" in path.parents for path in copies.values())
    assert list((disk / "mine").iterdir()) == []


def test_ranks_share_copies_where_they_see_one_folder_of_one_node(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    here = identity(one, "localhost")
    assert here == identity(one, "localhost")
    assert here not in (identity(other, "localhost"), identity(one, "node2"))
    # A container's own disk under the same path.
    one.rename(tmp_path / "before")
    other.rename(one)
    assert identity(one, "localhost") != here
    boot = tmp_path / "boot_id"
    boot.write_text("another start", "ascii")
    monkeypatch.setattr("distlm.runtime.local.place._BOOT", boot)
    assert identity(tmp_path, "localhost")[1] == "another start"


def killed(stage: Stage, wanted: list[Wanted]) -> Path:
    """The folder that a start leaves when it is killed while its copies are used: nobody holds its lock."""
    with copied(stage, "index add", wanted) as copies:
        (folder,) = {path.parent for path in copies.values()}
        shutil.copytree(folder, folder.with_name("kept"))
    folder.with_name("kept").rename(folder)
    folder.with_name(f"{folder.name}.lock").touch()
    return folder
