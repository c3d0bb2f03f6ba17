"""Files of tensors that the system refuses to open."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TESTS

from distlm.errors import DistlmError
from distlm.models.tensor_file import open_tensors, read_tensors


def opened(path: Path) -> None:
    with open_tensors(path):
        pass


@pytest.mark.parametrize("read", [opened, read_tensors])
def test_the_system_s_reason_is_told(read: Callable[[Path], Any], tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DistlmError, match="/loop: a link that leads back to itself; remove it"):
        read(loop)
    with pytest.raises(DistlmError, match="/gone: no such file"):
        read(tmp_path / "gone")


def test_no_file_of_tensors_is_opened_without_it() -> None:
    """safetensors calls every file that it cannot open missing: who opens one asks for the reason."""
    unasked = []
    for path in (TESTS.parent / "distlm").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if called & {"safe_open", "safetensors.safe_open", "safetensors.torch.load_file", "load_file"}:
                    unasked += [] if called & {"told", "refuse"} else [f"{path}: {function.name}"]
    assert unasked == []
