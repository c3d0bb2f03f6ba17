"""The same store asked many questions: files side by side, the first answers untouched, folders of older versions."""

import json
import shutil
from pathlib import Path

import pytest
from support.knn import copy_run, in_stage
from support.store import file_hashes, tiny_config

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.index import run_index_build
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.state import evaluated_as_tuned
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.pipeline import STEPS
from distlm.runtime.rundir import RunDir


def asked(config: RunConfig, *overrides: str) -> RunConfig:
    """The same run directory with other settings."""
    return tiny_config(Path(config.run_dir), Path(config.data.text_dir), overrides)


def answer(config: RunConfig) -> Results:
    """Ask it: search, tune, evaluate."""
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    return Results.read(RunDir.of(config).results)


def answered(config: RunConfig) -> bool:
    """`distlm run` would skip every step."""
    run = RunDir.of(config)
    return all(
        STEPS[words].finished(config, run) for words in ("index build", "knn search", "knn tune", "knn evaluate")
    )


SOME = [["knn.nprobe=1"], ["knn.search=brute"], ["index.factory=IVF4,SQ8"]]
MORE = [["knn.nprobe=8"], ["knn.distances=quantised"], ["knn.similarity=dot"], ["index.name=twin"]]


@pytest.mark.parametrize("others", [SOME, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_other_questions_leave_the_first_answer_alone(others, searched, tmp_path, capsys):
    first = copy_run(searched, tmp_path / "run")
    root = Path(first.run_dir)
    folders = ("index", "neighbours", "tuned", "results", "losses")
    before = {name: file_hashes(root / name) for name in folders}
    for overrides in others:
        config = asked(first, *overrides)
        assert not answered(config)
        if config.knn.search == "index":
            in_stage("index", config, run_index_build)
        results = answer(config)
        assert answered(config) and answered(first), overrides
        assert results.settings.nprobe == (None if config.knn.search == "brute" else config.knn.nprobe)
    for name in folders:
        after = file_hashes(root / name)
        assert before[name].items() <= after.items() and len(after) > len(before[name])
    assert len(list((root / "results").iterdir())) == 1 + len(others)
    # The newest answer also lies where there was only one.
    newest = root / "results" / f"{RunDir.of(config).label}.json"
    assert (root / "results.json").read_bytes() == newest.read_bytes()


def test_a_smaller_k_is_served_from_the_neighbours_of_a_larger_one(searched, tmp_path, capsys):
    first = copy_run(searched, tmp_path / "run")
    config = asked(first, "knn.k=8", "knn.ladder_sample=0")
    before = file_hashes(Path(config.run_dir) / "neighbours")
    results = answer(config)
    assert file_hashes(Path(config.run_dir) / "neighbours") == before, "nothing was searched again"
    assert "their first 8 answer" in capsys.readouterr().err
    assert answered(config) and results.exactness and "the first 8 of 16" in results.exactness
    kept, served = (Neighbours.asked(RunDir.of(one), "test", one.knn) for one in (first, config))
    assert served.k == 8 and served.fingerprint != kept.fingerprint
    for mine, whole in zip(served.units(), kept.units(), strict=True):
        assert (mine.ids == whole.ids[:, :8]).all() and (mine.distances == whole.distances[:, :8]).all()
    # A search of its own by the same distances finds the same.
    alone = copy_run(searched, tmp_path / "alone", "knn.k=8", "knn.distances=quantised", "knn.splits=[test]")
    wide = copy_run(searched, tmp_path / "wide", "knn.distances=quantised", "knn.splits=[test]")
    for one in (alone, wide):
        in_stage("knn", one, run_search)
    narrow = Neighbours.asked(RunDir.of(asked(wide, "knn.distances=quantised", "knn.k=8")), "test", alone.knn)
    for mine, own in zip(narrow.units(), Neighbours.open(RunDir.of(alone).neighbours("test")).units(), strict=True):
        assert (mine.distances == own.distances).all()


def test_a_larger_k_is_searched(searched, tmp_path):
    first = copy_run(searched, tmp_path / "run")
    larger = asked(first, "knn.k=32", "knn.splits=[valid]")
    in_stage("knn", larger, run_search)
    assert Neighbours.asked(RunDir.of(larger), "valid", larger.knn).k == 32
    assert Neighbours.asked(RunDir.of(first), "valid", first.knn).searched == 0, "its own answer, not that of 32"


def test_a_store_and_an_index_are_read_where_another_run_has_them(searched, tmp_path):
    lender = copy_run(searched, tmp_path / "lender")
    theirs, run_dir = RunDir.of(lender), tmp_path / "borrower"
    shutil.copytree(theirs.root / "tokens", run_dir / "tokens")

    def borrower(*overrides: str) -> RunConfig:
        store = f"datastore.folder={theirs.datastore}", f"datastore.checkpoint={theirs.model_checkpoint(lender)}"
        return tiny_config(run_dir, Path(lender.data.text_dir), [*store, *overrides])

    before, first = file_hashes(theirs.root), Results.read(theirs.results)
    own = borrower("index.factory=IVF4,SQ8")
    in_stage("index", own, run_index_build)
    assert answer(own).datastore == first.datastore
    assert answer(borrower(f"index.folder={theirs.index}")).splits["test"].knn == first.splits["test"].knn
    neighbours = f"knn.folder={theirs.neighbours('test').parent}"
    in_stage("knn", borrower(neighbours, "knn.k=8"), run_tune)
    assert file_hashes(theirs.root) == before, "a lender's files are only read"
    assert not (run_dir / "datastore").exists()
    with pytest.raises(DistlmError, match=r"searched with nprobe 4, knn.nprobe=2; use knn.nprobe=4"):
        in_stage("knn", borrower(neighbours, "knn.nprobe=2"), run_tune)
    other = borrower(neighbours, f"index.folder={theirs.index}", "knn.nprobe=2")
    with pytest.raises(DistlmError, match=r"results of another nprobe; name another knn\.folder, or leave it out$"):
        in_stage("knn", other, run_search)


def to_old_layout(root: Path) -> None:
    """As version 0.1 laid out a run: one index, one search."""
    for folder in ("index", "neighbours", "losses"):
        (named,) = (path for path in (root / folder).iterdir() if path.is_dir())
        for path in named.iterdir():
            path.rename(root / folder / path.name)
        named.rmdir()
    for folder in ("tuned", "results"):
        shutil.rmtree(root / folder)


def test_a_run_of_an_older_version_is_read_as_it_is(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    root = Path(config.run_dir)
    run = RunDir.of(config)
    facts = run.neighbours("test"), run.index, run.losses
    to_old_layout(root)
    before = file_hashes(root)
    assert answered(config) and evaluated_as_tuned(config, run)
    assert (run.neighbours("test"), run.index, run.losses) == (
        root / "neighbours/test",
        root / "index",
        root / "losses",
    )
    for function in (run_search, run_tune):
        in_stage("knn", config, function)
    assert {name: before[name] for name in before if name.startswith(("neighbours", "index"))}.items() <= file_hashes(
        root
    ).items()
    assert not any(path.exists() for path in facts)
    # Another question goes beside it, a smaller k is served from it.
    other = asked(config, "index.factory=IVF4,SQ8")
    in_stage("index", other, run_index_build)
    answer(other)
    smaller = asked(config, "knn.k=8")
    assert Neighbours.asked(RunDir.of(smaller), "test", smaller.knn).folder == root / "neighbours/test"
    assert answered(config) and RunDir.of(other).index == root / "index" / "IVF4-SQ8"


def test_what_a_question_does_not_decide_still_locks_and_names_what_removes_it(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    other = asked(config, "knn.block=16")
    with pytest.raises(
        DistlmError, match=r"knn.block: 32 there, 16 now\); remove them with `distlm clean .*run search`"
    ):
        in_stage("knn", other, run_search)
    free = asked(config, "train.save_every=1", "train.log_every=7", "train.keep_last=9",
                    "launch.ranks=3", "launch.threads=2")  # fmt: skip
    in_stage("knn", free, run_search)
    assert json.loads((RunDir.of(free).results).read_text("utf-8"))
