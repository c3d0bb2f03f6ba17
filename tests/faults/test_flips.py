"""A byte that rots in any file with results is found by `distlm verify`, and before a stage prints a number from it."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import distlm, shared
from support.knn import copy_run, in_stage
from support.plm import plm_config, tiny_shards

from distlm.analysis.clusters import Settings, report_clusters
from distlm.analysis.index_choice import tune_index
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import run_datastore_write
from distlm.errors import DistlmError
from distlm.index import run_index_build
from distlm.index.choose.measure import Budget
from distlm.index.search.file import search_file
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.generate.stage import run_generate
from distlm.knnlm.generate.words import Sampling
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime import checked
from distlm.runtime.checked import Written, problem, require_whole
from distlm.runtime.files import file_hash
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.records import CHECK, checksum
from distlm.runtime.rundir import RunDir
from distlm.training.loop import run_train
from distlm.verify import parts_below, verify

KEYS, VALUES, INDEX = "datastore/keys-00001.npy", "datastore/values-00001.npy", "index/*/merged.index"
STATES = "neighbours/*/{}/unit-00000/queries.npy"
ONE_WORD = Sampling(tokens=1, greedy=True, seed=1, top_p=1.0, shown=1, context=2)
FOR_PEOPLE = {"config.yaml", "metrics.jsonl", "report.html"}
"""What has no checksum: the user's own, the record of what was measured (each line is checked by itself), a view."""


def rotten(root: Path) -> list[str]:
    try:
        parts = parts_below(root)
    except DistlmError as error:
        return [str(error)]
    return verify(SingleComm(), root, parts)


def results_of(run: Path) -> list[Path]:
    return [
        path for path in sorted(run.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name not in FOR_PEOPLE and path.suffix != ".log"
        and not path.name.startswith(".") and not {"configs", "text", "prepare"} & {*path.parts}
    ]  # fmt: skip


def searched(factory: pytest.TempPathFactory) -> Path:
    """Tokens, checkpoint, datastore, index, neighbours, results."""
    return Path(shared.searched(factory).run_dir)


def alone(factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens have states and a cache, without a search."""

    def make(folder: Path) -> None:
        config = copy_run(shared.stored(factory), folder / "run", "cache.windows=[5,60]", "cache.thetas=[0.1]")
        shutil.rmtree(RunDir.of(config).datastore)
        for function in (run_cache, run_tune, run_evaluate):
            in_stage("knn", config, function)

    return shared.made_once(factory, "flips-alone", make) / "run"


def masked(factory: pytest.TempPathFactory) -> Path:
    """Shards, and a masked language model with memories."""

    def make(folder: Path) -> None:
        config = plm_config(tiny_shards(folder), folder / "run", "memory.kind=pkm", "train.updates=2")
        in_stage("train", config, run_train)

    return shared.made_once(factory, "flips-masked", make)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("made", [searched, alone, masked])
def test_every_flipped_byte_is_found(made, seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made(tmp_path_factory), run)
    assert rotten(run) == []
    draw, missed = random.Random(seed), []
    for path in results_of(run):
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        if not rotten(run):
            missed.append((str(path.relative_to(run)), place, whole[max(0, place - 8) : place + 8]))
        path.write_bytes(whole)
    assert missed == [] and rotten(run) == []


def flip(path: Path, place: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "gone", "stage", "run"),
    [
        ("tokens/train.bin", "datastore", "datastore", run_datastore_write),
        ("datastore/keys-00001.npy", "index", "index", run_index_build),
        ("datastore/keys-00001.npy", "neighbours", "knn", run_search),
        ("datastore/values-00001.npy", "neighbours", "knn", run_search),
        ("index/*/merged.index", "neighbours", "knn", run_search),
        ("tokens/valid.bin", "neighbours", "knn", run_search),
        ("neighbours/*/valid/unit-00001/distances.npy", "", "knn", run_tune),
        ("neighbours/*/valid/unit-00001/targets.npy", "", "knn", run_tune),
        ("neighbours/*/test/unit-00000/log_probs.npy", "", "knn", run_evaluate),
        ("neighbours/*/test/unit-00000/queries.npy", "", "knn", run_evaluate),
        ("tokens/test.bin", "", "knn", run_evaluate),
    ],
)
def test_a_stage_stops_before_it_uses_a_damaged_file(
    name, gone, stage, run, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    config = copy_run(shared.searched(tmp_path_factory), tmp_path / "run")
    if gone:
        shutil.rmtree(tmp_path / "run" / gone)
    (path,) = (tmp_path / "run").glob(name)
    flip(path)
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("results*.json")}
    with pytest.raises(DistlmError, match=rf"{path.name}: damaged: its checksum is \w+, \w+ was written; ") as caught:
        in_stage(stage, config, run)
    assert str(path) in str(caught.value)
    assert {file: file.read_bytes() for file in before} == before
    if path.name in ("distances.npy", "log_probs.npy", "queries.npy"):
        # Numbers that are as good as others: nothing else would have found them.
        config.launch.verify = False
        in_stage(stage, config, run)


def test_a_file_is_read_for_its_checksum_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(checked.VARIABLE, str(tmp_path / "memory"))
    (tmp_path / "store").mkdir()
    files = []
    for number in range(3):
        path = tmp_path / "store" / f"{number}.npy"
        path.write_bytes(bytes([number]) * 100)
        files.append(Written(path, file_hash(path), "copy it again"))
    read: list[Path] = []

    def counted(path: Path, like: str) -> str:
        read.append(path)
        return file_hash(path, like)

    monkeypatch.setattr(checked, "file_hash", counted)

    def look() -> list[str]:
        read.clear()
        require_whole(SingleComm(), tmp_path / "store", files, "test")
        return [path.name for path in read]

    assert look() == ["0.npy", "1.npy", "2.npy"]
    assert look() == []
    os.utime(files[1].path, ns=(1, 1))
    assert look() == ["1.npy"] and look() == []
    # Another file is expected there now.
    files[2] = Written(files[2].path, "0" * 32, "copy it again")
    with pytest.raises(DistlmError, match=r"2\.npy: damaged: .* 0{32} was written; copy it again"):
        look()
    files[2].path.unlink()
    with pytest.raises(DistlmError, match=r"2\.npy: missing; copy it again"):
        look()
    monkeypatch.setattr(checked, "KEPT_S", -1)
    files.pop()
    assert look() == ["0.npy", "1.npy"], "weeks later it is read again"
    monkeypatch.setenv(checked.VARIABLE, "")
    assert look() == look() == ["0.npy", "1.npy"], "no memory"


def search_vectors(config: RunConfig) -> object:
    run = RunDir.of(config)
    np.save(run.root / "queries.npy", Datastore.open(run.datastore)[:3].keys)
    return search_file(config, SingleComm(), run.root / "queries.npy", run.root / "found.npz")


def report(config: RunConfig) -> object:
    return report_clusters([config.run_dir], "test", Settings(words=5, components=2), None)


READERS: dict[str, tuple[Callable[[RunConfig], object], tuple[str, ...]]] = {
    "knn evaluate": (lambda config: in_stage("knn", config, run_evaluate), (KEYS, VALUES, INDEX)),
    "generate": (
        lambda config: in_stage("knn", config, lambda stage: run_generate(stage, "w1", ONE_WORD, False)),
        (KEYS, VALUES, INDEX, "tokens/dict.txt"),
    ),
    "index search": (search_vectors, (KEYS, VALUES, INDEX)),
    "index tune": (
        lambda config: tune_index(config, ["IVF4,SQ8"], 400, 20, Budget(0, 0, 0)),
        (KEYS, VALUES, STATES.format("valid")),
    ),
    "report clusters": (report, (KEYS, VALUES, STATES.format("test"))),
    "knn cache": (lambda config: in_stage("knn", config, run_cache), ("tokens/test.bin",)),
}


@pytest.mark.parametrize("command", READERS)
def test_no_number_comes_from_a_damaged_file_and_a_second_start_reads_none(
    command: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, names = READERS[command]
    monkeypatch.setenv(checked.VARIABLE, str(tmp_path / "checked"))
    # Another sample: the ladder is not taken over from the results that there are.
    config = copy_run(shared.searched(tmp_path_factory), tmp_path / "run", "knn.ladder_sample=8", "cache.windows=[5]")
    if command == "knn cache":
        shutil.rmtree(tmp_path / "run" / "neighbours")
    paths = [path for name in names for path in sorted((tmp_path / "run").glob(name))[:1]]
    assert len(paths) == len(names)
    for path in paths:
        whole, before = path.read_bytes(), path.stat().st_mtime_ns
        flip(path)
        with pytest.raises(DistlmError, match=re.escape(path.name)):
            run(config)
        path.write_bytes(whole)
        os.utime(path, ns=(before, before))
    read: list[Path] = []

    def counted(path: Path, like: str) -> str:
        read.append(path)
        return file_hash(path, like)

    monkeypatch.setattr(checked, "file_hash", counted)
    run(config)
    read.clear()
    run(config)
    # Losses are compared whenever they are read.
    assert not [path for path in read if "losses" not in path.parts]


def test_results_say_that_files_were_not_compared(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    config = copy_run(shared.searched(tmp_path_factory), tmp_path / "run")
    assert "checksums" not in results_table(Results.read(RunDir.of(config).results))
    config.launch.verify = False
    in_stage("knn", config, run_evaluate)
    found = Results.read(RunDir.of(config).results)
    assert found.verified is False and "not compared with their checksums" in results_table(found)


def test_verify_is_a_command_for_runs_folders_and_files(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(shared.searched(tmp_path_factory).run_dir, run)
    whole = distlm("verify", str(run))
    assert whole.stdout.splitlines()[-1] == f"{run}: whole" and "datastore" in whole.stdout
    stray = run / "datastore" / "keys-00099.npy"
    stray.write_bytes(b"x")
    flip(run / "datastore" / "values-00002.npy")
    for place, count in ((run, 2), (run / "datastore", 2), (run / "datastore" / "values-00002.npy", 1)):
        found = distlm("verify", str(place), check=False)
        assert found.returncode == 1 and found.stderr.count("FAIL ") == count, found.stderr
        assert "values-00002.npy: damaged" in found.stderr
    assert "keys-00099.npy: belongs to no record" in distlm("verify", str(run), check=False).stderr
    assert distlm("verify", str(run / "datastore" / "keys-00000.npy")).returncode == 0
    nothing = distlm("verify", str(tmp_path / "nothing"), check=False)
    assert nothing.returncode == 1 and "no such file or folder" in nothing.stderr


@pytest.mark.parametrize("value", [None, 7, "x", [], ["x"], {}, {"x": None}, {"x": "y"}])
def test_verify_of_a_record_that_names_no_files(value: object, tmp_path: Path) -> None:
    tree = {"format": 1, "rows": 3, "hashes": value}
    (tmp_path / "unit.json").write_text(json.dumps({**tree, CHECK: checksum(tree)}), "utf-8")
    (part,) = parts_below(tmp_path)
    problems = verify(SingleComm(), tmp_path, [part])
    assert all(str(tmp_path) in found for found in problems) and bool(problems) == (value != {})


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    assert "a.npy: is a pipe" in problem(Written(tmp_path / "a.npy", "0" * 32, "copy it again"))
