"""A checkpoint of any ZeRO stage, offloaded or not, goes on under any other, on other ranks, too."""

import shutil
from pathlib import Path

import pytest
from support.train import curve, relative, settings, tiny_tokens, train_all, weight_difference

pytestmark = pytest.mark.multiprocess

NAMES = [*(f"zero{stage}" for stage in range(4)), *(f"zero{stage}-offload" for stage in (1, 2, 3))]
# Each is left once and gone on under once.
RING = ["zero0", "zero3-offload", "zero1", "zero1-offload", "zero2", "zero2-offload", "zero3"]
SIX = ["train.updates=6", "train.valid_every=0", "train.save_every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run `whole` of six updates, and NAME of each, stopped after four on two ranks."""
    made = tmp_path_factory.mktemp("stages")
    tokens = tiny_tokens(made)
    cut = [
        settings(tokens, made / name, *SIX, f"train.deepspeed={name}", "train.max_updates_this_run=4") for name in NAMES
    ]
    train_all(2, made, [settings(tokens, made / "whole", *SIX, "train.deepspeed=zero0"), *cut])
    return made


def goes_on(folder: Path, pairs: list[tuple[str, str]], ranks: int) -> None:
    jobs = []
    for there, here in pairs:
        run = folder / f"{there}-{here}-{ranks}"
        shutil.copytree(folder / there, run)
        jobs.append(settings(folder / "tokens", run, *SIX, f"train.deepspeed={here}"))
    train_all(ranks, folder, jobs)
    whole = curve(folder / "whole")
    for there, here in pairs:
        run = folder / f"{there}-{here}-{ranks}"
        assert relative(whole, curve(run)) < 1e-6, run
        assert weight_difference(folder / "whole", run) < 1e-5, run


def test_each_goes_on_under_another(folder: Path) -> None:
    """Not slow, though it may take half a minute: nothing cheaper sees what a stage's checkpoint lacks."""
    pairs = list(zip(RING, [*RING[1:], RING[0]], strict=True))
    goes_on(folder, pairs, 2)
    goes_on(folder, pairs[:2], 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_goes_on_under_any(folder: Path, ranks: int) -> None:
    goes_on(folder, [(there, here) for there in NAMES for here in NAMES], ranks)
