"""Of all that ranks say when they fail, the cause is quoted, wherever it stands and whoever ends first."""

import os
import subprocess
from pathlib import Path

import pytest

from distlm.runtime.alive import Watch
from distlm.runtime.ranks.said import cause_in, heard
from distlm.runtime.ranks.world import World

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
