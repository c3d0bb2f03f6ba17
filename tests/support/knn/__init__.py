"""Stages of a kNN run in this process, copies of run directories, and neighbours made up."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.runtime.lock import only_writer
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stage import Stage, open_stage
from support.store import tiny_config

T = TypeVar("T")


def in_stage(name: str, config: RunConfig, function: Callable[[Stage], T]) -> T:
    """Run a stage function on one rank in this process."""
    with open_stage(name, config) as stage:
        return function(stage)


def copy_run(source: RunConfig, to: Path, *extra: str) -> RunConfig:
    """A copy of a run directory, with other settings on top."""
    shutil.copytree(source.run_dir, to)
    return tiny_config(to, Path(source.data.text_dir), extra)


def random_case(
    seed: int = 0, queries: int = 40, k: int = 12, words: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances [Q, k], values [Q, k] (some absent) and targets [Q] of some neighbours."""
    random = np.random.default_rng(seed)
    distances = np.sort(random.gamma(4.0, 6.0, (queries, k)).astype(np.float32), axis=1)
    values = random.integers(0, words, (queries, k)).astype(np.int32)
    for row in range(0, queries, 3):
        values[row, k - row % k :] = -1
    targets = random.integers(0, words, queries).astype(np.int32)
    return distances, values, targets


def one_writer_at_a_time(folder: Path, run: Callable[[], Mapping[str, object]]) -> None:
    """`run` is refused while another run fills the folder, and leaves that alone; then it fills it."""
    theirs = folder / ".unit-00000.9.tmp"
    theirs.mkdir(parents=True)
    with only_writer(folder, SingleComm(), "filling it"):
        said = rf"{folder.parent.name}/{folder.name}: another run is filling it here \(.*pid \d+ on "
        with pytest.raises(DistlmError, match=said):
            run()
        assert theirs.exists()
    run()
    assert not theirs.exists()
    with only_writer(folder, SingleComm(), "reading"):
        # A finished folder does not need the lock: it may be read-only.
        assert run()["tokens"] == 0
