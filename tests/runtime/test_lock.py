"""Locks of a folder: one run or several shares, refusals that name the owner, nothing left after an end."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import ENVIRONMENT, succeeds_as_nobody, warm
from support.drivers import lock as lock_driver

from distlm.config import load_config
from distlm.errors import Busy, DistlmError, UsageError
from distlm.runtime import lock
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.share import Share, share_of
from distlm.runtime.stage import open_stage


@contextmanager
def holder(folder: Path, share: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed or told to end."""
    process = subprocess.Popen(
        [sys.executable, lock_driver.__file__, str(folder), *filter(None, [share])],
        # Cold: the process that is started is the one that holds the lock and is named.
        env={**ENVIRONMENT, **warm.COLD, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def take(folder: Path, share: Share | None = None) -> list[str]:
    """Hold the lock for a moment; names in the folder meanwhile."""
    with lock.only_writer(folder, SingleComm(), "writing", share):
        return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.2)


def test_the_refusal_names_job_node_process_and_time(tmp_path: Path) -> None:
    with holder(tmp_path, SLURM_JOB_ID="4711") as other:
        with pytest.raises(DistlmError, match="another run is writing here") as refusal:
            take(tmp_path)
        text = str(refusal.value)
        assert f"Slurm job 4711, pid {other.pid} on {os.uname().nodename} since {time.strftime('%Y-')}" in text
        assert text.startswith(f"{tmp_path}: ") and "run_dir=" in text
    # A killed holder holds nothing; its file does not matter.
    assert take(tmp_path) == [".lock", ".lock.2"]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_shares_together_but_not_with_a_run(tmp_path: Path) -> None:
    with holder(tmp_path, "0/2", SLURM_JOB_ID="13", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="0") as other:
        assert ".lock-share-1-of-2" in take(tmp_path, Share(1, 2))
        with pytest.raises(DistlmError, match=rf"\(share 0/2: Slurm job 12_0, pid {other.pid} on "):
            take(tmp_path)
    assert take(tmp_path) == [".lock", ".lock.1"], "the locks of ended shares go with the next run"


def test_a_run_keeps_shares_out(tmp_path: Path) -> None:
    with holder(tmp_path) as other, pytest.raises(DistlmError, match=rf"another run is writing .*pid {other.pid} on "):
        take(tmp_path, Share(0, 2))


@pytest.mark.parametrize(("share", "words"), [(Share(0, 2), "0/2 is writing here already"), (Share(2, 3), "one count")])
def test_shares_that_would_meet_are_refused(tmp_path: Path, share: Share, words: str) -> None:
    with holder(tmp_path, "0/2") as other, pytest.raises(DistlmError, match=words) as refusal:
        take(tmp_path, share)
    assert f"pid {other.pid}" in str(refusal.value)
    take(tmp_path, share)


def test_a_share_that_has_written_no_lease_yet_counts(tmp_path: Path) -> None:
    """It holds the file system's lock first."""
    with (tmp_path / ".lock-share-0-of-2").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="one count"):
            take(tmp_path, Share(2, 3))


@pytest.mark.parametrize("text", ["2/2", "3/2", "0/0", "-1/2", "1", "a/b", "1/2/3", " 0/2", "0/2 "])
def test_bad_shares_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected K/N with 0 <= K < N"):
        share_of(load_config("demo", [f"launch.share='{text}'"]), ranks=1)


def test_a_share_is_one_process() -> None:
    config = load_config("demo", ["launch.share=1/4"])
    assert share_of(config, ranks=1) == Share(1, 4)
    assert share_of(load_config("demo", []), ranks=3) is None
    with pytest.raises(UsageError, match="this step has 3 ranks"):
        share_of(config, ranks=3)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_a_colleagues_lock_or_folder_names_its_owner(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(0o755)
    folder = tmp_path / "index"
    take(folder)
    folder.chmod(mode)
    (folder / ".lock").chmod(0o644)
    if mode == 0o755:
        (folder / ".lock").unlink()
    place = "index/.lock" if mode == 0o777 else "index"

    def refused() -> None:
        with pytest.raises(DistlmError, match="must write here, and you may not") as refusal:
            take(Path("index"))
        assert str(refusal.value).startswith(f"{place}: writing ") and "belongs to root; ask" in str(refusal.value)

    assert succeeds_as_nobody(tmp_path, refused)


def test_a_run_refused_for_another_leaves_the_records_of_that(tmp_path: Path) -> None:
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    record = tmp_path / "run" / "configs" / "index.yaml"
    for error, kept in (
        (Busy("another run is writing this index here"), True),
        (DistlmError("index.factory=X"), False),
    ):
        with pytest.raises(type(error)), open_stage("index", config):
            raise error
        assert record.exists() == kept
