"""One, two and three ranks, and one or two threads, write the same bytes."""

import re
from pathlib import Path

import pytest
from support import mpirun
from support.store import arguments, file_hashes, ready_run

pytestmark = pytest.mark.multiprocess

# Wider than the other tests' model: its matrix products are large enough for threads to share.
WIDER = ["model.width=128", "model.ffn_width=512"]


def test_any_number_of_ranks_and_threads_writes_the_same_directory(tmp_path):
    config = ready_run(tmp_path, lines=700, extra=WIDER)
    shared = [
        *WIDER,
        f"data.tokens_dir={config.run_dir}/tokens",
        f"datastore.checkpoint={config.run_dir}/checkpoints/step-00000012",
    ]

    def write(ranks: int, threads: int = 1, more: str = "launch.ranks=1") -> dict[str, str]:
        run_dir: Path = tmp_path / f"ranks{ranks}-threads{threads}-{more}"
        words = arguments(run_dir, tmp_path / "text", [*shared, f"launch.threads={threads}", more])
        done = mpirun(ranks, ["-m", "distlm", "datastore", "write", *words])
        assert "rows=" in done.stdout
        return file_hashes(run_dir / "datastore")

    one = write(1)
    assert len([name for name in one if name.startswith("keys-")]) > 6
    assert write(2) == one
    assert write(3) == one
    assert write(1, threads=2) == one
    # One shard, into which all ranks write.
    whole = write(1, more="datastore.rows_per_shard=100000")
    assert [name for name in whole if name.startswith("keys-")] == ["keys-00000.npy"]
    assert write(3, threads=2, more="datastore.rows_per_shard=100000") == whole


def test_ranks_without_work_are_told_of_at_the_start(tmp_path):
    config = ready_run(tmp_path, lines=30)
    words = arguments(Path(config.run_dir), tmp_path / "text", ["datastore.block=32", "datastore.batch_blocks=8"])
    done = mpirun(3, ["-m", "distlm", "datastore", "write", *words])
    assert re.search(
        r"write: (\d) units? of work: \d of 3 ranks will have nothing to do; a smaller \S+batch", done.stderr
    )


def test_a_fault_of_one_rank_ends_all_with_one_message(tmp_path):
    config = ready_run(tmp_path, lines=100, key_scale=1e5)
    done = mpirun(2, ["-m", "distlm", "datastore", "write", *arguments(Path(config.run_dir), tmp_path / "text")], False)
    assert done.returncode == 1
    # The first rank's fault is the one that is told.
    assert done.stderr.count("distlm: ") == 1
    assert "keys-00000.npy: shard 0 row 0 (token 32 of the split)" in done.stderr
    assert "Traceback" not in done.stderr
