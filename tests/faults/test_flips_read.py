"""A byte that rots in a file stops the next stage that reads the file, or changes no byte of what that makes."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import shared
from support.knn import copy_run, in_stage

from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_build, run_index_merge
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage


@dataclass(frozen=True)
class Reader:
    """A stage that reads some files of a finished run, when what it makes is gone."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    """Its results; compared by bytes."""
    stage: str
    run: Callable[[Stage], object]
    gone: tuple[str, ...] = ()
    """What else must go, so that it works at all."""


READERS = [
    Reader(("tokens/train.bin", "tokens/meta.json", "tokens/dict.txt", "checkpoints/**/*"), ("datastore",),
           "datastore", run_datastore_write),
    Reader(("datastore/*",), ("index",), "index", run_index_build),
    Reader(("index/*/template.*",), ("index/*/parts", "index/*/merged.index", "index/*/index.json"), "index",
           run_index_build),
    Reader(("index/*/parts/*",), ("index/*/merged.index", "index/*/index.json"), "index", run_index_merge),
    Reader(("index/*/template.*",), ("index/*/parts",), "index", run_index_add,
           ("index/*/merged.index", "index/*/index.json")),
    Reader(("datastore/*", "index/*/merged.index", "index/*/index.json", "tokens/valid.bin", "tokens/test.bin",
            "tokens/meta.json", "checkpoints/**/*"), ("neighbours",), "knn", run_search),
    Reader(("neighbours/**/*",), ("knn.json", "tuned"), "knn", run_tune),
    Reader(("neighbours/**/*", "knn.json", "tuned/*", "tokens/dict.txt"), ("results.json", "results", "losses"), "knn",
           run_evaluate),
]  # fmt: skip


def files(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()
                   and path.stat().st_size and not path.name.startswith(".")})  # fmt: skip


def remove(root: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in list(root.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def made(root: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    def content(path: Path) -> bytes:
        if "results" not in str(path.relative_to(root)):
            return path.read_bytes()
        # Times, the place of the run, and the checksum of the whole are another run's.
        tree = json.loads(path.read_text())
        return json.dumps({**tree, "seconds": 0, "check": "", "model": {**tree["model"], "checkpoint": ""}}).encode()

    below = {path for pattern in patterns for place in root.glob(pattern) for path in [place, *place.rglob("*")]}
    return {str(path.relative_to(root)): content(path) for path in below
            if path.is_file() and not path.name.startswith(".")}  # fmt: skip


def after(config: RunConfig, reader: Reader) -> dict[str, bytes] | str:
    """What the stage makes, or how it stops."""
    root = RunDir.of(config).root
    remove(root, reader.makes + reader.gone)
    try:
        in_stage(reader.stage, config, reader.run)
    except DistlmError as error:
        return str(error)
    return made(root, reader.makes)


def flips(factory: pytest.TempPathFactory, place: Path, reader: Reader, seed: int, count: int) -> list[str]:
    """Of `count` flips those that the stage neither stopped at nor was untouched by."""
    source = shared.searched(factory)
    whole = after(copy_run(source, place / "whole"), reader)
    assert isinstance(whole, dict) and whole
    draw, missed, stopped = random.Random(f"{seed} {reader.stage} {reader.reads}"), [], 0
    for number in range(count):
        config = copy_run(source, place / str(number))
        root = RunDir.of(config).root
        path = draw.choice(files(root, reader.reads))
        data = bytearray(path.read_bytes())
        at, bit = draw.randrange(len(data)), draw.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        found = after(config, reader)
        if isinstance(found, str):
            stopped += 1
            assert str(root) in found, found
        elif found != whole:
            changed = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
            missed.append(f"{path.relative_to(root)} byte {at} bit {bit}: {changed[:3]}")
        shutil.rmtree(place / str(number))
    shutil.rmtree(place / "whole")
    print(f"{reader.run.__name__} {reader.reads}: {count} flips, {stopped} stopped it")
    return missed


@pytest.mark.parametrize("reader", READERS, ids=[f"{number}-{r.run.__name__}" for number, r in enumerate(READERS)])
def test_a_flip_stops_the_next_stage_or_changes_nothing(
    reader: Reader, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    assert flips(tmp_path_factory, tmp_path, reader, 0, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("reader", READERS, ids=[f"{number}-{r.run.__name__}" for number, r in enumerate(READERS)])
def test_many_flips_stop_the_next_stage_or_change_nothing(
    reader: Reader, seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    assert flips(tmp_path_factory, tmp_path, reader, seed, 13) == []
