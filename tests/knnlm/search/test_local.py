"""A search with launch.stage_in: it reads copies alone, copies what it reads at random or often, and says how much."""

import shutil
from pathlib import Path

import pytest
from support.knn import copy_run, in_stage
from support.records import alter
from support.store import file_hashes

from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index.search import searcher
from distlm.knnlm.plan import plan_search
from distlm.knnlm.search import rescore, stage
from distlm.knnlm.search.local import wanted_copies
from distlm.knnlm.search.stage import run_search
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.rundir import RunDir


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def config(searched: RunConfig, tmp_path: Path, disk: Path) -> RunConfig:
    """What `searched` was before its search, with copies."""
    found = copy_run(searched, tmp_path / "run", f"launch.stage_in={disk}")
    shutil.rmtree(tmp_path / "run" / "neighbours")
    return found


def names(config: RunConfig, *splits: str) -> set[str]:
    """First parts of the names of the files that would be copied."""
    groups = in_stage("knn", config, lambda stage: wanted_copies(stage, splits or config.knn.splits))
    return {file.path.name.partition("-")[0] for group in groups for file in group.files}


def test_index_values_and_keys_are_read_from_copies_alone(searched, config, disk, monkeypatch):
    read: list[Path] = []
    mapped, opened = Datastore._mapped, searcher.open_mapped

    def note_opened(path):
        read.append(path)
        return opened(path)

    def note(store, path):
        array = mapped(store, path)
        read.append(Path(str(array.filename)))
        return array

    monkeypatch.setattr(Datastore, "_mapped", note)
    monkeypatch.setattr(searcher, "open_mapped", note_opened)
    in_stage("knn", config, run_search)
    assert {path.name.partition("-")[2].partition("-")[0].partition(".")[0] for path in read} == {
        "merged", "keys", "values"
    }  # fmt: skip
    assert [path for path in read if disk not in path.parents] == []
    assert list(disk.iterdir()) == []
    assert file_hashes(RunDir.of(config).root / "neighbours") == file_hashes(RunDir.of(searched).root / "neighbours")


def test_keys_that_are_read_once_in_order_stay_where_they_are(config):
    assert names(config) == {"keys", "values", "merged.index"}
    assert names(config, "valid") == {"values", "merged.index"}
    config.knn.distances = "quantised"
    assert names(config) == {"values", "merged.index"}
    config.knn.search = "brute"
    assert names(config, "valid") == {"keys", "values"}
    config.launch.stage_in = ""
    assert names(config) == set()


def test_keys_are_copied_for_the_rank_that_scores_their_shard(config):
    class Two(SingleComm):
        size = 2

    def wanted(stage):
        object.__setattr__(stage, "comm", Two())
        return wanted_copies(stage, config.knn.splits)

    keys = in_stage("knn", config, wanted)[-1]
    order = [keys.readers[file.path] for file in keys.files]
    # Each rank scores a run of ranges, which follow one another.
    assert order == sorted(order) and set(order) == {0, 1} and abs(2 * sum(order) - len(order)) <= 2


def test_nothing_is_copied_where_all_is_found(searched, tmp_path, disk, capsys):
    config = copy_run(searched, tmp_path / "run", f"launch.stage_in={disk}")
    assert in_stage("knn", config, run_search)["tokens"] == 0
    assert "copying" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["index/*/merged.index", "datastore/values-00001.npy", "datastore/keys-00000.npy"])
def test_what_rotted_is_found_on_the_way_and_no_number_comes_of_it(config, disk, name):
    root = RunDir.of(config).root
    (path,) = root.glob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DistlmError, match=f"{path.name}: damaged"):
        in_stage("knn", config, run_search)
    assert list(disk.iterdir()) == [] and not list((root).glob("neighbours/*/*/manifest.json"))


def test_what_cannot_be_asked_is_refused_before_copying(config, monkeypatch):
    monkeypatch.setattr(stage, "copied", lambda *_: pytest.fail("it was copied first"))
    config.knn.k = 10**9
    with pytest.raises(UsageError, match=r"knn\.k=1000000000: the datastore has"):
        in_stage("knn", config, run_search)
    config.knn.k = 16
    (record,) = RunDir.of(config).root.glob("index/*/index.json")
    alter(record, datastore="0" * 32)
    with pytest.raises(DistlmError, match="index of another store"):
        in_stage("knn", config, run_search)


def test_the_plan_says_how_much_goes_to_each_node(config, monkeypatch):
    copied = in_stage("knn", config, lambda stage: wanted_copies(stage, config.knn.splits))
    shared, keys = (
        sum(file.path.stat().st_size for group in groups for file in group.files) / 1e3
        for groups in (copied[:2], copied[2:])
    )
    (note,) = [note for note in plan_search(config, 2).notes if note.startswith("launch.stage_in=")]
    said = [float(word) for word in note.replace(":", " ").split() if word.replace(".", "").isdecimal()]
    assert said == pytest.approx([shared, keys], rel=0.25) and "kB of keys over all nodes" in note
    monkeypatch.setattr("distlm.knnlm.plan.passes", lambda *_: 1)
    assert "keys" not in next(note for note in plan_search(config, 2).notes if note.startswith("launch.stage_in="))


def test_passes_are_groups_of_queries():
    assert rescore.passes([217_646, 245_569], 1024, 1024) == 2
    assert rescore.passes([500_000], 1024, 1024) == len(rescore.plan_groups([1000] * 500, 1024, 1024)) == 2
