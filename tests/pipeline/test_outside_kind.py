"""A kind of model that a package outside distlm brings by an entry point goes through every stage, on two ranks."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support import ENVIRONMENT, TINY, distlm, write_text

from distlm.models.registry import GROUP, kind_names

OUTSIDE = Path(__file__).parents[1] / "support" / "outside"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The package as pip would lay it down, in a folder of its own; the environment that finds it."""
    site = tmp_path / "site"
    shutil.copytree(OUTSIDE, site, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "unigram_lm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unigram-lm\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nunigram = unigram_lm:KIND\n", "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(site), ENVIRONMENT["PYTHONPATH"]])}


def test_it_is_trained_searched_and_evaluated_like_any_other(tmp_path: Path, installed: dict[str, str]) -> None:
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    recipe = tmp_path / "unigram.yaml"
    recipe.write_text("name: unigram\nmodel: {kind: unigram}\nunigram: {width: 16}\n", "utf-8")
    words = [word for word in TINY if not word.startswith(("model.", "index.factory"))]
    words += ["train.tap=word", "datastore.tap=word", "index.factory=IVF8,Flat", "data.source=folder"]
    words += [f"data.text_dir={text}", f"run_dir={run}", "train.lr=0.1", "train.updates=40", "launch.ranks=2"]
    done = distlm("run", str(recipe), *words, ranks=1, check=True, **installed)
    assert "-n 2 distlm train" in done.stderr and "-n 2 distlm datastore write" in done.stderr
    results = json.loads((run / "results.json").read_text("utf-8"))
    lm, both = (results["splits"]["test"][name]["perplexity"] for name in ("lm", "knn"))
    assert 10 < lm < 60, "better than uniform over 64 words"
    assert both <= lm * 1.05, "mixed with what it stored it is no worse"
    assert (run / "report.html").exists()
    config = (run / "config.yaml").read_text("utf-8")
    assert "unigram:" in config and "plm:" not in config

    refused = distlm("train", str(recipe), *words, "model.layers=3", ranks=1, check=False, **installed)
    assert refused.returncode == 2
    assert "model.layers is not read by model.kind=unigram, only by transformer_lm" in refused.stderr
    helped = distlm("train", str(recipe), *words, "--help", ranks=1, check=True, **installed)
    assert "unigram.width" in helped.stdout and "model.layers" not in helped.stdout


def test_without_the_package_its_runs_are_refused_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "unigram.yaml"
    recipe.write_text("model: {kind: unigram}\n", "utf-8")
    assert "unigram" not in kind_names()
    refused = distlm("train", str(recipe), check=False)
    assert refused.returncode == 2
    assert "model.kind='unigram': no such kind of model; choose one of transformer_lm" in refused.stderr
