"""Helpers of the masked language model's tests: tiny shards, a tiny memory, what a checkpoint holds of it."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, cat

from distlm.data.shards.stage import run_shard
from distlm.models.plm.config import PlmRun
from distlm.runtime.stage import open_stage
from support import TINY, write_text
from support.config import config_of, run_of
from support.kinds import readable
from support.train import newest

PLM = [
    "model.kind=plm", "shards.row_tokens=24", "shards.vocabulary_size=120", "shards.chunk_rows=16",
    "shards.shard_text=6000", "plm.layers=3", "plm.width=32", "plm.heads=2", "plm.ffn_width=48",
    "plm.max_positions=24", "memory.positions=[1,3]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4",
    "memory.key_width=8", "launch.ranks=2", "train.blocks_per_update=16", "train.micro_blocks=8", "train.save_every=0",
    "train.valid_every=0",
]  # fmt: skip
"""Overrides over those of support.TINY: two micro-batches an update."""


def tiny_shards(folder: Path) -> Path:
    """Shards of about 350 rows of 24 tokens."""
    text, shards = write_text(folder / "text"), folder / "shards"
    words = [*TINY, *PLM, f"shards.text_dir={text}", f"shards.folder={shards}", f"run_dir={folder / 'prepare'}"]
    with open_stage("shard", config_of("plm-base", readable(words))) as stage:
        run_shard(stage)
    return shards


def plm_settings(shards: Path, run: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny masked language model; dropout and memory's dropouts are on."""
    dropout = ["plm.dropout=0.1", "plm.attention_dropout=0.1", "memory.value_dropout=0.1", "memory.query_dropout=0.1"]
    text = f"shards.text_dir={shards.parent / 'text'}"
    return [*readable([*TINY, *PLM, *dropout]), text, f"shards.folder={shards}", f"run_dir={run}", *overrides]


def plm_config(shards: Path, run: Path, *overrides: str) -> PlmRun:
    """The same as a configuration."""
    return run_of(PlmRun, config_of("plm-base", plm_settings(shards, run, *overrides)))


def memory_of(run: Path, layer: int) -> dict[str, Tensor]:
    """What the last checkpoint holds of a memory, all columns put together: name → tensor."""
    files = sorted(newest(run).glob(f"memory-{layer:02d}-*.safetensors"))
    assert files, f"no memory of layer {layer} in {newest(run)}"
    parts = [load_file(file) for file in files]
    wide = {name for name, tensor in parts[0].items() if tensor.dim() == 2}
    return {
        name: cat([part[name] for part in parts], dim=1) if name in wide else tensor
        for name, tensor in parts[0].items()
    }
