"""A transformer with memory, killed while a save writes its memory, and started again: the same numbers."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from support import ENVIRONMENT, distlm, mpirun_command
from support.deadline import DEADLINE_S, until
from support.plm import memory_of
from support.train import newest, same_end, settings, tiny_tokens

pytestmark = pytest.mark.multiprocess

MEMORY = ["memory.kind=pkm", "memory.positions=[1,2]", "memory.shared=true", "memory.gated=true", "memory.sub_keys=16",
          "memory.heads=2", "memory.k=4", "memory.key_width=8", "train.updates=30", "train.save_every=2",
          "train.valid_every=0"]  # fmt: skip


def test_killed_in_a_save_and_started_again(tmp_path: Path) -> None:
    tokens = tiny_tokens(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    distlm("train", "demo", *settings(tokens, whole, *MEMORY))
    words = settings(tokens, run, *MEMORY)
    process = subprocess.Popen(
        mpirun_command(1, ["-m", "distlm", "train", "demo", *words]), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # From the third save on, in which there is something to go on from.
    names = [f".step-{update:08d}.tmp/memory-*" for update in range(6, 29, 2)]

    def saving() -> bool:
        return any(True for name in names for _ in (run / "checkpoints").glob(name))

    until(saving, "a save", lambda: process.poll() is None, pause=0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    assert newest(run).name < newest(whole).name
    done = distlm("train", "demo", *words)
    assert "continuing from" in done.stderr and same_end(whole, run)
    one, other = memory_of(whole, 1), memory_of(run, 1)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(name.startswith("extra.2/") for name in one)
