"""`distlm clean`: what it names, what it removes, what it leaves alone."""

import shutil
from pathlib import Path

import pytest
from support import distlm, shared
from support.knn import copy_run, in_stage
from support.store import file_hashes, tiny_config

from distlm.clean import WHAT, doomed, remove
from distlm.config.schema import RunConfig
from distlm.errors import Busy, UsageError
from distlm.index import run_index_build
from distlm.knnlm.search.stage import run_search
from distlm.runtime.lock import only_writer
from distlm.runtime.question import index_of, label
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.rundir import RunDir

TABLES = ("questions.md", "questions.csv", "frequency-valid.csv", "clusters-valid.png", "words-valid-lm-knn.csv")
"""What is written of the answers of searches."""


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> RunConfig:
    """A copy of a searched run."""
    config = copy_run(shared.searched(tmp_path_factory), tmp_path / "run")
    for name in ("lm.json", *TABLES):
        (tmp_path / "run" / name).write_text("{}", "utf-8")
    (tmp_path / "run" / "index-tune").mkdir()
    (tmp_path / "run" / "index-tune" / "pick.json").write_text("{}", "utf-8")
    return config


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (
            "search",
            {"tokens", "checkpoints", "datastore", "index", "index-tune", "lm.json", "datastore.yaml", "index.yaml"},
        ),
        ("index", {"tokens", "checkpoints", "datastore", "index-tune", "lm.json", "datastore.yaml"}),
        ("datastore", {"tokens", "checkpoints", "lm.json"}),
        ("train", {"tokens"}),
    ],
)
def test_each_takes_those_made_from_it_along(run, what, left):
    root = Path(run.run_dir)
    before = file_hashes(root)
    things = doomed(root, what)
    assert sum(thing.bytes for thing in things) == sum(
        path.stat().st_size for thing in things for path in [thing.path, *thing.path.rglob("*")] if path.is_file()
    )
    remove(things)
    there = folders(root) | {path.name for path in (root / "configs").glob("*")}
    made = {"tokens", "checkpoints", "datastore", "index", "lm.json", "datastore.yaml", "index.yaml", "knn.yaml",
            "neighbours", "tuned", "results", "losses", "knn.json", "results.json", "index-tune", *TABLES}  # fmt: skip
    assert there & made == left
    after = file_hashes(root)
    assert after.items() <= before.items(), "what stays is as it was"
    assert not doomed(root, what)


def test_what_was_removed_is_made_again_with_other_settings(run):
    """What a refusal advises works: it names the command, and after it the setting may change."""
    root = Path(run.run_dir)
    other = tiny_config(root, Path(run.data.text_dir), ["knn.block=16"])
    remove(doomed(root, "search"))
    in_stage("knn", other, run_search)
    assert RunDir.of(other).neighbours("test").is_dir()


def test_one_index_with_its_searches_or_one_question(run):
    root = Path(run.run_dir)
    other = tiny_config(root, Path(run.data.text_dir), ["index.factory=IVF4,SQ8"])
    in_stage("index", other, run_index_build)
    in_stage("knn", other, run_search)
    first, second = RunDir.of(run), RunDir.of(other)
    before = file_hashes(first.neighbours("test").parent)
    remove(doomed(root, "index", "IVF4-SQ8"))
    assert not second.index.exists() and not second.neighbours("test").exists()
    assert first.index.is_dir() and file_hashes(first.neighbours("test").parent) == before
    remove(doomed(root, "search", first.label))
    assert not first.neighbours("test").exists() and not first.results.exists() and first.index.is_dir()
    with pytest.raises(UsageError, match=r"--only IVF4-SQ8: not in .*index; there are IVF16-PQ4"):
        doomed(root, "index", "IVF4-SQ8")
    for what, only in (("train", "x"), ("index", "../checkpoints")):
        with pytest.raises(UsageError, match="names an index"):
            doomed(root, what, only)


NAMES = ("small", "small_v2", "small_nprobe8_x", "small_nprobe8_exact_k64", "small_brute", "small_k5", "IVF4", "brute")
ASKED: tuple[list[str], ...] = (
    [], ["knn.search=brute"], ["knn.similarity=dot"], ["knn.candidates=40"], ["knn.distances=quantised"],
    ["knn.search=brute", "knn.similarity=dot"],
)  # fmt: skip


def test_one_index_takes_no_other_along_whose_name_begins_alike(tmp_path):
    root = tmp_path / "run"
    asked = [tiny_config(root, tmp_path, [f"index.name={name}", *words]) for name in NAMES for words in ASKED]
    labels = {label(config): config.index.name for config in asked}
    assert len(labels) == len(asked) and all(index_of(text) == name for text, name in labels.items())
    for text in labels:
        for path in (root / "neighbours" / text / "valid", root / "losses" / text / "valid"):
            path.mkdir(parents=True)
        for path in (root / "tuned" / f"{text}.json", root / "results" / f"{text}.json"):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    for name in NAMES:
        (root / "index" / name).mkdir(parents=True)
    (root / "config.yaml").touch()
    for name in NAMES:
        found = {thing.path.name.removesuffix(".json") for thing in doomed(root, "index", name)}
        assert found == {name} | {text for text in labels if labels[text] == name}
    for text in labels:
        assert len(things := doomed(root, "search", text)) == 4
        assert {thing.path.name.removesuffix(".json") for thing in things} == {text}
    for only in ("*", "small*", "?mall", "[s]mall"):
        with pytest.raises(UsageError, match="there are IVF4, brute"):
            doomed(root, "index", only)


@pytest.mark.parametrize("only", ["", "IVF16-PQ4", "LABEL"])
def test_a_removal_that_was_ended_is_taken_on(run, monkeypatch, only):
    """Whatever it was removing: nothing stays that no command names."""
    root = Path(run.run_dir)
    what = "search" if only == "LABEL" else "index" if only else "datastore"
    only = RunDir.of(run).label if only == "LABEL" else only
    last = len(doomed(root, what, only)) - 1

    def ended(path, *_args, **_options):
        raise KeyboardInterrupt

    for ended_at in {0, last // 2, last}:
        copy = root.with_name(f"ended-{ended_at}")
        shutil.copytree(root, copy)
        things = doomed(copy, what, only)
        part = things[ended_at]
        remove(things[:ended_at])
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", ended)
            patched.setattr(Path, "unlink", ended)
            with pytest.raises(KeyboardInterrupt):
                remove([part])
        again = doomed(copy, what, only)
        assert [thing.path for thing in again[:-1]] == [thing.path for thing in things[ended_at + 1 :]]
        assert again[-1].path.match(f"*/.{part.path.name}.*.removed")
        remove(again)
        assert not [path for path in copy.rglob("*.removed")] and not part.path.exists()


def test_nothing_is_removed_while_another_run_writes(run):
    root = Path(run.run_dir)
    before = file_hashes(root)
    with only_writer(RunDir.of(run).index, SingleComm(), "building it"), pytest.raises(Busy, match="building it"):
        remove(doomed(root, "train"))
    assert file_hashes(root).keys() >= before.keys()


def test_borrowed_folders_stay(run, tmp_path):
    lender = Path(run.run_dir)
    before = file_hashes(lender)
    borrower = tmp_path / "borrower"
    shutil.copytree(lender / "configs", borrower / "configs")
    config = tiny_config(borrower, Path(run.data.text_dir), [f"datastore.folder={lender / 'datastore'}"])
    RunDir.of(config).open_stage(config, "prepare")
    remove(doomed(borrower, "train"))
    assert file_hashes(lender) == before


def test_the_command(run, tmp_path):
    root = Path(run.run_dir)
    before = file_hashes(root)
    told = distlm("clean", str(root), "datastore", "--dry-run").stdout
    assert "would be removed" in told and f"{root}/neighbours" in told and " kB" in told
    assert file_hashes(root) == before
    assert "  removed" in distlm("clean", str(root), "datastore").stdout
    assert not (root / "datastore").exists() and (root / "checkpoints").is_dir()
    assert "nothing to remove" in distlm("clean", str(root), "index").stdout
    for words, said in (
        ([str(tmp_path), "index"], "no run directory"), ([str(root), "all"], f"expected one of {', '.join(WHAT)}"),
        (["nosuch", "index"], "nosuch"),
    ):  # fmt: skip
        refused = distlm("clean", *words, check=False)
        assert refused.returncode == 2 and said in refused.stderr
