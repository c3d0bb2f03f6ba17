"""Small runs by the `distlm` command itself: several commands in one process, on the device or on the processor."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from shared.text import write_text

from gpu.devices import ON_PROCESSOR

STOPPED = 75
Commands = Sequence[Sequence[str]]
SMALL = [
    "data.source=folder", "data.max_words=0", "model.layers=2", "model.width=64", "model.heads=2",
    "model.ffn_width=128", "model.cutoffs=[200,600]", "model.max_positions=64", "model.dropout=0",
    "model.attention_dropout=0",
    "model.activation_dropout=0", "model.softmax_dropout=0", "train.tokens_per_sample=64", "train.blocks_per_update=4",
    "train.micro_blocks=2", "train.updates=20", "train.optimizer=adam", "train.schedule=constant", "train.lr=0.002",
    "train.warmup_updates=2", "train.log_every=1", "train.valid_every=0", "train.save_every=0",
    "datastore.context_window=32", "datastore.block=32", "datastore.rows_per_shard=8192", "index.factory=IVF16,Flat",
    "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]",
    "launch.ranks=1", "launch.threads=1",
]  # fmt: skip
"""A transformer for 20 updates of 256 tokens; without dropout, for which a device has a generator of its own."""
MEMORY = [
    "memory.kind=pkm", "memory.positions=[1]", "memory.sub_keys=16", "memory.heads=2", "memory.k=4",
    "memory.key_width=8", "memory.value_dropout=0", "memory.query_dropout=0",
]  # fmt: skip


def text_of(folder: Path) -> list[str]:
    """A made-up text, and the settings that name it and its token files."""
    text = write_text(folder / "text", sentences=400)
    return [f"data.text_dir={text}", f"data.tokens_dir={folder / 'tokens'}"]


def start(
    commands: Commands, folder: Path, on_processor: bool = False, launcher: Sequence[str] = (sys.executable, "-m")
) -> "subprocess.Popen[bytes]":
    """`distlm` with the words of each, in one process: DeepSpeed takes one device for all of a process.

    launcher: what starts a module, on several ranks by torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "commands.json"
    listing.write_text(json.dumps([list(words) for words in commands]), "utf-8")
    # cuDNN rounds fp32 to TF32 unless it is told not to, and then nothing could be compared.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    if on_processor:
        environment |= ON_PROCESSOR
    return subprocess.Popen([*launcher, "gpu.commands", str(listing)], env=environment)


def run(commands: Commands, folder: Path, on_processor: bool = False) -> None:
    """Start them and wait. Raises RuntimeError where one failed; it has said why."""
    finish(start(commands, folder, on_processor))


def finish(*children: "subprocess.Popen[bytes]") -> None:
    """Wait for all. Raises RuntimeError where one failed."""
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError(f"exit {next(code for code in codes if code)} of commands of distlm, which have said why")


def curve(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Update → value, from metrics.jsonl; lines about no update are left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if "step" in line and line.get(name) is not None}


def relative(one: Path, other: Path, name: str = "train/loss") -> float:
    """Largest relative difference of two runs' curves; inf where they are not of the same updates."""
    wanted, found = curve(one, name), curve(other, name)
    if not wanted or wanted.keys() != found.keys():
        return float("inf")
    return max(abs(wanted[step] - found[step]) / abs(wanted[step]) for step in wanted)


def main() -> None:
    """`python -m gpu.commands FILE`."""
    from distlm.cli import main as distlm

    for words in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        # What a command prints goes to the log in the order in which it was done.
        with redirect_stdout(sys.stderr):
            try:
                distlm(words)
            except SystemExit as end:
                if end.code not in (None, 0, STOPPED):
                    raise


if __name__ == "__main__":
    main()
