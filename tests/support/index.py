"""Helpers of the index tests: a small datastore of clustered vectors, stages in this process, faiss's own build."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from distlm.config import RunConfig
from distlm.datastore.manifest import MANIFEST, keys_path, values_path
from distlm.datastore.reader import Datastore
from distlm.datastore.records import Manifest, Shard
from distlm.index.faiss_module import faiss_threads
from distlm.runtime.files import file_hash
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import single
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag
from support.config import config_of
from support.manifest import settings as settings_of_store

WIDTH = 32
DRIVER = Path(__file__).with_name("drivers") / "index.py"


def vectors(rows: int, width: int = WIDTH, seed: int = 0, clusters: int = 50) -> np.ndarray:
    """Clustered keys fp16 [rows, width]."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, width)) * 2
    keys = centres[random.integers(clusters, size=rows)] + random.standard_normal((rows, width)) * 0.5
    return keys.astype(np.float16)


def write_store(folder: Path, keys: np.ndarray, rows_per_shard: int = 1500, model: str = "m" * 32) -> Datastore:
    """A finished datastore of these keys; the value of row i is i mod 97."""
    folder.mkdir(parents=True, exist_ok=True)
    of_store = settings_of_store(keys.shape[1], keys.dtype.name, rows_per_shard, model)
    shards = []
    for index, first in enumerate(range(0, len(keys), rows_per_shard)):
        part = keys[first : first + rows_per_shard]
        np.save(keys_path(folder, index), part)
        np.save(values_path(folder, index), (np.arange(first, first + len(part)) % 97).astype(np.int32))
        hashes = (file_hash(keys_path(folder, index)), file_hash(values_path(folder, index)))
        shards.append(Shard(index, first, len(part), first + 8, first + 8 + len(part), *hashes))
    Manifest.of_store(of_store, len(keys), shards, complete=True).write(folder / MANIFEST)
    return Datastore.open(folder)


def config(run_dir: Path, *more: str, **index: object) -> RunConfig:
    """Settings of an index run: index.NAME=value, and `more`. The index lies in RUN_DIR/index."""
    overrides = [
        f"run_dir={run_dir}",
        f"index.folder={run_dir}/index",
        "launch.threads=1",
        *(f"index.{name}={value}" for name, value in index.items()),
        *more,
    ]
    return config_of("demo", overrides)


@contextmanager
def one_rank(settings: RunConfig) -> Iterator[Stage]:
    """A stage of one rank in this process."""
    run = RunDir.of(settings)
    run.open_stage(settings, "index")
    yield Stage("index", settings, single({}), SingleComm(), StopFlag(), run)


def driver(action: str, run_dir: Path, **index: object) -> list[str]:
    """Arguments for python: run one index stage with small merge units."""
    return [str(DRIVER), action, str(run_dir), *(f"index.{name}={value}" for name, value in index.items())]


def one_process_build(template: Path, keys: np.ndarray, out: Path) -> None:
    """What stock faiss writes when one process adds all keys to the template, in order.

    On one thread: the last bits behind a PCA depend on how many there are, and one of many codes with them.
    """
    import faiss

    index = faiss.read_index(str(template))
    with faiss_threads(1):
        index.add_with_ids(keys.astype(np.float32), np.arange(len(keys)))
    faiss.write_index(index, str(out))


def without_polysemous(index: Any) -> Any:
    """An index whose product quantiser is trained without annealing the order of its codes, which takes ten seconds."""
    found = faiss.try_extract_index_ivf(index)
    inner = found and faiss.downcast_index(found)
    if isinstance(inner, faiss.IndexIVFPQ):
        inner.do_polysemous_training = False  # type: ignore[attr-defined]
    return index
