"""Of all that ranks say when they fail, the cause is quoted, wherever it stands and whoever ends first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlm.config import load_config
from distlm.pipeline import _run_command
from distlm.runtime.alive import Watch
from distlm.runtime.ranks.said import cause_in, heard
from distlm.runtime.ranks.world import World
from distlm.runtime.stop import StopFlag
from launchers.stages.dispatch import _why

ROOT = Path(__file__).resolve().parents[3]
CAUSE = "[rank 1 on n2] distlm: data.text_dir=/x: no such folder"


@pytest.fixture
def follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The line of a rank that ends because rank 1 did, as it is printed."""
    monkeypatch.setattr(os, "_exit", lambda _code: None)
    watch = Watch(tmp_path, World(0, 2, 0, 2, "n1", "slurm"), 60)
    watch._end("rank 1 on n2 is lost: it ended with KeyError: 'a bug'")
    return capfd.readouterr().err


def test_a_cause_comes_before_what_followed(follows: str) -> None:
    for lines in ([follows, CAUSE], [CAUSE, follows], ["step 1\n", f"node2: {CAUSE}\n", follows]):
        said = heard(lines)
        assert said.is_cause and said.error == "[rank 1 on n2] data.text_dir=/x: no such folder"
    said = heard(["Traceback", follows, follows])
    assert not said.is_cause and said.error.startswith("[rank 0 on n1] rank 1 on n2 is lost: it ended with KeyError")
    assert heard(["distlm: knn.k=0\n"]).error == "knn.k=0"
    assert heard(["nothing", "python -m distlm: x"]).error == ""


def test_the_log_with_the_cause_is_named(tmp_path: Path, follows: str) -> None:
    logs = [tmp_path / f"job_{rank}.log" for rank in range(4)]
    logs[0].write_text("")
    logs[1].write_text(follows)
    assert cause_in(logs)[0] == logs[1]
    logs[2].write_text(f"{CAUSE}\n")
    assert cause_in(logs) == (logs[2], "[rank 1 on n2] data.text_dir=/x: no such folder")
    assert cause_in([tmp_path / "none"]) == (None, "")


def test_distlm_run_and_submit_quote_it(tmp_path: Path, follows: str) -> None:
    """The cause comes last, from the rank whose log nobody looks at."""
    script = tmp_path / "stage.py"
    script.write_text(f"import sys\nfor line in {['step 1', follows, CAUSE]!r}: print(line)\nsys.exit(1)\n")
    command = [sys.executable, str(script)]
    ended = _run_command(command, tmp_path / "log", load_config("demo"), StopFlag())
    assert ended == (1, "[rank 1 on n2] data.text_dir=/x: no such folder")
    logs = [tmp_path / f"job_{rank}_log.out" for rank in range(2)]
    logs[0].write_text(follows)
    logs[1].write_text(CAUSE)
    assert _why(logs) == f"{logs[1]}: [rank 1 on n2] data.text_dir=/x: no such folder"
    logs[1].unlink()
    logs[0].write_text("one\ntwo\n")
    assert _why(logs) == f"{logs[0]} ends with:\n  one\n  two"


def test_the_scripts_quote_the_cause_too(tmp_path: Path, follows: str) -> None:
    """last_errors of slurm/common.sh, on logs of many ranks with lines of earlier starts."""
    text = (ROOT / "slurm/common.sh").read_text("utf-8")
    function = text[text.index("last_errors() {") :]
    for rank in range(12):
        (tmp_path / f"job-7_{rank}.log").write_text(f"{follows}step\n" + (f"{CAUSE}\n" if rank == 5 else follows))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"LOG=job-7\n{function}\nlast_errors"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == CAUSE and len(done.stdout.splitlines()) == 3, done.stderr
    (tmp_path / "empty").mkdir()
    none = subprocess.run(
        ["bash", "-c", f"LOG=job\n{function}\nlast_errors"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (none.stdout, none.stderr) == ("", "")
