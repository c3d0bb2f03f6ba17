"""One, two and three ranks write the same neighbours and reach the same figures."""

import json
import shutil

import pytest
from support import mpirun
from support.knn import in_stage
from support.store import arguments, file_hashes, ready_run, tiny_config

from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.tune.stage import run_tune

pytestmark = pytest.mark.multiprocess


def test_any_number_of_ranks_finds_the_same_neighbours_and_perplexities(tmp_path):
    config = ready_run(tmp_path)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)

    def search(ranks: int) -> tuple[dict[str, str], dict[str, object]]:
        run_dir = tmp_path / f"ranks{ranks}"
        shutil.copytree(config.run_dir, run_dir)
        words = arguments(run_dir, tmp_path / "text")
        done = mpirun(ranks, ["-m", "distlm", "knn", "search", *words])
        assert done.stdout.count("knn search:") == 1, done.stdout
        # Rank 0 tunes and evaluates alone; once on two ranks is enough to see that the other one leaves with it.
        if ranks == 2:
            mpirun(ranks, ["-m", "distlm", "knn", "tune", *words])
        else:
            in_stage("knn", tiny_config(run_dir, tmp_path / "text"), run_tune)
        in_stage("knn", tiny_config(run_dir, tmp_path / "text"), run_evaluate)
        results = json.loads((run_dir / "results.json").read_text())
        # Times, the path of the checkpoint, and the state of the source tree.
        for changing in ("seconds", "model", "code", "check"):
            results.pop(changing)
        return file_hashes(run_dir / "neighbours"), results

    one, figures = search(1)
    assert len([name for name in one if name.endswith("ids.npy")]) > 3
    assert not [name for name in one if "found" in name or "rescore" in name]
    for ranks in (2, 3):
        assert search(ranks) == (one, figures)


def test_ranks_that_share_the_lists_find_the_same(tmp_path):
    """knn.scan=lists: each rank looks at lists of its own for the queries of all."""
    config = ready_run(tmp_path)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    found = {}
    for ranks in (1, 2, 3):
        run_dir = shutil.copytree(config.run_dir, tmp_path / f"ranks{ranks}")
        mpirun(ranks, ["-m", "distlm", "knn", "search", *arguments(run_dir, tmp_path / "text"), "knn.scan=lists"])
        found[ranks] = file_hashes(run_dir / "neighbours")
    assert len([name for name in found[1] if name.endswith("ids.npy")]) > 3
    assert found[1] == found[2] == found[3]


def test_a_refusal_on_two_ranks_is_told_once(tmp_path):
    config = ready_run(tmp_path)
    in_stage("datastore", config, run_datastore_write)
    done = mpirun(2, ["-m", "distlm", "knn", "search", *arguments(tmp_path / "run", tmp_path / "text")], check=False)
    assert done.returncode != 0
    assert done.stderr.count("distlm index build") == 1, done.stderr
    assert "Traceback" not in done.stderr
