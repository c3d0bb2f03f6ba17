"""A test whose mpirun hangs in its own end is run again; one that fails of itself is not."""

import subprocess
import sys
from pathlib import Path

from support import ENVIRONMENT
from support.deadline import DEADLINE_S

HANGING = """
import os, pathlib, shutil, subprocess, sys
from distlm.runtime import child
child.IDLE_S = 1.0
PLACE = pathlib.Path(__file__).parent

def test_once_hung():
    code = (
        "import os, pathlib, shutil, time; place = pathlib.Path(f'ompi.{os.getpid()}'); place.mkdir();"
        "opened = (place / 'hwloc.sm').open('w'); shutil.rmtree(place); time.sleep(900)"
    )
    if not (PLACE / "ran").exists():
        (PLACE / "ran").touch()
        assert subprocess.run([sys.executable, "-c", code], cwd=PLACE).returncode == 0

def test_that_fails():
    with (PLACE / "fails").open("a") as stream:
        stream.write("x")
    assert False
"""


def test_only_a_hang_is_tried_again(tmp_path: Path) -> None:
    """The mpirun is a stand-in that has removed its session folder and waits: a real one does so too seldom."""
    (tmp_path / "test_it.py").write_text(HANGING, "utf-8")
    conftest = (Path(__file__).parent / "conftest.py").read_text("utf-8")
    (tmp_path / "conftest.py").write_text(
        conftest.replace("Path(__file__).parent", f"Path({str(Path(__file__).parent)!r})"), "utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "."],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, cwd=tmp_path,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "test_once_hung: mpirun" in done.stdout and "is run again" in done.stdout
    assert (tmp_path / "fails").read_text() == "x"
