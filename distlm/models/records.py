"""What stands beside a model's weights: its card, and markers that say which files a whole folder has."""

from typing import Any, ClassVar

from msgspec import UNSET, UnsetType

from distlm.runtime.records import Part, Record


class ModelCard(Record, kw_only=True):
    """The description of a model, beside its weights."""

    FILE = "RUN/checkpoints/step-NNNNNNNN/model.json"
    WHAT = "description of a model"
    WRITER = "distlm train"
    READERS = ("distlm train", "distlm evaluate", "distlm datastore write", "distlm knn search", "distlm knn evaluate",
               "distlm finetune", "distlm export")  # fmt: skip
    MEND = "use another checkpoint"

    kind: str
    """model.kind, or plm_task of a fine-tuned model."""
    config: dict[str, Any]
    """What the kind needs to build it; its description (distlm.models.kind.Description) says which fields."""
    vocabulary: int
    """Words of the dictionary, or pieces of the tokenizer."""
    dictionary: str
    """Hash of the dictionary or tokenizer."""
    step: int | None = None
    """Updates that the weights have had."""
    tap: str | UnsetType = UNSET
    """The hidden state that a datastore holds."""
    imported_from: str | UnsetType = UNSET
    """Name of the file or model that the weights were imported from."""
    weights: str
    """Hash of model.safetensors."""


class MarkedFile(Part):
    """A file as it was written."""

    bytes: int
    """Its size."""
    hash: str
    """xxh3-128 of its content."""


class Marker(Record):
    """A file that says which others a folder has; written last."""

    NAME: ClassVar[str]
    """Its name."""

    files: dict[str, MarkedFile]
    """Name → what was written."""


class Complete(Marker):
    """The marker of a whole checkpoint; written last."""

    NAME = "complete.json"
    FILE = "RUN/checkpoints/step-NNNNNNNN/complete.json"
    WHAT = "marker of a whole folder"
    WRITER = "distlm train"
    READERS = ("every command that reads the checkpoint",)
    MEND = "copy the whole checkpoint folder, or use another checkpoint"

    step: int
    """Updates done."""
