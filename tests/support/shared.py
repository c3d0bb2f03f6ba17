"""Finished tiny runs, made once for all processes of a test session. Tests only read them, or take a copy."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from support import TINY, distlm, write_text
from support.knn import in_stage
from support.store import ready_run, tiny_config


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder NAME that `make(folder)` fills, in whichever process of the session comes first."""
    base = factory.getbasetemp()
    # Below xdist each process has a folder of its own in the session's.
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


def stored(factory: pytest.TempPathFactory) -> RunConfig:
    """Tokens, a checkpoint of random weights and its datastore; no index."""

    def make(folder: Path) -> None:
        in_stage("datastore", ready_run(folder), run_datastore_write)

    folder = made_once(factory, "stored", make)
    return tiny_config(folder / "run", folder / "text")


def indexed(factory: pytest.TempPathFactory) -> RunConfig:
    """The same with its index."""
    before = stored(factory)

    def make(folder: Path) -> None:
        shutil.copytree(before.run_dir, folder / "run")
        in_stage("index", tiny_config(folder / "run", Path(before.data.text_dir)), run_index_build)

    folder = made_once(factory, "indexed", make)
    return tiny_config(folder / "run", Path(before.data.text_dir))


def searched(factory: pytest.TempPathFactory) -> RunConfig:
    """The same with neighbours, frozen settings and results."""
    before = indexed(factory)

    def make(folder: Path) -> None:
        shutil.copytree(before.run_dir, folder / "run")
        for function in (run_search, run_tune, run_evaluate):
            in_stage("knn", tiny_config(folder / "run", Path(before.data.text_dir)), function)

    folder = made_once(factory, "searched", make)
    return tiny_config(folder / "run", Path(before.data.text_dir))


def whole(factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Text, run directory and standard output of `distlm run` on two ranks, with the settings of `whole_settings`."""

    def make(folder: Path) -> None:
        text = write_text(folder / "text", train_lines=600)
        done = distlm("run", "demo", *whole_settings(folder / "run", text))
        (folder / "output").write_text(done.stdout, "utf-8")

    folder = made_once(factory, "whole", make)
    return folder / "text", folder / "run", (folder / "output").read_text("utf-8")


def whole_settings(run: Path, text: Path) -> list[str]:
    """Settings of `whole` over the recipe demo."""
    return [*TINY, "data.source=folder", f"data.text_dir={text}", f"run_dir={run}", "launch.ranks=2"]
