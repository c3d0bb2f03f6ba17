"""`distlm sweep`: which questions it asks, in which order, and that it asks none twice."""

import csv
from pathlib import Path

import pytest
from support import distlm, shared
from support.knn import copy_run
from support.store import file_hashes

from distlm.analysis.report import write_report
from distlm.config.load import load_config
from distlm.errors import UsageError
from distlm.runtime.rundir import RunDir
from distlm.sweep import grid_of, questions, split_factories

DEMO = type(load_config("demo"))


@pytest.mark.parametrize(
    "factories",
    [
        ["IVF4096,PQ64"],
        ["IVF64,PQ8", "IVF32,SQ8"],
        ["PCA128,IVF1024,SQ4", "OPQ64_128,IVF4096,PQ64", "IVF256,Flat"],
        ["OPQ16,PCAR64,IVF64_HNSW32,PQ16x4fsr", "L2norm,IVF64,SQ8"],
    ],
)
def test_factories_are_told_apart(factories):
    assert split_factories(",".join(factories)) == factories


def test_every_combination_once_and_the_largest_k_first():
    fixed, swept = grid_of(["knn.nprobe=1,8,1", "knn.k=4,64", "knn.splits=[valid,test]", "launch.ranks=1"], DEMO)
    assert fixed == ["knn.splits=[valid,test]", "launch.ranks=1"]
    assert list(questions(swept)) == [[f"knn.nprobe={n}", f"knn.k={k}"] for n in (1, 8) for k in (64, 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give at least one setting several values"),
        (["knn.nprobe=8"], "give at least one setting several values"),
        (["train.lr=1,2"], "train.lr=1,2: cannot be swept; what a store can be asked: .*knn.nprobe"),
        (["knn.k=1,x"], "must be whole numbers"),
    ],
)
def test_what_cannot_be_swept(words, said):
    with pytest.raises(UsageError, match=said):
        list(questions(grid_of(words, DEMO)[1]))


def test_the_command_asks_what_is_missing_and_compares(tmp_path_factory, tmp_path):
    first = copy_run(shared.searched(tmp_path_factory), tmp_path / "run")
    root = Path(first.run_dir)
    # A trained run's steps up to the store are there; what is asked of it is the sweep's.
    recipe = root / "config.yaml"
    before = {name: file_hashes(root / name) for name in ("results", "neighbours", "index")}
    words = [str(recipe), f"run_dir={root}", "index.factory=IVF16,PQ4,IVF4,SQ8", "knn.k=8,16", "knn.ladder_sample=64"]
    refused = distlm("sweep", *words, "knn.nprobe=0,4", check=False)
    assert refused.returncode == 2 and "knn.nprobe" in refused.stderr
    wrong = [word.replace("IVF4,SQ8", "IVF4,PQ7") for word in words]
    refused = distlm("sweep", *wrong, check=False)
    assert refused.returncode == 1 and "PQ7 does not divide" in refused.stderr
    assert file_hashes(root / "index") == before["index"], "found before the first question was asked"
    done = distlm("sweep", *words)
    with (root / "questions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    labels = [f"{index}_nprobe4_exact_k{k}" for index in ("IVF16-PQ4", "IVF4-SQ8") for k in (16, 8)]
    assert {row["question"] for row in rows} == set(labels)
    assert len(rows) == 8 and all(float(row["perplexity"]) > 1 and 0 < float(row["recall"]) <= 1 for row in rows)
    assert [bool(row["search_seconds"]) for row in rows if row["question"] == labels[3]] == [False, False]
    assert all(label in done.stdout for label in labels) and "LM alone" in done.stdout
    for name, files in before.items():
        assert files.items() <= file_hashes(root / name).items(), "the first question's files are as they were"
    after = file_hashes(root / "results")
    again = distlm("sweep", *words)
    assert again.stderr.count("complete; nothing to do") == 4 and file_hashes(root / "results") == after
    page = write_report(RunDir(root)).read_text("utf-8")
    assert "Every question that was asked" in page and labels[2] in page
