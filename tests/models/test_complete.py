"""What the files of a checkpoint are called is known in one place each."""

from pathlib import Path

import pytest

import distlm
import launchers

FOLDERS = [Path(str(package.__file__)).parent for package in (distlm, launchers)]


@pytest.mark.parametrize(
    ("words", "place"),
    [("step-*/complete.json", "distlm/runtime/rundir.py"), ('"memory-"', "distlm/models/complete.py")],
    ids=["which checkpoints are complete", "files of memories' values"],
)
def test_one_place_knows(words: str, place: str) -> None:
    found = {
        f"{folder.name}/{path.relative_to(folder)}"
        for folder in FOLDERS for path in folder.rglob("*.py") if words in path.read_text("utf-8")
    }  # fmt: skip
    assert found == {place}
