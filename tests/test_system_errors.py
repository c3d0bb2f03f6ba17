"""What the system refuses, whichever library says so: the file, the right reason, and no traceback."""

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distlm.cli import main
from distlm.config.load import dump_config, load_config
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.index import faiss_module
from distlm.index.vectors import open_vectors
from distlm.runtime.checked import Written, problem
from distlm.runtime.files import read_json, save_array, write_json
from distlm.runtime.metrics import MetricsFile
from distlm.system_errors import number_of, refuse, system_error, told


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """For the block, no file of this process may be larger; Python ignores the signal, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_index(path: Path) -> None:
    index = faiss.IndexFlatL2(64)
    index.add(np.zeros((4096, 64), np.float32))
    faiss.write_index(index, str(path))


WRITERS: dict[str, Any] = {
    "Python": lambda path: path.write_bytes(bytes(1 << 20)),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(1 << 18)),
    "safetensors": lambda path: save_file({"a": torch.zeros(1 << 18)}, path),
    "faiss": write_index,
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_too_large_is_not_called_a_full_disk(library: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        files_of_at_most(1 << 16),
        pytest.raises(DistlmError, match=r"/file: file too large; raise the limit"),
        told(path),
    ):
        WRITERS[library](path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left on the disk; free some"),
        (OSError("3000000 requested and 12 written"), "no space left on the disk"),
        (RuntimeError("Error: write error in a: 1 != 2 (No space left on device)"), "no space left on the disk"),
        (OSError(errno.EDQUOT, "quota"), "disk quota exceeded"),
        (OSError(errno.EROFS, "read-only"), "read-only file system"),
        (OSError(errno.EIO, "broken"), "input/output error"),
        (OSError(errno.ESTALE, "stale"), "stale file handle"),
    ],
)
def test_reasons(error: Exception, words: str) -> None:
    with pytest.raises(DistlmError, match=f"^there: {words}"), told(Path("there")):
        raise error


def small_index(path: Path) -> None:
    index = faiss.IndexFlatL2(4)
    index.add(np.zeros((100, 4), np.float32))
    faiss_module.write_index(index, path)


@pytest.mark.parametrize("write", [lambda path: save_array(path, np.zeros(200)), small_index], ids=["numpy", "faiss"])
def test_a_full_disk_is_noticed_at_the_end_of_a_small_file(write: Any, tmp_path: Path) -> None:
    # What numpy and faiss write themselves waits in a buffer until the file is closed, and they do not look how that
    # went.
    with files_of_at_most(1000), pytest.raises(DistlmError, match="/file: file too large"), told(tmp_path / "file"):
        write(tmp_path / "file")


def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path) -> None:
    rows = np.arange(24).reshape(4, 6)
    few: list[Any] = [np.array([1.5], np.float16), np.array(3), np.array(["a", "bcd"]), [1, 2]]
    for number, array in enumerate([rows, np.asfortranarray(rows), rows[:, ::2], rows[:0], *few]):
        save_array(tmp_path / "ours.npy", array)
        np.save(tmp_path / "theirs.npy", np.asarray(array, order="C"))
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes(), number


UNREADABLE = Path("/proc/self/mem")
"""It can be opened, and reading its beginning is an input/output error, which names no file."""


def test_a_read_that_fails_names_the_file() -> None:
    for within in (told(Path("/proc")), told(Path("/proc/self"))):
        with pytest.raises(DistlmError, match=f"^{UNREADABLE}: input/output error"), within:
            UNREADABLE.read_bytes()
    with pytest.raises(OSError) as caught, UNREADABLE.open("rb") as stream:
        stream.read(1)
    assert str(system_error(caught.value)).startswith(f"{UNREADABLE}: input/output error")
    assert str(system_error(caught.value, Path("there"))).startswith("there: input/output error")


@pytest.mark.parametrize(
    "read",
    [
        open_vectors,
        lambda path: problem(Written(path, "0" * 32, "delete it")),
        lambda path: read_json(path, "record"),
        Dictionary.load,
    ],
    ids=["vectors", "checksum", "json", "dictionary"],
)
def test_a_file_that_cannot_be_read_is_not_called_damaged(read: Any) -> None:
    try:
        with told(Path("/proc")):
            said = read(UNREADABLE)
    except DistlmError as error:
        said = str(error)
    assert said.startswith(f"{UNREADABLE}: input/output error; the disk or its server fails") and "delete" not in said


def test_why_safetensors_could_not_open_a_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DistlmError, match="/loop: a link that leads back to itself"), told(tmp_path):
        load_file(loop)
    with pytest.raises(DistlmError, match="/gone: no such file"), told(tmp_path / "gone"):
        load_file(tmp_path / "gone")
    (tmp_path / "back").touch()
    with pytest.raises(DistlmError, match="/back: could not be opened; run"):
        refuse(FileNotFoundError("No such file or directory: back"), tmp_path / "back")
    # Where only a folder is known, that it is one says nothing of the file.
    with pytest.raises(DistlmError, match=f"{tmp_path}: could not be opened; run"), told(tmp_path):
        raise FileNotFoundError("No such file or directory: back")
    # What is missing is the caller's to tell.
    refuse(FileNotFoundError(errno.ENOENT, "gone"), tmp_path / "gone")
    refuse(FileNotFoundError("No such file or directory: gone"), tmp_path / "gone")


def test_the_file_that_is_named_is_the_one_that_failed() -> None:
    other = system_error(OSError(errno.EIO, "broken", "other"), Path("there"))
    assert str(other).startswith("other: input/output error")
    own = system_error(OSError(errno.EIO, "broken", "there.tmp"), Path("there"), Path("there.tmp"))
    assert str(own).startswith("there: input/output error")


def test_errors_of_the_code_stay_errors_of_the_code() -> None:
    # As transformers raises it.
    for error in (OSError("gpt2 is not a local folder"), ValueError("no"), DistlmError("own")):
        assert number_of(error) is None
        with pytest.raises(type(error), match=str(error)), told(Path("there")):
            raise error


def test_metrics_that_cannot_be_written_end_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("train", {"loss": 3.0}, step=1)
    with files_of_at_most(metrics.path.stat().st_size + 10):
        for step in range(2, 5):
            metrics.write("train", {"loss": 2.0}, step=step)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{metrics.path}: file too large: the work goes on")
    # What was written of a line does not take the next one with it.
    assert not metrics.path.read_bytes().endswith(b"\n")
    metrics.write("train", {"loss": 1.0}, step=5)
    assert capsys.readouterr().err == f"{metrics.path}: 3 lines of metrics could not be written\n"
    assert [line.step for line in metrics.read()] == [1, 5]
    metrics.say_lost()
    assert capsys.readouterr().err == ""


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line in which a command refuses."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if "distlm: " in line or "Traceback" in line]
    assert caught.value.code in (1, 2) and len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


STAGES = ["data prepare", "train", "datastore write", "index build", "knn search", "evaluate", "run"]


@pytest.mark.parametrize("verb", STAGES)
def test_a_run_directory_that_is_a_file(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine", "utf-8")
    assert f"{tmp_path / 'run'}: is a file" in refusal(capsys, *verb.split(), "demo", f"run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run").read_text("utf-8") == "mine"


@pytest.mark.parametrize("words", [["report"], ["metrics"], ["clean", "search"], ["verify"]], ids=" ".join)
def test_a_file_instead_of_a_run(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine", "utf-8")
    assert str(tmp_path / "run") in refusal(capsys, words[0], tmp_path / "run", *words[1:])


@pytest.mark.parametrize(
    ("verb", "folder"),
    [("data prepare", "tokens"), ("data prepare", "configs"), ("train", "tokens"), ("knn search", "datastore")],
)
def test_a_file_where_a_stage_has_its_folder(
    verb: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).write_text("mine", "utf-8")
    assert str(tmp_path) in refusal(capsys, *verb.split(), "demo", f"run_dir={tmp_path}")
    assert (tmp_path / folder).read_text("utf-8") == "mine"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("verb", ["data prepare", "report"])
def test_a_read_only_file_system(verb: str, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = disk / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("demo", [f"run_dir={run}"])), "utf-8")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert refusal(capsys, *verb.split(), run).startswith(f"distlm: {run}")


def test_a_full_disk(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsFile(disk / "metrics.jsonl")
    metrics.write("train", {"loss": 3.0}, step=1)
    with pytest.raises(OSError), (disk / "filling").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    for step in range(2, 100):
        metrics.write("train", {"note": "x" * 100}, step=step)
    assert capsys.readouterr().err.count("no space left on the disk: the work goes on") == 1
    with pytest.raises(DistlmError, match=r"/a.json: no space left on the disk; free some"):
        write_json(disk / "a.json", list(range(1000)))
    (disk / "filling").unlink()
    metrics.write("train", {"loss": 1.0}, step=100)
    assert [line.step for line in metrics.read()][-1] == 100 and "could not be written" in capsys.readouterr().err
