"""docs/python.md: every script runs as it stands on the page and prints what stands under it."""

import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from support import BIN, ENVIRONMENT
from support.deadline import DEADLINE_S
from support.shared import made_once

import distlm
from distlm.cli import main
from distlm.config.load import load_config
from distlm.pipeline import steps_of

PAGE = (Path(__file__).resolve().parents[2] / "docs/python.md").read_text("utf-8")
SCRIPTS: dict[str, tuple[str, str, str]] = {}
"""Heading → script, the command that starts it where it is not `python`, and what it prints."""
for _section in PAGE.split("\n## ")[1:]:
    _blocks = dict(re.findall(r"```(python|sh|text)\n(.*?)```", _section, re.DOTALL))
    if "text" in _blocks:
        SCRIPTS[_section.partition("\n")[0]] = (_blocks["python"], _blocks.get("sh", ""), _blocks["text"])
RUN = "A small run"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page's text and run are."""

    def make(folder: Path) -> None:
        section = PAGE.partition(f"## {RUN}")[2]
        code, command = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "sh"))
        assert code and command
        started(folder, code[1], "")
        words = shlex.split(command[1].replace("\\\n", " "))
        assert words[:2] == ["distlm", "run"]
        # Its stages in this process: to start them takes longer than they do.
        for step in steps_of(load_config(words[2], words[3:])):
            with chdir(folder), pytest.raises(SystemExit) as end:
                main([*step.words.split(), *words[2:], "launch.threads=1"])
            assert end.value.code in (0, None), step.words

    return made_once(tmp_path_factory, "python-page", make)


def started(folder: Path, code: str, command: str) -> str:
    """What a script prints."""
    *_, name = command.split() or ["script.py"]
    (folder / name).write_text(code, "utf-8")
    words = [str(BIN / command.split()[0]), *command.split()[1:]] if command else [sys.executable, name]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_five_scripts_of_at_most_twenty_lines() -> None:
    assert len(SCRIPTS) == 5
    assert {name: len(code.splitlines()) for name, (code, _, _) in SCRIPTS.items() if len(code.splitlines()) > 20} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_the_page_says(name: str, folder: Path) -> None:
    code, command, shown = SCRIPTS[name]
    printed = started(folder, code, command)
    assert NUMBER.sub("N", printed) == NUMBER.sub("N", shown), printed
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        # Another processor rounds otherwise: two units in the last place of what has any.
        places = len(expected.partition(".")[2])
        assert float(found) == pytest.approx(float(expected), abs=2.01 * 10**-places if places else 0), printed


def test_every_public_name_is_on_the_page() -> None:
    for name in set(distlm.__all__) - {"__version__"}:
        assert f"`{name}" in PAGE, name


def test_the_readme_shows_the_page() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    assert "(docs/python.md)" in readme
