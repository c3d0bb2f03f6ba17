"""launch.stage_in: with copies on the nodes' disks every file is the same, whatever the ranks and nodes; nothing stays.

One machine has one disk: where nodes are feigned, each rank is given a folder of its own, by its local rank.
"""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support import ENVIRONMENT, distlm, mpirun_command
from support.deadline import DEADLINE_S, until
from support.knn import in_stage
from support.store import arguments, file_hashes, ready_run

from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build, run_index_train
from distlm.knnlm.search.stage import run_search

pytestmark = pytest.mark.multiprocess

SHARDS = ["datastore.rows_per_shard=512", "knn.blocks_per_unit=2"]
OWN_DISK = "rank$OMPI_COMM_WORLD_LOCAL_RANK"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run whose index and neighbours are made without copies, and one that is to be made with them: it has
    datastore and template."""
    folder = tmp_path_factory.mktemp("plain")
    config = ready_run(folder, lines=600, extra=SHARDS)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_train)
    begun = folder / "begun"
    shutil.copytree(config.run_dir, begun)
    in_stage("index", config, run_index_build)
    in_stage("knn", config, run_search)
    return config, begun


@pytest.mark.parametrize(
    ("ranks", "place", "nodes", "merge"),
    [
        pytest.param(2, OWN_DISK, 2, True, id="two ranks on two feigned nodes"),
        pytest.param(2, OWN_DISK, 2, False, id="two ranks on two feigned nodes, parts", marks=pytest.mark.slow),
        pytest.param(2, "", 1, True, id="two ranks of a node", marks=pytest.mark.slow),
        pytest.param(1, "", 1, True, id="one rank", marks=pytest.mark.slow),
    ],
)
def test_copies_change_no_byte_and_leave_none(
    plain: tuple[RunConfig, Path], tmp_path: Path, ranks: int, place: str, nodes: int, merge: bool
) -> None:
    config, begun = plain
    run, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(begun, run)
    disk.mkdir()
    words = arguments(
        run, Path(config.data.text_dir), [*SHARDS, f"launch.stage_in={disk / place}", f"index.merge={merge}".lower()]
    )
    for stage in (["index", "build"], ["knn", "search"]):
        done = distlm(*stage, *words, ranks=ranks)
        assert f"nodes that copied: {nodes}" in done.stderr, done.stderr
        assert [path for path in disk.rglob("*") if path.parent != disk or not place] == []
    expected, found = (file_hashes(Path(folder) / "neighbours") for folder in (config.run_dir, run))
    if merge:
        assert found == expected
        assert file_hashes(run / "index") == file_hashes(Path(config.run_dir) / "index")
    else:
        # Their manifests name the files of the index, and of keys equally far any may be kept.
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} <= {
            name for name in found if name.endswith(("manifest.json", "plan.json"))
        }


def test_a_killed_search_leaves_copies_that_the_next_start_takes(plain: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, _ = plain
    run, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(config.run_dir, run)
    shutil.rmtree(run / "neighbours")
    disk.mkdir()
    words = arguments(run, Path(config.data.text_dir), [*SHARDS, f"launch.stage_in={disk}"])
    process = subprocess.Popen(mpirun_command(1, ["-m", "distlm", "knn", "search", *words]), env=ENVIRONMENT)
    try:
        until(lambda: any(run.glob("neighbours/*/valid/found/unit-00003")), "a unit", pause=0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=DEADLINE_S)
    (left,) = [path for path in disk.iterdir() if path.is_dir()]
    copies = sorted(left.iterdir())
    assert len(copies) > 3
    damaged = copies[0].read_bytes()
    copies[0].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))

    done = distlm("knn", "search", *words)
    # What is damaged is copied again, and only that.
    assert f"/{copies[0].stat().st_size if copies[0].exists() else len(damaged)} bytes" in done.stderr, done.stderr
    assert list(disk.iterdir()) == []
    assert file_hashes(run / "neighbours") == file_hashes(Path(config.run_dir) / "neighbours")
