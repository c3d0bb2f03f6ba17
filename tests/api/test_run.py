"""open_run reads: lazily, in one process, without changing a byte, and says what is missing and what makes it."""

import inspect
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ENVIRONMENT, NOBODY
from support.deadline import DEADLINE_S
from support.knn import copy_run
from support.plm import plm_config, tiny_shards
from support.records import alter
from support.store import file_hashes, ready_run

import distlm
from distlm.cli import main
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train


def use_everything(path: str) -> None:
    """Every part of a run."""
    run = distlm.open_run(path)
    ids = run.words.encode("w1 w2\nw3")
    assert len(run.log_probs(ids).ids) == len(ids) and run.next_word("w1", top=2)
    assert run.index.search(np.asarray(run.datastore[:2].keys), k=2).words
    assert run.neighbours("test").tokens and run.results and run.label and not run.model.training
    assert str(run.checkpoint).startswith(path)


def test_the_parts_are_those_of_the_run(causal: RunConfig) -> None:
    run, there = distlm.open_run(causal.run_dir), RunDir.of(causal)
    assert run.config == causal and run.path == Path(causal.run_dir) and run.label == there.label
    assert causal.model.kind in repr(run)
    store = Datastore.open(there.datastore)
    assert run.datastore.fingerprint == store.fingerprint and len(run.datastore) == store.rows
    assert len(run.index) == store.rows and run.index.width == store.width and run.index.nlist == 16
    assert run.neighbours("valid").manifest.split == "valid"
    assert run.neighbours("test", run.label).fingerprint == run.neighbours("test").fingerprint
    results, told = run.results, json.loads(there.results.read_text("utf-8"))
    assert results is not None and results.hashes == told["hashes"]
    assert results.splits["test"].lm.perplexity == told["splits"]["test"]["lm"]["perplexity"]
    assert run.lm_results is None
    assert next(run.model.parameters()).device.type == "cpu" and run.checkpoint == there.model_checkpoint(causal)


def test_another_question_of_the_same_store(transformer_lm: RunConfig) -> None:
    run = distlm.open_run(transformer_lm.run_dir, "knn.k=4", "knn.search=brute", device=torch.device("cpu"))
    assert run.label == "brute_k4" and run.results is None
    exact = run.log_probs("w1 w2 w3", lam=0.5, temperature=1.0, k=4)
    keys, values = run.datastore[:]
    query = distlm.open_run(transformer_lm.run_dir).index.search(np.asarray(keys[:3]), 3, nprobe=16)
    assert query.ids[:, 0].tolist() == [0, 1, 2] and query.distances[:, 0].max() < 1e-3
    assert exact.knn is not None and len(values) == len(run.datastore)
    with pytest.raises(DistlmError, match=r"brute_k4.*knn search"):
        run.neighbours("test")


def test_nothing_of_the_run_changes_and_it_may_be_read_only(transformer_lm: RunConfig, tmp_path: Path) -> None:
    config = copy_run(transformer_lm, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, file_hashes(tmp_path)
    use_everything(config.run_dir)
    assert ({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, file_hashes(tmp_path)) == before
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    # Not in a fork of this process: torch's threads do not live on there. Nobody cannot import; all is imported before.
    script = f"""
import os
import distlm, numpy as np
{inspect.getsource(use_everything)}
use_everything({config.run_dir!r})
os.chdir({str(tmp_path)!r})
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
use_everything("run")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr


LAZY = """
import sys
import distlm
heavy = {"torch", "faiss", "transformers", "mpi4py", "deepspeed"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
run = distlm.open_run(sys.argv[1])
run.config.knn.k, run.label, run.results
assert not heavy & set(sys.modules), heavy & set(sys.modules)
run.words.decode(run.words.encode("w1 w2"))
run.datastore[5], run.neighbours("test").targets()
assert not {"faiss", "transformers", "mpi4py", "deepspeed"} & set(sys.modules)
run.next_word("w1")
assert not {"transformers", "mpi4py", "deepspeed"} & set(sys.modules)
print("lazy")
"""


def test_opening_loads_nothing_that_computes(transformer_lm: RunConfig) -> None:
    # Two ranks of something else are no ranks of this.
    environment = {**ENVIRONMENT, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LAZY, transformer_lm.run_dir], env=environment, capture_output=True, text=True,
        timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.stdout == "lazy\n", done.stderr


def test_a_folder_that_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DistlmError, match="there is no such folder; `distlm run RECIPE run_dir="):
        distlm.open_run(tmp_path / "none")
    with pytest.raises(DistlmError, match=r"no config\.yaml, so it is no run directory"):
        distlm.open_run(tmp_path)
    # A recipe has this name, too.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistlmError, match="demo: there is no such folder"):
        distlm.open_run("demo")
    with pytest.raises(DistlmError, match=r"model\.kind"):
        (tmp_path / "config.yaml").write_text("model: {kind: none}\n", "utf-8")
        distlm.open_run(tmp_path)


def test_a_folder_with_the_name_of_a_recipe(
    transformer_lm: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(transformer_lm, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    run = distlm.open_run("demo")
    assert run.path == Path("demo") and run.config.name == "tiny" and len(run.datastore)
    with pytest.raises(UsageError, match="did you mean"):
        distlm.open_run("demo", "knn.nprob=3")


MISSING = {
    "datastore write": ("datastore", "datastore"),
    "index build": ("index", "index"),
    "knn search": ("neighbours", "neighbours"),
    "knn tune": ("tuned", "log_probs"),
    "train": ("checkpoints", "model"),
    "data prepare": ("tokens", "words"),
}
ASK = {
    "datastore": lambda run: run.datastore, "index": lambda run: run.index,
    "neighbours": lambda run: run.neighbours("test"), "log_probs": lambda run: run.log_probs("w1"),
    "model": lambda run: run.model, "words": lambda run: run.words,
}  # fmt: skip


@pytest.mark.parametrize("verb", MISSING)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    transformer_lm: RunConfig, tmp_path: Path, verb: str
) -> None:
    config, (folder, part) = copy_run(transformer_lm, tmp_path / "a run"), MISSING[verb]
    shutil.rmtree(Path(config.run_dir) / folder)
    (Path(config.run_dir) / "knn.json").unlink()
    with pytest.raises(DistlmError) as error:
        ASK[part](distlm.open_run(config.run_dir))
    shown = re.search(r"`distlm (.*?)`", str(error.value))
    assert shown and shown[1] == f"{verb} '{config.run_dir}'" and f"in {config.run_dir}" in str(error.value)


def test_neighbours_that_were_not_searched(transformer_lm: RunConfig) -> None:
    run = distlm.open_run(transformer_lm.run_dir, "knn.k=9")
    assert run.neighbours("test").k == 9
    folder = re.escape(transformer_lm.run_dir)
    with pytest.raises(DistlmError, match=rf"`distlm knn search {folder} knn.k=9 'knn.splits=\[train\]'` makes it"):
        run.neighbours("train")
    with pytest.raises(DistlmError, match="under that label; there are IVF16-PQ4_nprobe4_exact_k16"):
        run.neighbours("test", "IVF9")
    with pytest.raises(DistlmError, match="no split 'tset'"):
        run.neighbours("tset")


def test_the_advice_works(tmp_path: Path) -> None:
    """Each command that an error names makes what was missing."""
    config = ready_run(tmp_path, lines=200)
    (Path(config.run_dir) / "config.yaml").touch()
    run = distlm.open_run(config.run_dir)
    for part in ("datastore", "index", "neighbours", "log_probs"):
        with pytest.raises(DistlmError) as error:
            ASK[part](run)
        shown = re.search(r"`distlm (.*?)`", str(error.value))
        assert shown
        with pytest.raises(SystemExit) as end:
            main(shlex.split(shown[1]))
        assert end.value.code == 0
        run = distlm.open_run(config.run_dir)
        assert ASK[part](run) is not None


def test_an_unfinished_datastore_is_said_to_be_unfinished(transformer_lm: RunConfig, tmp_path: Path) -> None:
    config = copy_run(transformer_lm, tmp_path / "run")
    path = RunDir.of(config).datastore / "manifest.json"
    alter(path, complete=False)
    with pytest.raises(DistlmError, match=r"no finished datastore.*datastore write"):
        _ = distlm.open_run(config.run_dir).datastore


def test_a_masked_language_model_has_words_model_and_results(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path)
    config = plm_config(shards, tmp_path / "run", "memory.kind=pkm", "train.updates=2")
    with open_stage("train", config) as stage:
        run_train(stage)
    run = distlm.open_run(config.run_dir)
    ids = run.words.encode("w1 w2")
    assert run.words.decode(ids) == "w1 w2" and len(run.words) == run.model.vocabulary
    assert run.words.id_of("[MASK]") in range(5) and run.words.id_of("☃") == run.words.id_of("[UNK]")
    memories: Any = run.model.memories
    assert len(memories) == 2 and not run.model.training
    assert run.results is None and run.lm_results is None
    for ask in (
        lambda: run.datastore, lambda: run.index, lambda: run.neighbours("test"), lambda: run.log_probs("w1"),
        lambda: run.next_word("w1"), lambda: run.tokens("test"),
    ):  # fmt: skip
        with pytest.raises(DistlmError, match="a masked language model reads both sides"):
            ask()
