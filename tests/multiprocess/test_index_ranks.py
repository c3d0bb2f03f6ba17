"""1 to 4 ranks of one thread or two under a real mpirun make the same template, parts and merged file."""

import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import ENVIRONMENT, mpirun, mpirun_command
from support.deadline import DEADLINE_S, until
from support.index import driver, one_process_build, vectors, write_store

from distlm.datastore.reader import Datastore
from distlm.index import open_index
from distlm.runtime.lock import is_lock

pytestmark = pytest.mark.multiprocess
FACTORIES = [
    pytest.param("PCA16,IVF64,PQ8", "", marks=pytest.mark.slow),
    pytest.param("IVF64,PQ16x4", "", marks=pytest.mark.slow),
    pytest.param("IVF64,SQ4", "1", marks=pytest.mark.slow),
    ("PCAR24,IVF64_HNSW8,RaBitQ", ""),
    pytest.param("auto", "", marks=pytest.mark.slow),
]
"""And whether integers find the nearest centroids."""


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not is_lock(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("factory", "integers"), FACTORIES)
def test_any_number_of_ranks_makes_the_same_index(tmp_path: Path, factory: str, integers: str) -> None:
    keys = vectors(8000)
    settings = {"factory": factory, "sample": 4000}
    built = {}
    for ranks in (1, 2, 3):
        run_dir = tmp_path / str(ranks)
        write_store(run_dir / "datastore", keys, rows_per_shard=1700)
        if ranks == 2:
            for action in ("train", "add", "merge"):
                mpirun(ranks, driver(action, run_dir, **settings), TEST_INTEGERS=integers)
        else:
            mpirun(ranks, driver("build", run_dir, **settings), TEST_INTEGERS=integers)
        built[ranks] = _files(run_dir / "index")
    assert sorted(built[1]) == sorted(
        ["template.index", "template.json", "merged.index", "index.json"]
        + (["choice.json"] if factory == "auto" else [])
        + [f"parts/part-{shard:05d}.{suffix}" for shard in range(5) for suffix in ("index", "json")]
    )
    assert built[1] == built[2] == built[3]
    # Threads share the blocks of a rank.
    write_store(tmp_path / "4" / "datastore", keys, rows_per_shard=1700)
    mpirun(4, [*driver("train", tmp_path / "4", **settings), "launch.threads=2"], TEST_INTEGERS=integers)
    assert (tmp_path / "4/index/template.index").read_bytes() == built[1]["template.index"]

    import faiss

    one_process_build(tmp_path / "1/index/template.index", keys, tmp_path / "one.index")
    # RaBitQ keeps fp32 numbers, whose last bits behind a PCA follow how many keys faiss multiplies at once.
    if "RaBitQ" not in factory:
        assert (tmp_path / "one.index").read_bytes() == built[3]["merged.index"]
    queries = vectors(1000, seed=7).astype(np.float32)
    stock = faiss.read_index(str(tmp_path / "one.index"))
    faiss.extract_index_ivf(stock).nprobe = 8
    expected, expected_ids = stock.search(queries, 64)
    results = []
    for ranks in (1, 3):
        index = open_index(tmp_path / f"{ranks}/index", Datastore.open(tmp_path / f"{ranks}/datastore"))
        results.append(index.search(queries, 64, 8))
    (ids, distances), (again, distances_again) = results
    assert (ids == again).all() and (distances == distances_again).all()
    _ranks_that_search_their_own_parts_find(ids, distances, tmp_path / "3", queries)
    if index.fast_scan:
        # Its tables are rounded to 8 bits.
        same = [len(np.intersect1d(a, b)) / 64 for a, b in zip(ids, expected_ids, strict=True)]
        assert np.mean(same) > 0.9
        return
    # faiss's own batches round differently in the last bit: only neighbours equally far may change places.
    np.testing.assert_allclose(distances, np.where(expected_ids < 0, np.inf, expected), rtol=1e-5, atol=1e-4)
    assert (ids == expected_ids).mean() > 0.99


def _ranks_that_search_their_own_parts_find(
    ids: np.ndarray, distances: np.ndarray, run_dir: Path, queries: np.ndarray
) -> None:
    np.save(run_dir / "queries.npy", queries)
    command = ["-m", "distlm", "index", "search", "demo", f"run_dir={run_dir}", "launch.threads=1"]
    command += [f"index.folder={run_dir}/index"]
    command += ["knn.k=64", "knn.ks=[64]", "knn.nprobe=8", "knn.distances=quantised"]
    command += ["--queries", str(run_dir / "queries.npy")]
    mpirun(2, [*command, "--out", str(run_dir / "found.npz")])
    with np.load(run_dir / "found.npz") as found:
        assert np.array_equal(found["distances"], distances)
        # Of those as far as the last any may have been kept.
        nearer = distances < distances[:, -1:]
        mine, expected = (np.sort(np.where(nearer, numbers, -2)) for numbers in (found["ids"], ids))
        assert np.array_equal(mine, expected)
        assert np.array_equal(found["values"], np.where(found["ids"] < 0, -1, found["ids"] % 97))


def test_an_error_on_one_rank_ends_all_with_its_words(tmp_path: Path) -> None:
    keys = vectors(3000)
    write_store(tmp_path / "datastore", keys, rows_per_shard=1000)
    settings = {"factory": "IVF16,SQ8"}
    mpirun(2, driver("train", tmp_path, **settings))
    mpirun(2, driver("add", tmp_path, **settings))
    part = tmp_path / "index/parts/part-00001.index"
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    failed = mpirun(2, driver("merge", tmp_path, **settings), check=False)
    assert failed.returncode == 1
    assert "part-00001.index: damaged" in failed.stderr
    part.with_suffix(".json").unlink()
    mended = mpirun(2, driver("build", tmp_path, **settings))
    assert "2 of 3 parts are complete, continuing" in mended.stderr
    one_process_build(tmp_path / "index/template.index", keys, tmp_path / "one.index")
    assert (tmp_path / "one.index").read_bytes() == (tmp_path / "index/merged.index").read_bytes()


def test_a_stop_signal_to_one_rank_stops_all_at_a_boundary(tmp_path: Path) -> None:
    # More parts than the next round, which may have four times the units of this one, can make.
    keys = vectors(40_000)
    write_store(tmp_path / "datastore", keys, rows_per_shard=100)
    settings = {"factory": "IVF16,SQ8"}
    mpirun(2, driver("train", tmp_path, **settings))
    command = mpirun_command(2, driver("add", tmp_path, **settings))
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "index" / "parts"
    until(lambda: len(list(parts.glob("part-*.json"))) >= 20, "20 parts", lambda: process.poll() is None)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", f"-{signal.SIGUSR1.value}", ranks[-1]], check=True)
    _, text = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "stopped at a boundary of index add; run the same command again" in text
    done = len(list(parts.glob("part-*.json")))
    assert 20 <= done < 400
    assert not list(parts.glob(".*.tmp"))
    resumed = mpirun(2, driver("add", tmp_path, **settings))
    assert re.search(rf"{done} of 400 parts are complete, continuing", resumed.stderr)
