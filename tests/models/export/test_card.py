"""The model card: figures and settings of the run's own records, those of this checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.knn import in_stage
from support.store import ready_run

from distlm.config.load import dump_config
from distlm.errors import DistlmError
from distlm.models.export.card import run_card
from distlm.runtime.rundir import RunDir
from distlm.training.evaluate import run_evaluate
from distlm.training.records import LmResults


@pytest.fixture
def run(tmp_path: Path) -> tuple[Any, RunDir, Path]:
    config = ready_run(tmp_path, extra=["knn.splits=[valid]"])
    found = RunDir.of(config)
    (found.root / "configs").mkdir(exist_ok=True)
    (found.root / "configs" / "train.yaml").write_text(dump_config(config))
    return config, found, found.model_checkpoint(config)


def card(run: tuple[Any, RunDir, Path], folder: Path) -> str:
    config, _, checkpoint = run
    folder.mkdir()
    run_card(config, checkpoint, "What it is.").write(folder, "folder", "AutoModelForCausalLM", True)
    return (folder / "README.md").read_text("utf-8")


def test_it_has_the_results_of_this_checkpoint_alone(run: tuple[Any, RunDir, Path], tmp_path: Path) -> None:
    config, found, _ = run
    assert "The run has no results of this checkpoint." in card(run, tmp_path / "before")
    in_stage("knn", config, run_evaluate)
    results = LmResults.read(found.root / "lm.json")
    text = card(run, tmp_path / "with")
    assert f"{results.splits['valid'].perplexity:.2f}" in text and results.context_rule in text
    results.model.fingerprint = "of another checkpoint"
    results.write(found.root / "lm.json")
    assert "The run has no results of this checkpoint." in card(run, tmp_path / "other")
    (found.root / "lm.json").write_text("{")
    with pytest.raises(DistlmError, match=r"lm\.json: not valid JSON"):
        run_card(config, run[2], "")


def test_it_says_how_it_was_trained_and_no_paths(run: tuple[Any, RunDir, Path], tmp_path: Path) -> None:
    path = run[1].root / "configs" / "train.yaml"
    path.write_text(path.read_text().replace("init_from: ''", "init_from: /home/somebody/secret/run"))
    text = card(run, tmp_path / "card")
    assert "Trained for 12 updates" in text and "secret" not in text and str(tmp_path) not in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["model"]["width"] == 32 and settings["train"]["lr"] == 0.002
    assert settings["train"]["init_from"] == "run" and "deepspeed" not in settings["train"]


def test_its_head_is_one_of_the_hub_with_the_licence_left_out(run: tuple[Any, RunDir, Path], tmp_path: Path) -> None:
    head = yaml.safe_load(card(run, tmp_path / "card").split("---\n")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distlm"]}
