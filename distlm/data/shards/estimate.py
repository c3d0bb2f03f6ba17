"""What making the shards will need: disk, memory, time."""

from math import ceil

from distlm.config.schema import RunConfig
from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.files import id_dtype
from distlm.data.shards.settings import finished_shards
from distlm.data.text.choice import choice_of_shards
from distlm.data.text.folder import folder_sources
from distlm.data.text.sample import text_bytes
from distlm.runtime.files import format_bytes
from distlm.runtime.plan import StagePlan
from distlm.runtime.rundir import RunDir

# English with BERT's vocabulary has 4.4 bytes per token; small vocabularies have shorter pieces.
_BYTES_PER_TOKEN, _MARGIN = 4.2, 1.1
# One process, unpacking included; scanning is unpacking and hashing.
_TEXT_PER_SECOND, _SCAN_PER_SECOND, _TRAINING_PER_SECOND = 7e6, 40e6, 1.5e6
_DEMO_TEXT = 3_000_000
# Python with webdataset (which loads torch), the memory of words, a chunk of text and rows; then what training counts.
_BASE_MEMORY, _TRAINING_MEMORY = 600_000_000, 400_000_000


def plan_shard(config: RunConfig, ranks: int = 1) -> StagePlan:
    """Needs of the stage, estimated from file sizes and the start of the largest compressed file."""
    shards, folder = config.section(ShardsConfig), RunDir.of(config).shards(config)
    if finished_shards(folder, shards) is not None:
        return StagePlan("data shard", f"{folder}: complete, nothing to do", 0, _BASE_MEMORY, 0.0)
    memory = _BASE_MEMORY + (0 if shards.vocabulary else _TRAINING_MEMORY)
    if shards.source == "hub":
        notes = ["the size of a hub data set is known only when it is loaded; disk is checked then"]
        return StagePlan("data shard", f"text of {shards.hub_name} to {folder}", 0, memory, None, notes, known=False)
    sizes = _text_bytes(shards)
    text = sum(sizes.values())
    tokens = text / _BYTES_PER_TOKEN
    units = sum(max(1, ceil(size / shards.shard_text)) for size in sizes.values())
    notes = [f"disk is for {_BYTES_PER_TOKEN} bytes of text per token"]
    if units < ranks:
        notes.append(f"about {units} shards: {ranks - units} of {ranks} ranks will have nothing to do")
    seconds = 5 + text / _SCAN_PER_SECOND + text / (_TEXT_PER_SECOND * min(ranks, units))
    if not shards.vocabulary:
        learned = min(sizes["train"], shards.vocabulary_text or sizes["train"])
        seconds += learned / _TRAINING_PER_SECOND
        notes.append(f"a vocabulary is trained on {format_bytes(learned)} of text, on one rank")
    # Without a file the size of a trained vocabulary counts, which both fit their type by the same bound.
    itemsize = id_dtype(shards.vocabulary_size if not shards.vocabulary else 30522).itemsize
    return StagePlan(
        "data shard",
        f"about {format_bytes(text)} of text to {units} shards in {folder}, rows of {shards.row_tokens} tokens",
        disk_bytes=int(tokens * _MARGIN) * itemsize,
        memory_bytes=memory,
        seconds=seconds,
        notes=notes,
    )


def _text_bytes(shards: ShardsConfig) -> dict[str, float]:
    """Bytes of text of each split."""
    if shards.source == "demo":
        return {split: _DEMO_TEXT * (0.9 if split == "train" else 0.05) for split in shards.splits}
    choice = choice_of_shards(shards)
    sizes = {split: text_bytes(files) for split, files in folder_sources(choice).items()}
    kept = 1 - sum(choice.shares.values())
    return {
        split: sizes[choice.origin(split)] * choice.shares.get(split, kept if split == "train" else 1)
        for split in shards.splits
    }
