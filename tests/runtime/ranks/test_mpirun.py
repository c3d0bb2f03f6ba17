"""What a killed mpirun leaves behind must not stop a later one: a real mpirun, killed, and its process number again."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support import BIN, ENVIRONMENT
from support.deadline import DEADLINE_S, until

from distlm.runtime.ranks.mpirun import mpirun_session

pytestmark = pytest.mark.multiprocess

# The shell makes the killed mpirun's folder its own process number's, then becomes mpirun.
AFTER_THE_KILLED = """
cp -r "$TMPDIR/ompi.$1" "$TMPDIR/ompi.$$"
for file in "$TMPDIR/ompi.$$/"*.tool.$1; do mv "$file" "${file%.*}.$$"; done
exec "$2" -n 1 env
"""
MPIRUN = str(BIN / "mpirun")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A TMPDIR, and the process number of the mpirun that was killed in it."""
    folder = tmp_path_factory.mktemp("tmp")
    process = subprocess.Popen([MPIRUN, "-n", "1", "sleep", "60"], env=ENVIRONMENT | {"TMPDIR": str(folder)})
    until(
        lambda: list(folder.glob(f"ompi.{process.pid}/*.tool.{process.pid}")), "mpirun", lambda: process.poll() is None
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    return folder, process.pid


def same_number_again(killed: tuple[Path, int], **environment: str) -> subprocess.CompletedProcess[str]:
    folder, number = killed
    return subprocess.run(
        ["sh", "-c", AFTER_THE_KILLED, "sh", str(number), MPIRUN],
        env=ENVIRONMENT | {"TMPDIR": str(folder)} | environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip


def test_without_a_folder_of_its_own_mpirun_does_not_start(killed: tuple[Path, int]) -> None:
    done = same_number_again(killed)
    assert done.returncode == 213 and "listener thread failed to start" in done.stderr


def test_a_session_starts_and_leaves_nothing(
    killed: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with mpirun_session() as first, mpirun_session() as second:
        assert first != second
        done = same_number_again(killed, **first)
        assert done.returncode == 0, done.stderr
        assert f"PMIX_SERVER_TMPDIR={first['PRTE_MCA_prte_tmpdir_base']}/ompi." in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_lies_in_a_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "not" / "yet"
    monkeypatch.setitem(os.environ, "PRTE_MCA_prte_tmpdir_base", str(scratch))
    with mpirun_session() as session:
        assert [Path(folder).parent for folder in session.values()] == [scratch]
    assert not list(scratch.iterdir())


def test_a_users_own_folder_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PRTE_MCA_prte_local_tmpdir_base", "/scratch")
    with mpirun_session() as session:
        assert session == {}
