"""When an evaluation counts as one of the present checkpoint, texts and masks: a masked language model's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import TINY, write_text
from support.kinds import readable
from support.plm import PLM, plm_config, tiny_shards
from support.records import unsealed
from support.train import newest

from distlm.config import load_config
from distlm.data.shards.stage import run_shard
from distlm.models.plm.measure.evaluate import run_evaluate_plm
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.training.checkpoint import seal
from distlm.training.finished import evaluated as is_evaluated
from distlm.training.loop import run_train

RESM = ["memory.kind=resm", "train.updates=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("plm"))


@pytest.fixture(scope="module")
def other(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of another text with the same vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    text = write_text(folder / "text", seed=1)
    words = [*TINY, *PLM, f"shards.text_dir={text}", f"shards.folder={folder / 'shards'}", f"run_dir={folder}"]
    words.append(f"shards.vocabulary={shards / 'tokenizer' / 'vocab.txt'}")
    with open_stage("shard", load_config("plm-base", readable(words))) as stage:
        run_shard(stage)
    return folder / "shards"


@pytest.fixture(scope="module")
def evaluated(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; read only."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    with open_stage("train", plm_config(shards, run, *RESM, f"plm.texts=[more={shards}]")) as stage:
        run_train(stage)
        run_evaluate_plm(stage)
    return run


def finished(shards: Path, run: Path, *overrides: str) -> bool:
    return is_evaluated(plm_config(shards, run, *RESM, *overrides), RunDir(run))


def test_what_was_evaluated_is_current(shards: Path, evaluated: Path, tmp_path: Path) -> None:
    assert finished(shards, evaluated, f"plm.texts=[more={shards}]")
    # Fewer texts are among them; where a text lies does not matter, but what is in it.
    assert finished(shards, evaluated)
    shutil.copytree(shards, tmp_path / "copy")
    assert finished(shards, evaluated, f"plm.texts=[more={tmp_path / 'copy'}]")


def test_other_texts_and_masks_are_another_evaluation(shards: Path, other: Path, evaluated: Path) -> None:
    """Under the names of lm.json, too."""
    assert not finished(shards, evaluated, f"plm.texts=[less={shards}]")
    assert not finished(shards, evaluated, f"plm.texts=[more={other}]")
    assert not finished(other, evaluated)
    assert not finished(shards, evaluated, "plm.mask_share=0.2")
    assert not finished(shards, evaluated, "train.seed=2")


def test_texts_that_are_not_there_are_left_to_the_evaluation(shards: Path, evaluated: Path, tmp_path: Path) -> None:
    assert not finished(shards, evaluated, f"plm.texts=[more={tmp_path / 'nowhere'}]")


def test_other_values_are_another_evaluation(shards: Path, evaluated: Path, tmp_path: Path) -> None:
    """Of a checkpoint of the same step with the same weights."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    assert finished(shards, run)
    folder = newest(run)
    (path,) = folder.glob("memory-03-*.safetensors")
    with path.open("rb") as stream:
        facts = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    tensors = load_file(path)
    tensors["values"][0, 0] += 1
    save_file(tensors, path, facts)
    (folder / "complete.json").unlink()
    folder.rename(tmp_path / "changed")
    seal(tmp_path / "changed", folder, 2)
    assert not finished(shards, run)
    with open_stage("train", plm_config(shards, run, *RESM)) as stage:
        run_evaluate_plm(stage)
    assert finished(shards, run)


@pytest.mark.parametrize(
    "older",
    [
        lambda results: results["model"].pop("memory_files"),
        lambda results: results["splits"]["test"].pop("rows_fingerprint"),
        lambda results: results.pop("mask_share"),
    ],
    ids=["values", "rows", "masks"],
)
def test_what_an_older_file_does_not_say_is_another(
    shards: Path, evaluated: Path, tmp_path: Path, older: Callable[[dict[str, Any]], Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    results = unsealed(run / "lm.json")
    older(results)
    write_json(run / "lm.json", results)
    assert not finished(shards, run)


def test_a_start_with_nothing_to_do_removes_what_a_failed_save_left(
    evaluated: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    last = newest(run)
    # The disk failed between the last checkpoint's name and the end of the older ones.
    shutil.copytree(last, last.with_name("step-00000001"))
    with open_stage("train", plm_config(shards, run, *RESM, "train.keep_last=1")) as stage:
        run_train(stage)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [last.name]
