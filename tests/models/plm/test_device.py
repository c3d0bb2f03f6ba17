"""Masked language models with memories by the commands themselves on a GPU, beside the same on the processor.

Each training is a process of its own: DeepSpeed takes one device for all of a process.
"""

from pathlib import Path

import pytest
import torch
from support import distlm, mpirun
from support.plm import memory_of, plm_settings, tiny_shards
from support.sim.devices import NEEDS_DEVICE, ON_PROCESSOR
from support.train import curve, relative

pytestmark = NEEDS_DEVICE
RESM = ["memory.kind=resm", "train.updates=12", "train.lr=0.01"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("plm"))


def train(shards: Path, run: Path, *overrides: str, check: bool = True, **environment: str) -> None:
    mpirun(
        1, ["-m", "distlm", "train", "plm-base", *plm_settings(shards, run, *RESM, *overrides)], check, **environment
    )


@pytest.mark.parametrize("extra", [[], ["memory.stale=catch_up", "memory.optimizer=adam"]], ids=["lazy", "catch_up"])
def test_a_gpu_trains_as_a_processor_does(shards: Path, tmp_path: Path, extra: list[str]) -> None:
    """Rows, masks and dropout are the same numbers on both; on the GPU training stops once and is resumed.

    fp32, TF32 off: the first loss differs by rounding; later ones by a query's last slots, too, where scores are close.
    """
    train(shards, tmp_path / "processor", *extra, **ON_PROCESSOR)
    train(shards, tmp_path / "gpu", *extra, "train.max_updates_this_run=7", check=False)
    train(shards, tmp_path / "gpu", *extra)
    wanted, found = curve(tmp_path / "processor"), curve(tmp_path / "gpu")
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    assert relative(wanted, found) < 1e-2
    assert relative(*(curve(tmp_path / name, "valid/loss") for name in ("processor", "gpu"))) < 1e-2
    assert curve(tmp_path / "processor", "train/data_fingerprint") == curve(tmp_path / "gpu", "train/data_fingerprint")


def test_fp16(shards: Path, tmp_path: Path) -> None:
    """Values, moments and statistics stay fp32 and finite, however many updates the loss scale skips at first."""
    train(shards, tmp_path / "fp32")
    train(shards, tmp_path / "fp16", "train.precision=fp16")
    wanted, found = curve(tmp_path / "fp32"), curve(tmp_path / "fp16")
    assert found.keys() == wanted.keys()
    assert found[1] == pytest.approx(wanted[1], rel=1e-2)
    assert found[12] < found[1]
    for layer in (1, 3):
        for name, tensor in memory_of(tmp_path / "fp16", layer).items():
            assert tensor.dtype != torch.float16 and tensor.double().isfinite().all(), name


def test_bench() -> None:
    tiny = [
        "shards.vocabulary_size=60", "plm.layers=2", "plm.width=12", "plm.heads=3", "plm.ffn_width=24",
        "plm.max_positions=16", "memory.positions=[1]", "memory.sub_keys=4", "memory.k=2", "memory.key_width=8",
    ]  # fmt: skip
    done = distlm("memory", "bench", "plm-small-resm", *tiny, "--tokens", "8", "--turns", "2", "--train-rows", "2")
    assert "base +ResM" in done.stdout
