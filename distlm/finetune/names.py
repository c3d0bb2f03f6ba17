"""Fine-tuning trains by the settings `finetune.*`: what the training's own code says of `train.*` gets their names."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

from distlm.errors import DistlmError
from distlm.models.plm.config import FinetuneConfig

_OTHERS = {
    "blocks_per_update": "rows_per_update", "micro_blocks": "micro_rows", "seed": "seeds", "warmup_updates": "warmup",
}  # fmt: skip
"""Setting of the section train → that of the section finetune, where it has another name."""
_SAME = {field.name for field in dataclasses.fields(FinetuneConfig)}
_SETTING = re.compile(r"\btrain\.(\w+)")


@contextmanager
def finetune_names() -> Iterator[None]:
    """For the block, errors name the settings of fine-tuning."""
    try:
        yield
    except DistlmError as error:
        error.args = (finetune_name(str(error)), *error.args[1:])
        raise


def finetune_name(text: str) -> str:
    """`text` with the settings of fine-tuning in place of those of training; those that both share stay."""

    def renamed(found: re.Match[str]) -> str:
        name = _OTHERS.get(found[1], found[1])
        return f"finetune.{name}" if name in _SAME else found[0]

    return _SETTING.sub(renamed, text)
