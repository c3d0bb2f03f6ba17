"""What an exported folder says of itself beside what Hugging Face reads."""

from distlm.models.records import Marker
from distlm.runtime.records import CodeVersion


class ExportManifest(Marker):
    """The weights of a model that was exported as a Hugging Face folder; written last. Other files may be edited."""

    NAME = "distlm.json"
    FILE = "FOLDER/distlm.json (of `distlm export hf`)"
    WHAT = "list of an exported model's weights"
    WRITER = "distlm export hf"
    READERS = ("distlm finetune", "distlm train")
    MEND = "copy the whole folder, or export the checkpoint again (`distlm export hf`)"

    kind: str
    """model.kind, or plm_task of a fine-tuned model."""
    code: CodeVersion
    """Which code wrote the folder."""
