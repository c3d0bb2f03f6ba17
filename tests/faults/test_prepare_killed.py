"""A prepare that is killed leaves nothing that looks whole, and the same command then gives the usual bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, write_text
from support.deadline import DEADLINE_S

from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError

# Kills itself with SIGKILL when the chunk of the given number is about to be written.
SCRIPT = """
import os, signal, sys
from distlm.config import DataConfig, RunConfig
from distlm.data import prepare
from distlm.runtime.stage import open_stage
prepare.CHUNK = 200
die_at, run_dir, text = int(sys.argv[1]), sys.argv[2], sys.argv[3]
encode = prepare.encode_lines
served = 0
def dying(lines, dictionary):
    global served
    for chunk in encode(lines, dictionary):
        served += 1
        if served == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
prepare.encode_lines = dying
config = RunConfig(run_dir=run_dir, data=DataConfig(source="folder", text_dir=text))
with open_stage("prepare", config) as stage:
    prepare.run_prepare(stage)
"""


def run(die_at: int, run_dir: Path, text: Path) -> int:
    command = [sys.executable, "-c", SCRIPT, str(die_at), str(run_dir), str(text)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=DEADLINE_S).returncode


@pytest.mark.parametrize("die_at", [2, 26])
def test_killed_in_a_split_then_run_again(tmp_path: Path, die_at: int) -> None:
    text = write_text(tmp_path / "text")
    tokens = tmp_path / "run" / "tokens"
    assert run(die_at, tmp_path / "run", text) == -9
    assert not (tokens / "meta.json").exists()
    assert list(tokens.glob(".*.tmp")), "killed while a split was being written"
    with pytest.raises(DistlmError, match="no finished token files"):
        TokenFiles.open(tokens)
    assert run(0, tmp_path / "run", text) == 0
    assert not list(tokens.glob(".*.tmp"))
    assert run(0, tmp_path / "unharmed", text) == 0
    for name in ("train.bin", "valid.bin", "test.bin", "dict.txt", "meta.json"):
        assert (tokens / name).read_bytes() == (tmp_path / "unharmed" / "tokens" / name).read_bytes()


def test_two_runs_that_share_a_folder_prepare_it_once(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", train_lines=2000)
    command = [sys.executable, "-m", "distlm", "data", "prepare", "demo", "data.source=folder", f"data.text_dir={text}"]
    runs = [
        subprocess.Popen(
            [*command, f"data.tokens_dir={tmp_path / 'shared'}", f"run_dir={tmp_path / f'run{i}'}"],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for i in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=DEADLINE_S)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0, 0], said
    assert sum("nothing to do" in text for text in said) == 2
    TokenFiles.open(tmp_path / "shared")
