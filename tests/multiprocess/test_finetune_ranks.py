"""Fine-tuning on two ranks gives what one rank gives, and goes on from one rank's checkpoint: ZeRO 1 and 3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import mpirun
from support.finetune import finetune_config, lines, pretrained, run, settings, write_sst2

from distlm.errors import Stopped

pytestmark = pytest.mark.multiprocess
DRIVER = Path(__file__).parents[1] / "support" / "drivers" / "finetune.py"


def losses(seed: Path) -> list[float]:
    return [line["valid/loss"] for line in lines(seed / "metrics.jsonl") if "valid/loss" in line]


def values(seed: Path) -> torch.Tensor:
    """All columns of the second memory's values."""
    files = sorted(next(seed.glob("checkpoints/step-*")).glob("memory-02-*"))
    return torch.cat([load_file(file)["values"] for file in files], 1)


def numbers(memory: dict[str, Any]) -> list[float]:
    """Measures of use before training, layer by layer."""
    found = []
    for layer in memory.values():
        found += [layer["before"][name] for name in ("mu", "top1_mu", "kl_u", "kl_w", "gini")]
        found += [layer["before"]["labels"]["1|0"][name] for name in ("kl", "iou")]
    return found


def test_two_ranks_are_one_rank(tmp_path: Path) -> None:
    source, data = pretrained(tmp_path / "pretrained"), write_sst2(tmp_path / "glue")
    common = (
        f"finetune.checkpoint={source}", "finetune.micro_rows=8", "finetune.keep_models=true", "finetune.lr=0.003",
        "finetune.length=24",
    )  # fmt: skip
    run(finetune_config(tmp_path / "1", data, *common))
    with pytest.raises(Stopped):
        run(finetune_config(tmp_path / "change", data, *common, "finetune.max_updates_this_run=5"))
    jobs = {
        "2": (), "change": ("finetune.deepspeed=zero3", "memory.columns=1")
    }  # fmt: skip
    listing, results = tmp_path / "jobs.json", tmp_path / "results.json"
    listing.write_text(json.dumps([settings(tmp_path / n, data, *common, *more) for n, more in jobs.items()]), "utf-8")
    mpirun(2, [str(DRIVER), str(listing), str(results)])
    summaries = json.loads(results.read_text("utf-8"))
    seed = Path("finetune") / "SST-2" / "seed-1"
    expected = json.loads((tmp_path / "1" / seed / "result.json").read_text("utf-8"))
    assert expected["ranks"] == 1
    for name in jobs:
        found = json.loads((tmp_path / name / seed / "result.json").read_text("utf-8"))
        assert found["ranks"] == 2 and found["data_fingerprint"] == expected["data_fingerprint"]
        assert found["last"] == expected["last"]
        assert losses(tmp_path / name / seed) == pytest.approx(losses(tmp_path / "1" / seed), rel=1e-3)
        torch.testing.assert_close(values(tmp_path / name / seed), values(tmp_path / "1" / seed), rtol=0, atol=1e-5)
        # Before there is any training the same slots are read.
        assert numbers(found["memory"]) == pytest.approx(numbers(expected["memory"]))
    assert [summary["accuracy"] for summary in summaries] == [expected["last"]["accuracy"]] * 2
