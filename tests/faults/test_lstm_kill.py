"""An AWD-LSTM killed in the middle of an epoch after the switch to NT-ASGD ends in the bytes of an undisturbed run."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support import ENVIRONMENT, distlm, mpirun_command
from support.deadline import DEADLINE_S, until
from support.lstm import lstm_settings
from support.train import curve, same_end, tiny_tokens, train_all

from distlm.runtime.files import read_json

pytestmark = pytest.mark.multiprocess

OFTEN = ["train.save_every=7"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_after_the_switch_ends_in_the_same_bytes(tmp_path: Path, ranks: int) -> None:
    tokens = tiny_tokens(tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_all(ranks, tmp_path, [lstm_settings(tokens, whole, *OFTEN)])
    switch = next(step for step, phase in curve(whole, "train/phase").items() if phase == "asgd")
    ends = [0, *curve(whole, "train/phase")]
    middle = (ends[ends.index(switch) - 1] + switch) // 2
    overrides = lstm_settings(tokens, cut, *OFTEN)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            mpirun_command(ranks, ["-m", "distlm", "train", "awd-lstm-small", *overrides]),
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
        )  # fmt: skip
    metrics = cut / "metrics.jsonl"
    until(
        lambda: metrics.exists() and f'"step": {middle},' in metrics.read_text("utf-8"),
        lambda: f"update {middle}\n{(tmp_path / 'log').read_text('utf-8')}",
        lambda: process.poll() is None,
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(DEADLINE_S)
    kept = sorted((cut / "checkpoints").glob("step-*"))[-1]
    state = read_json(kept / "state.json", "")
    assert state["phase"] == "asgd" and (kept / "hidden.safetensors").exists(), "in the middle of the epoch"
    done = distlm("train", "awd-lstm-small", *overrides, ranks=ranks)
    assert "continuing from" in done.stderr
    assert same_end(whole, cut)
    for name in ("train/loss", "valid/loss", "train/data_fingerprint"):
        assert curve(whole, name) == curve(cut, name)
