"""The comparison of two versions' bytes: its runs can be configured, and what differs is found."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distlm.config import load_config

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


small_runs, same_bytes = load("small_runs"), load("same_bytes")


@pytest.mark.parametrize("name", small_runs.RUNS)
def test_its_runs_have_settings_that_their_kind_reads(name: str) -> None:
    recipe, verbs, settings = small_runs.RUNS[name]
    config = load_config(recipe, [word.format(ranks=2) for word in settings])
    assert verbs and (config.model.kind == "plm") == (name in ("plm", "finetune"))


def write(folder: Path, tensor: bytes = b"abc", loss: float = 1.0, time: float = 1.0) -> Path:
    run = folder / "knn-1"
    run.mkdir(parents=True)
    (run / "keys.npy").write_bytes(tensor)
    (run / "results.json").write_text(json.dumps({"loss": loss, "seconds": time, "format": int(time)}), "utf-8")
    (run / "config.yaml").write_text(f"time: {time}", "utf-8")
    return folder


def test_what_differs_is_found_and_what_may_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before")
    assert same_bytes.compare(before, write(tmp_path / "later", time=2.0))
    assert "1 files differ on purpose" in capsys.readouterr().out
    assert not same_bytes.compare(before, write(tmp_path / "flipped", tensor=b"abd"))
    assert "differs: knn-1/keys.npy" in capsys.readouterr().out
    assert not same_bytes.compare(before, write(tmp_path / "loss", loss=1.5))
    assert "/loss: 1.0 before, 1.5 after" in capsys.readouterr().out
    (before / "knn-1" / "gone").touch()
    assert not same_bytes.compare(before, tmp_path / "later")
    assert "missing: knn-1/gone" in capsys.readouterr().out
