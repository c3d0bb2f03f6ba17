"""Files are whole or absent; the run directory refuses another configuration; metrics survive a cut line."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import NOBODY, succeeds_as_nobody

from distlm.config.load import load_config
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import (
    atomic_path,
    bytes_below,
    format_bytes,
    load_array,
    order_metadata,
    read_json,
    refuse_no_file,
    require_free_disk,
    sync_folder,
    write_json,
)
from distlm.runtime.metrics import MetricsFile
from distlm.runtime.progress import Progress, format_seconds
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.rundir import RunDir
from distlm.runtime.stop import StopFlag


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half", "utf-8")
        raise RuntimeError("killed here")
    assert read_json(path, "value") == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_cut_and_missing_json_name_the_file(tmp_path):
    (tmp_path / "cut.json").write_text('{"a": ', "utf-8")
    with pytest.raises(DistlmError, match=r"cut\.json"):
        read_json(tmp_path / "cut.json", "manifest")
    with pytest.raises(DistlmError, match=r"gone\.json.*manifest"):
        read_json(tmp_path / "gone.json", "manifest")


def test_a_full_disk_is_refused_before_the_work(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DistlmError, match=r"keys needs .* and the disk has .* free"):
        require_free_disk(tmp_path / "not" / "yet", free * 2, "keys")
    require_free_disk(tmp_path, 1000, "keys")


def test_another_configuration_is_refused_with_the_fields(tmp_path):
    run = RunDir(tmp_path)
    run.open_stage(load_config("demo"), "train")
    run.checkpoint(3).mkdir(parents=True)
    run.open_stage(load_config("demo", ["train.log_every=3", "launch.ranks=5", "run_dir=elsewhere"]), "train")
    with pytest.raises(DistlmError, match=r"train\.lr: 0\.\d+ there, 0\.5 now"):
        run.open_stage(load_config("demo", ["train.lr=0.5"]), "train")
    # A later stage depends on the earlier ones' settings, an earlier stage does not on the later ones'.
    with pytest.raises(DistlmError, match=r"train\.lr"):
        run.open_stage(load_config("demo", ["train.lr=0.5"]), "datastore")
    run.open_stage(load_config("demo", ["knn.k=300"]), "train")


def test_metrics_keep_the_last_line_of_a_repeated_step_and_pass_a_cut_one(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("train", {"loss": 2.0}, step=1)
    metrics.write("train", {"loss": 1.5}, step=1)
    metrics.write("index", {"seconds": 1.0})
    with metrics.path.open("a", encoding="utf-8") as stream:
        stream.write('{"time": 1, "stage": "train", "st')
    assert [line.values["loss"] for line in metrics.read("train")] == [1.5]


def test_the_stop_flag_only_records_and_is_agreed(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with StopFlag() as stop:
        stop.check(SingleComm(), "nothing")
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"
        with pytest.raises(Stopped) as caught:
            stop.check(SingleComm(), "work")
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGUSR1) is before


def test_plain_progress_lines_are_tagged_and_have_rate_and_time_left(capsys):
    with Progress("write", total=4, unit="rows", every_s=0) as progress:
        progress.advance(2, loss="3.1")
        progress.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[rank 0] write: 2/4 rows (50%) loss=3.1 rate=") and "eta=" in lines[0]
    with Progress("write", total=4, unit="rows", rank=1, every_s=0) as progress:
        progress.advance(4)
    assert capsys.readouterr().err == ""


def test_units():
    assert [format_bytes(n) for n in (12, 1536, 7.43e9, 2.1e12)] == ["12 B", "1.5 kB", "7.4 GB", "2.10 TB"]
    assert [format_seconds(s) for s in (5, 65, 3725, float("inf"))] == ["5s", "1m05s", "1h02m", "?"]


def test_what_is_written_has_the_users_modes(tmp_path):
    """safetensors makes its files readable by the owner alone."""
    with atomic_path(tmp_path / "weights") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o600)
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_safetensors_wrote_is_as_open_as_other_files(tmp_path):
    for umask in (0o022, 0o077, 0o027, 0o002):
        before = os.umask(umask)
        try:
            (tmp_path / "plain").write_bytes(b"x")
            with atomic_path(tmp_path / "weights") as temporary:
                temporary.write_bytes(b"x")
                temporary.chmod(0o600)
        finally:
            os.umask(before)
        assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_others_may_do_is_left_to_whoever_wrote(tmp_path):
    """With a default ACL a new file is 0660 whatever the umask, and must stay so."""
    with atomic_path(tmp_path / "shared") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o660)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o660


def test_what_the_system_refuses_is_one_error_about_the_file(tmp_path):
    said = r"/array: no space left on the disk; free some and run"
    with pytest.raises(DistlmError, match=said), atomic_path(tmp_path / "array") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "full", str(temporary))
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(DistlmError, match=r"/folder: is a file, and a folder is needed there"):
        write_json(tmp_path / "folder" / "a.json", {})


def test_folders_keep_their_modes(tmp_path):
    """Root does not notice a folder that nobody may enter; everybody else does."""
    for mode in (0o755, 0o2770, 0o700):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        write_json(folder / "a.json", {})
        sync_folder(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else; every other test is run as this user")
def test_somebody_without_roots_rights_writes_a_run_directory(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])

    def write() -> None:
        run = RunDir(Path("run"))
        for _ in range(2):
            run.open_stage(config, "prepare")
        run.metrics.write("prepare", {"tokens": 1})

    assert succeeds_as_nobody(tmp_path, write)
    assert (tmp_path / "run").stat().st_uid == NOBODY and read_json(tmp_path / "run" / "code.json", "code")


def test_bytes_below_a_folder_in_which_files_vanish(tmp_path, monkeypatch):
    """The ranks of a launcher that was killed go on for a moment: they rename what they have written."""
    (tmp_path / "a").mkdir()
    for name, size in (("a/1.npy", 10), ("a/2.npy", 20), ("3.json", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert bytes_below(tmp_path) == 35 and bytes_below(tmp_path, ".npy") == 30
    assert bytes_below(tmp_path / "none") == 0
    real = Path.lstat

    def lstat(path):
        if path.name == "1.npy":
            path.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert bytes_below(tmp_path) == 25


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    own = socket.gethostname()
    dead, running, elsewhere, old = (
        tmp_path / f".a.json.{node}.tmp"
        for node in (f"{own}.{gone.pid}", f"{own}.{os.getppid()}", f"another.{gone.pid}", f"old.{os.getpid()}")
    )
    of_another = tmp_path / dead.name.replace(".a.", ".b.")
    for path in (dead, running, elsewhere, old, of_another):
        path.touch()
    os.utime(old, (1, 1))
    write_json(tmp_path / "a.json", {})
    assert {*tmp_path.iterdir()} == {running, elsewhere, of_another, tmp_path / "a.json"}


def test_metadata_of_tensors_have_one_order(tmp_path):
    path, facts = tmp_path / "a.safetensors", {name: f"{name}é" for name in "hgfedcba"}
    save_file({"x": torch.arange(6.0), "y": torch.ones(2, 3)}, path, facts)
    size = path.stat().st_size
    order_metadata(path)
    head = path.read_bytes()[8 : path.read_bytes().index(b"}")].decode()
    assert re.findall('"(.)":', head) == sorted(facts) and path.stat().st_size == size
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == facts and file.get_tensor("x").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2**64, "a\ud800"])
def test_what_json_has_not_is_not_written(value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(DistlmError, match=rf"^{path}: not written: a\.b\[1\]\.c is "):
        write_json(path, {"a": {"b": [1, {"c": value}]}})
    assert read_json(path, "value") == {"old": 1}


def test_a_figure_that_is_none_is_null_in_the_metrics(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("train", {"loss": float("nan"), "rate": float("inf"), "lr": 0.5, "name": "x"}, step=3)
    assert "NaN" not in metrics.path.read_text("utf-8") and "Infinity" not in metrics.path.read_text("utf-8")
    (line,) = metrics.read()
    assert line.values == {"loss": None, "rate": None, "lr": 0.5, "name": "x"}


def test_lines_of_metrics_that_nobody_wrote_are_passed_over(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("train", {"loss": 1.0}, step=1)
    with metrics.path.open("ab") as stream:
        for text in (
            b"\xff\xfe", b"[" * 100_000, b'{"time": 1, "stage": "train", "step": [1], "loss": 2}', b"null", b"7",
            b'{"time": "x", "stage": "train"}', b'{"time": 1, "time": 1, "stage": "train"}',
        ):  # fmt: skip
            stream.write(text + b"\n")
    metrics.write("train", {"loss": 2.0}, step=2)
    assert [line.step for line in metrics.read()] == [1, 2]


SORTS = {
    "folder": (lambda path: path.mkdir(), "is a folder"), "pipe": (os.mkfifo, "is a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
}  # fmt: skip


@pytest.mark.parametrize("sort", SORTS)
def test_what_is_no_file_is_neither_read_nor_replaced(sort: str, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    make, words = SORTS[sort]
    make(path)
    for act in (lambda: read_json(path, "value"), lambda: write_json(path, {}), lambda: load_array(path),
                lambda: refuse_no_file(path, "value")):  # fmt: skip
        with pytest.raises(DistlmError, match=rf"^{path}: {words}.*and a file is needed there"):
            act()
    assert path.is_symlink() or not path.is_file()


def test_a_link_that_leads_nowhere_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "value.json").symlink_to("nowhere")
    write_json(tmp_path / "value.json", {"a": 1})
    assert read_json(tmp_path / "value.json", "value") == {"a": 1}


NO_ARRAYS = [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x04\x00(((\n", b"text", b"\x80\x04K\x01."]


@pytest.mark.parametrize("data", NO_ARRAYS)
def test_arrays_that_are_none(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    for mapped in (True, False):
        with pytest.raises(ValueError):
            load_array(path, mapped)


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files a process writes there; another process looks anew."""
    listed = []
    real = os.scandir

    def scandir(folder: object) -> object:
        listed.append(folder)
        return real(folder)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    for unit in range(20):
        write_json(tmp_path / f"unit-{unit}.json", {})
    assert listed == [tmp_path]
    left = tmp_path / f".unit-3.json.{socket.gethostname()}.{2**22 + 1}.tmp"
    left.touch()
    child = multiprocessing.get_context("fork").Process(target=write_json, args=(tmp_path / "unit-3.json", {}))
    child.start()
    child.join()
    assert child.exitcode == 0 and not left.exists()
