"""How far long work is: plain lines into pipes and files, one bar on a terminal, for a started stage too."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, warm
from support.deadline import DEADLINE_S

from distlm.runtime.progress import _LINE, Output, Progress

STAGE = """
import sys
from distlm.runtime.progress import Progress
print("train: rank 0 of 1", flush=True)
with Progress("train", total=40, unit="updates", every_s=0) as progress:
    progress.advance(12, loss="3.21")
    print("a [bold]line[/bold] of its own", flush=True)
    progress.advance(28, loss="2.5")
print("train: done", flush=True)
"""
RUN = """
import sys
from pathlib import Path
from distlm.config.load import load_config
from distlm.pipeline import _run_command
from distlm.runtime.stop import StopFlag
sys.exit(_run_command([sys.executable, "stage.py"], Path("run.log"), load_config("demo"), StopFlag())[0])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stage.py").write_text(STAGE, "utf-8")
    (tmp_path / "run.py").write_text(RUN, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What Python writes to a terminal, both streams."""
    master, slave = pty.openpty()
    given = {**ENVIRONMENT, **warm.COLD, "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen([sys.executable, *arguments], env=given, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = bytearray()
    while True:
        try:
            shown += (part := os.read(master, 65536))
        except OSError:
            # The terminal is gone with the last process that had it.
            break
        if not part:
            break
    os.close(master)
    assert process.wait(DEADLINE_S) == 0, shown.decode()
    return shown.decode()


def test_a_plain_line_is_read_again(capsys: pytest.CaptureFixture) -> None:
    for fields in ({}, {"loss": "3.21", "lr": "1e-3"}):
        with Progress("knn search valid", total=40, unit="blocks", every_s=0) as progress:
            progress.advance(10, **fields)
        found = _LINE.fullmatch(capsys.readouterr().err.rstrip("\n"))
        assert found is not None
        assert (found["label"], found["done"], found["total"]) == ("knn search valid", "10", "40")
        assert found["note"] == " ".join(f"{key}={value}" for key, value in fields.items())


def test_without_a_terminal_lines_are_written_as_they_come(capsys: pytest.CaptureFixture) -> None:
    log = io.BytesIO()
    lines = ["[rank 0] train: 1/4 updates (25%) rate=1/s eta=3s\n", "[bold] of \x1b its own\n"]
    with Output(log) as shown:
        assert shown.environment == {}
        for line in lines * 3:
            shown.write(line)
    assert capsys.readouterr().out == log.getvalue().decode() == "".join(lines * 3)


def test_a_log_that_cannot_be_written_ends_nothing(capsys: pytest.CaptureFixture) -> None:
    # What is written to it finds no space left on the disk.
    with Path("/dev/full").open("ab", buffering=0) as log, Output(log) as shown:
        for _ in range(3):
            shown.write("line\n")
    said = capsys.readouterr()
    assert said.out == "line\n" * 3
    assert said.err == "/dev/full: no space left on the disk: the work goes on, its log has gaps\n"


def test_a_stage_tells_the_bar_more_often_than_its_log(folder: Path) -> None:
    (folder / "stage.py").write_text(
        "import os\nprint('every', os.environ['DISTLM_PROGRESS_S'])\n"
        "for done in (1, 2, 3, 4):\n    print(f'[rank 0] train: {done}/4 updates ({25 * done}%) rate=9/s eta=1s')\n",
        "utf-8",
    )
    assert "every 0.5\r\n" in on_a_terminal("run.py")
    log = (folder / "run.log").read_text("utf-8")
    assert re.findall(r"train: (\d)/4", log) == ["1", "4"]


def test_the_environment_says_how_often_lines_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for seconds, lines in (("0", 4), ("1000", 1)):
        monkeypatch.setenv("DISTLM_PROGRESS_S", seconds)
        with Progress("train", total=4, unit="updates") as progress:
            for _ in range(4):
                progress.advance()
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_stage_of_a_run_has_a_bar_on_a_terminal_and_lines_in_its_log(folder: Path) -> None:
    shown = on_a_terminal("run.py")
    assert re.search(r"train .*━.*12/40.*loss=3\.21", shown), shown
    # Lines of its own stand above the bar, as they are, and so does the line of what is finished.
    assert "a [bold]line[/bold] of its own\r\n" in shown and "train: done\r\n" in shown
    assert "[rank 0] train: 40/40 updates (100%) loss=2.5" in shown and "[rank 0] train: 12/40" not in shown
    log = (folder / "run.log").read_text("utf-8")
    assert "[rank 0] train: 12/40 updates (30%) loss=3.21 rate=" in log
    assert "[rank 0] train: 40/40 updates (100%)" in log and "━" not in log and "\x1b" not in log


def test_a_terminal_without_cursor_gets_lines(folder: Path) -> None:
    shown = on_a_terminal("run.py", TERM="dumb")
    assert "[rank 0] train: 12/40 updates (30%)" in shown and "━" not in shown


def test_a_run_into_a_file_writes_lines(folder: Path) -> None:
    done = subprocess.run([sys.executable, "run.py"], env={**ENVIRONMENT, **warm.COLD}, capture_output=True, text=True,
                          timeout=DEADLINE_S, check=True)  # fmt: skip
    assert "[rank 0] train: 12/40 updates (30%) loss=3.21 rate=" in done.stdout and "━" not in done.stdout
