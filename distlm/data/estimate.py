"""What making the token files will need: disk, memory, time."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from distlm.config.schema import DataConfig, RunConfig
from distlm.data.settings import finished_tokens
from distlm.data.subwords import Subwords
from distlm.data.text.choice import choice_of_data
from distlm.data.text.folder import folder_sources
from distlm.data.text.sample import text_bytes, text_start
from distlm.data.tokens import DTYPE, SPLITS, TokenFiles
from distlm.errors import DistlmError
from distlm.runtime.plan import StagePlan
from distlm.runtime.rundir import RunDir

# Tokens per byte are measured on the start of train, and may be this much higher in the rest.
_MARGIN = 1.1
_TOKENS_PER_SECOND = 2e6
_DEMO_TOKENS = {"train": 475_000, "valid": 26_700, "test": 27_300}
# Python with NumPy, plus the longest-lived chunk; then the counter and the dictionary, per distinct word.
_BASE_MEMORY, _MEMORY_PER_TYPE = 160_000_000, 400


@dataclass(frozen=True)
class Expected:
    """How many tokens each split has, or will have."""

    tokens: Mapping[str, int]
    """Split → tokens; empty: not known."""
    words: int
    """Words of the dictionary; 0: not known."""
    exact: bool
    """Counted, in token files that are there."""

    @property
    def note(self) -> tuple[str, ...]:
        """What a plan says of it."""
        if self.exact:
            return ()
        return ("no token files yet: tokens are estimated from the text",) if self.tokens else (
            "known once the token files are there",)  # fmt: skip


def expected_tokens(config: RunConfig) -> Expected:
    """From the token files, else from the text. Nothing is known of a data set of the hub before it is loaded.

    A text that cannot be read counts as no text: `data prepare` reports it.
    """
    try:
        files = TokenFiles.open(RunDir.of(config).tokens(config))
    except DistlmError:
        return Expected(_estimated_or_none(config.data), 0, exact=False)
    tokens = {split: facts.tokens for split, facts in files.meta.splits.items()}
    return Expected(tokens, len(files.dictionary), exact=True)


def plan_prepare(config: RunConfig, ranks: int = 1) -> StagePlan:
    """Needs of the stage, estimated from file sizes and the start of train. One rank works, whatever `ranks` is."""
    data, folder = config.data, RunDir.of(config).tokens(config)
    if finished_tokens(folder, data) is not None:
        return StagePlan("data prepare", f"{folder}: complete, nothing to do", 0, _BASE_MEMORY, 0.0)
    notes = ["one rank works, the others wait"] if ranks > 1 else []
    if data.tokenizer:
        # One that cannot be read is found here, not after a corpus was loaded.
        Subwords.load(data.tokenizer, data.line_end)
    if data.source == "hub":
        notes.append("the size of a hub data set is known only when it is loaded; disk is checked then")
        return StagePlan(
            "data prepare", f"text of {data.hub_name} to {folder}", 0, 2 * _BASE_MEMORY, None, notes, known=False
        )
    text, tokens = "the demo corpus" if data.source == "demo" else data.text_dir, sum(_estimated(data).values())
    return StagePlan(
        "data prepare",
        f"{text} to {folder}, about {tokens:,} tokens",
        disk_bytes=int(tokens * _MARGIN) * DTYPE.itemsize,
        memory_bytes=_BASE_MEMORY + _MEMORY_PER_TYPE * int(100 * sqrt(tokens)),
        seconds=2 + tokens / _TOKENS_PER_SECOND,
        notes=notes,
    )


def _estimated_or_none(data: DataConfig) -> dict[str, int]:
    try:
        return _estimated(data)
    except DistlmError:
        return {}


def _estimated(data: DataConfig) -> dict[str, int]:
    """Split → about how many tokens; empty for a data set of the hub."""
    if data.source == "hub":
        return {}
    if data.source == "demo":
        return dict(_DEMO_TOKENS)
    choice = choice_of_data(data)
    sources = folder_sources(choice)
    text = text_start(sources["train"]) or "\n"
    count = len(text.split()) + text.count("\n")
    if data.tokenizer:
        lines = text.split("\n")
        count = round(Subwords.load(data.tokenizer, data.line_end).tokens_per_line(lines) * len(lines))
    per_byte = count / len(text.encode())
    read = {split: per_byte * text_bytes(of_split) for split, of_split in sources.items()}
    left = 1 - sum(choice.shares.values())
    return {
        split: int(read["train"] * choice.shares[split]) if split in choice.shares
        else int(read[split] * (left if split == "train" else 1))
        for split in SPLITS
    }  # fmt: skip
