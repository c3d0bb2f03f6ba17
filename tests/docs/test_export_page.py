"""docs/export.md: its command exports a run, and its script runs in a process that has no distlm."""

import re
import shlex
from pathlib import Path

import pytest
from support import distlm
from support.export.isolated import without_distlm
from support.store import ready_run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text("utf-8")


def test_the_pages_command_and_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command, *_), script = (
        re.findall(r"```sh\n(.*?)\n```", PAGE, re.DOTALL),
        re.search(r"```python\n(.*?)```", PAGE, re.DOTALL),
    )
    assert script is not None and len(script[1].splitlines()) <= 20
    ready_run(tmp_path / "runs")
    (tmp_path / "runs" / "run").rename(tmp_path / "runs" / "mine")
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    distlm(*words[1:])
    table = re.findall(r"^\| `([\w.*]+)`", PAGE.partition("A folder that has files")[0], re.MULTILINE)
    assert {*table} <= {path.name for path in (tmp_path / "mine-hf").iterdir()}
    printed = without_distlm(script[1], home=tmp_path)
    assert len(re.findall(r"w\d+ w\d+", printed)) and printed.startswith("['w1 w2 w3 ")
