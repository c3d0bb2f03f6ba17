"""What making the token files will need: disk, memory, time."""

from math import sqrt

from distlm.config.schema import DataConfig, RunConfig
from distlm.data.settings import finished_tokens
from distlm.data.subwords import Subwords
from distlm.data.text.choice import choice_of_data
from distlm.data.text.folder import folder_sources
from distlm.data.text.sample import text_bytes, text_start
from distlm.data.tokens import DTYPE
from distlm.runtime.plan import StagePlan
from distlm.runtime.rundir import RunDir

# Tokens per byte are measured on the start of train, and may be this much higher in the rest.
_MARGIN = 1.1
_TOKENS_PER_SECOND = 2e6
_DEMO_TOKENS = 530_000
# Python with NumPy, plus the longest-lived chunk; then the counter and the dictionary, per distinct word.
_BASE_MEMORY, _MEMORY_PER_TYPE = 160_000_000, 400


def plan_prepare(config: RunConfig, ranks: int = 1) -> StagePlan:
    """Needs of the stage, estimated from file sizes and the start of train. One rank works, whatever `ranks` is."""
    data, folder = config.data, RunDir.of(config).tokens(config)
    if finished_tokens(folder, data) is not None:
        return StagePlan("data prepare", f"{folder}: complete, nothing to do", 0, _BASE_MEMORY, 0.0)
    notes = ["one rank works, the others wait"] if ranks > 1 else []
    if data.source == "hub":
        notes.append("the size of a hub data set is known only when it is loaded; disk is checked then")
        return StagePlan("data prepare", f"text of {data.hub_name} to {folder}", 0, 2 * _BASE_MEMORY, None, notes)
    if data.source == "demo":
        text, tokens = "the demo corpus", _DEMO_TOKENS
    else:
        text, tokens = data.text_dir, _estimate_tokens(data)
    return StagePlan(
        "data prepare",
        f"{text} to {folder}, about {tokens:,} tokens",
        disk_bytes=int(tokens * _MARGIN) * DTYPE.itemsize,
        memory_bytes=_BASE_MEMORY + _MEMORY_PER_TYPE * int(100 * sqrt(tokens)),
        seconds=2 + tokens / _TOKENS_PER_SECOND,
        notes=notes,
    )


def _estimate_tokens(data: DataConfig) -> int:
    sources = folder_sources(choice_of_data(data))
    text = text_start(sources["train"]) or "\n"
    count = len(text.split()) + text.count("\n")
    if data.tokenizer:
        lines = text.split("\n")
        count = round(Subwords.load(data.tokenizer, data.line_end).tokens_per_line(lines) * len(lines))
    per_byte = count / len(text.encode())
    return int(per_byte * sum(map(text_bytes, sources.values())))
