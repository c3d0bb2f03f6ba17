"""`distlm finetune --evaluate-only`: the same figures to the bit, predictions, and what cannot be evaluated."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import distlm
from support.finetune import (
    evaluate,
    finetune_config,
    hugging_face,
    pretrained,
    run,
    settings,
    write_sst2,
    write_test,
)  # fmt: skip
from support.records import alter

from distlm.errors import DistlmError
from distlm.finetune.finished.evaluate import plan_evaluate_finetuned

KEPT = ("finetune.keep_models=true", "finetune.seeds=[1,2]", "finetune.epochs=1", "finetune.memory_lr=0.05")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, tuple[str, ...]]:
    """A run with kept models of two seeds, whose memory has slots that are behind; its data; its settings."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_sst2(folder / "glue")
    given = (f"finetune.checkpoint={pretrained(folder / 'pretrained', stale='catch_up', lr=0.01)}", *KEPT)
    run(finetune_config(folder / "run", data, *given))
    return folder / "run", data, given


@pytest.fixture
def copied(finished: tuple[Path, Path, tuple[str, ...]], tmp_path: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """A copy that a test may change; its data have a test set."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(finished[1], tmp_path / "glue")
    write_test(tmp_path / "glue")
    return tmp_path / "run", tmp_path / "glue", finished[2]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_gives_the_figures_of_the_training_to_the_bit(
    copied: tuple[Path, Path, tuple[str, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    place, data, given = copied
    folder = place / "finetune" / "SST-2"
    # As a version without predictions left it; of the other seed they are there.
    before = files(folder / "seed-1" / "predictions")
    shutil.rmtree(folder / "seed-1" / "predictions")
    weights = files(folder / "seed-1" / "checkpoints")
    # Neither train nor what the fine-tuning began with is needed.
    (data / "SST-2" / "train.tsv").unlink()
    config = finetune_config(place, data, *given)
    plan = plan_evaluate_finetuned(config, 1)
    assert "2 fine-tuned models, 40 rows of dev and 13 of test" in plan.work and not plan.disk_bytes
    summary = evaluate(config)
    said = capfd.readouterr().err
    assert said.count("the same scores as in result.json") == 2
    for seed in ("1", "2"):
        result, found = (read(folder / f"seed-{seed}" / name) for name in ("result.json", "evaluation.json"))
        assert found["scores"] == result["last"] and found["loss"] == result["epochs"][-1]["loss"]
        assert found["memory"] == {layer: use["after"] for layer, use in result["memory"].items()}
        assert found["rows"] == {"dev": 40, "test": 13} and found["majority"] == {"accuracy": 0.55}
        test = (folder / f"seed-{seed}" / "predictions" / "test" / "SST-2.tsv").read_text("utf-8")
        assert len(test.splitlines()) == 14
    assert summary["accuracy"] == read(folder / "results.json")["median"]["accuracy"] and summary["seeds"] == "1,2"
    again = files(folder / "seed-1" / "predictions")
    assert {name: again[name] for name in before} == before
    assert files(folder / "seed-1" / "checkpoints") == weights
    # A second time there is nothing to write.
    evaluate(config)
    assert files(folder / "seed-1" / "predictions") == again and "predictions for" not in capfd.readouterr().err


def test_a_model_from_elsewhere_has_a_place_of_its_own(
    copied: tuple[Path, Path, tuple[str, ...]], tmp_path: Path
) -> None:
    place, data, _ = copied
    seed = place / "finetune" / "SST-2" / "seed-2"
    evaluate(finetune_config(tmp_path / "other", data, f"finetune.checkpoint={seed}", "finetune.name=theirs"))
    folder = tmp_path / "other" / "finetune" / "theirs"
    found = read(folder / "evaluation.json")
    assert found["scores"] == read(seed / "result.json")["last"] and found["checkpoint"] == str(seed)
    assert sorted(path.name for path in (folder / "predictions").iterdir()) == ["dev", "test"]
    for name in ("SST-2.tsv", "SST-2.logits.npy"):
        assert (folder / "predictions" / "dev" / name).read_bytes() == (
            seed / "predictions" / "dev" / name
        ).read_bytes()
    # Another dev set under that name would mix the two.
    other = write_sst2(tmp_path / "other-glue", 8, 20)
    with pytest.raises(DistlmError, match=r"evaluation\.json: of another evaluation \(data .*finetune\.name="):
        evaluate(finetune_config(tmp_path / "other", other, f"finetune.checkpoint={seed}", "finetune.name=theirs"))


def test_what_cannot_be_evaluated_is_named(copied: tuple[Path, Path, tuple[str, ...]], tmp_path: Path) -> None:
    place, data, given = copied
    seed = place / "finetune" / "SST-2" / "seed-1"

    def refused(message: str, *more: str, run_dir: Path = place) -> None:
        with pytest.raises(DistlmError, match=message):
            evaluate(finetune_config(run_dir, data, *given, *more))

    refused(r"finetune\.lr: 0\.003 there, 0\.01 now.*finetune\.checkpoint=\S+SST-2/seed-N", "finetune.lr=0.01")
    refused(r"seed-7: not finished; name the seeds that are there", "finetune.seeds=[7]")
    refused(r"finetune/new: no fine-tuning there", "finetune.name=new", "finetune.checkpoint=")
    refused(r"finetune\.checkpoint=\S+: not a fine-tuned model; name the folder of a seed", run_dir=tmp_path / "new")
    bare = f"finetune.checkpoint={hugging_face(tmp_path / 'hf')}"
    refused(r"not a fine-tuned model", bare, run_dir=tmp_path / "new")
    refused(r"not a fine-tuned model", f"finetune.checkpoint={tmp_path / 'nowhere'}", run_dir=tmp_path / "new")
    (data / "RTE").mkdir()
    (data / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", "utf-8")
    refused(
        r"fine-tuned on SST-2 \(2 outputs\), not on finetune\.task=RTE \(2\); set finetune\.task",
        "finetune.task=RTE", f"finetune.checkpoint={seed}", run_dir=tmp_path / "new",
    )  # fmt: skip
    alter(seed / "predictions" / "dev" / "manifest.json", model="x")
    refused(r"predictions/dev: predictions of another fine-tuning \(model x there.*remove that folder")
    assert not (seed / "evaluation.json").exists()
    # As told.
    shutil.rmtree(seed / "predictions" / "dev")
    evaluate(finetune_config(place, data, *given))
    shutil.rmtree(seed / "checkpoints")
    refused(r"seed-1: its model was not kept; .* finetune\.keep_models=true under a finetune\.name= of its own")


@pytest.mark.multiprocess
def test_two_ranks_tell_what_one_tells(copied: tuple[Path, Path, tuple[str, ...]], tmp_path: Path) -> None:
    place, data, given = copied
    words = ["finetune", "plm-base", *settings(place, data, *given), "finetune.name=SST-2", "--evaluate-only"]
    shutil.copytree(place, tmp_path / "run2")
    one = distlm(*words)
    distlm(*words, f"run_dir={tmp_path / 'run2'}", "memory.columns=0", ranks=2)
    assert "finetune: task=SST-2 accuracy=" in one.stdout
    for seed in ("1", "2"):
        alone, both = (folder / "finetune" / "SST-2" / f"seed-{seed}" for folder in (place, tmp_path / "run2"))
        assert read(both / "evaluation.json")["ranks"] == 2
        assert read(both / "evaluation.json")["scores"] == read(alone / "evaluation.json")["scores"]
        first, second = (files(folder / "predictions" / "test") for folder in (alone, both))
        assert first["SST-2.tsv"] == second["SST-2.tsv"] and first["SST-2.ids.npy"] == second["SST-2.ids.npy"]
        numbers = [np.load(folder / "predictions" / "test" / "SST-2.logits.npy") for folder in (alone, both)]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=0, atol=1e-5)
