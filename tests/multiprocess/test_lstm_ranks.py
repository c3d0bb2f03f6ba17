"""1, 2 and 4 ranks train one AWD-LSTM: the same curve over SGD, NT-ASGD and fine-tuning, on every ZeRO stage that is
supported, cut into micro-batches or not; and a run goes on on another number of ranks."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.lstm import lstm_settings
from support.shared import made_once
from support.train import curve, newest, relative, tiny_tokens, train_all

pytestmark = pytest.mark.multiprocess

# A rate of 20 amplifies the last bit: measured 1.3e-6 over the first 100 updates and 9e-5 after 290 on single updates,
# 1.2e-6 on validation losses and 9e-6 on averages.
EARLY, LATE, VALID, AVERAGES = 1e-5, 1e-3, 1e-4, 1e-3

PIECES = ["awd.micro_batch=2"]
SHORT = ["awd.finetune_epochs=1"]
JOBS: dict[int, dict[str, list[str]]] = {
    1: {"zero0-1": ["train.deepspeed=zero0"], "1-to-2": ["train.max_updates_this_run=215"]},
    2: {"zero0-2": ["train.deepspeed=zero0"], "1-to-2": ["train.deepspeed=zero1"],
        "zero2-2": ["train.deepspeed=zero2", *PIECES], "2-to-1": ["train.max_updates_this_run=215"]},
    4: {"zero0-4": ["train.deepspeed=zero0"]},
}  # fmt: skip
OTHERS = ["zero0-2", "zero2-2", "zero0-4", "1-to-2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs in JOBS; 2-to-1 is stopped in the middle of an epoch."""

    def make(folder: Path) -> None:
        tokens = tiny_tokens(folder)
        for ranks, jobs in JOBS.items():
            named = [lstm_settings(tokens, folder / name, *SHORT, *extra) for name, extra in jobs.items()]
            train_all(ranks, folder, named)

    return made_once(tmp_path_factory, "lstm-ranks", make)


def phases(run: Path) -> dict[int, float]:
    return curve(run, "train/phase")


def test_the_run_covers_all_phases(runs: Path) -> None:
    found = list(phases(runs / "zero0-1").values())
    assert len(curve(runs / "zero0-1")) > 200
    assert found[0] == "sgd" and "asgd" in found and found[-1] == "finetune"


@pytest.mark.parametrize("name", OTHERS)
def test_every_number_of_ranks_trains_the_same(runs: Path, name: str) -> None:
    one, other = runs / "zero0-1", runs / name
    assert curve(one, "train/data_fingerprint") == curve(other, "train/data_fingerprint")
    assert curve(one, "train/lr") == curve(other, "train/lr")
    assert phases(one) == phases(other), "the same epochs average"
    first, second = curve(one), curve(other)
    early = range(1, 101)
    assert relative({u: first[u] for u in early}, {u: second[u] for u in early}) < EARLY
    assert relative(first, second) < LATE
    assert relative(curve(one, "valid/loss"), curve(other, "valid/loss")) < VALID
    weights, others = (load_file(newest(run) / "model.safetensors") for run in (one, other))
    for key, value in weights.items():
        assert float((value - others[key]).abs().max()) < AVERAGES * float(value.abs().max()), key


def test_hidden_states_are_of_columns_not_of_ranks(runs: Path) -> None:
    """Stopped on two ranks in the middle of an epoch, then continued on one."""
    hidden = load_file(newest(runs / "2-to-1") / "hidden.safetensors")
    assert hidden["h.0"].shape == (1, 8, 16)
    train_all(1, runs, [lstm_settings(runs / "tokens", runs / "2-to-1", *SHORT, "train.deepspeed=zero1")])
    test_every_number_of_ranks_trains_the_same(runs, "2-to-1")
