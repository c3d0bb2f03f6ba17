"""What decides a datastore."""

from dataclasses import asdict, dataclass

from distlm.data.blocks import BEGINS
from distlm.runtime.files import json_hash

_OF_CONFIG = ("split", "tap", "context_window", "block", "batch_blocks", "rows_per_shard", "key_dtype")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of a store."""

    split: str
    tap: str
    context_window: int
    block: int
    batch_blocks: int
    rows_per_shard: int
    """Rounded down to whole batches."""
    key_dtype: str
    width: int
    vocabulary: int
    model: str
    """Fingerprint of the model (distlm.models.card.model_fingerprint)."""
    dictionary: str
    """Hash of the dictionary."""
    tokens: str
    """Fingerprint of the token files."""
    begins: bool = False
    """Each block has the beginning-of-text token in front, as the model says."""

    @property
    def hash(self) -> str:
        """What a shard's sidecar says it belongs to."""
        found = asdict(self)
        if not self.begins:
            # Stores from before there was such a token keep their hashes.
            del found["begins"]
        return json_hash(found)

    @property
    def rule(self) -> str:
        """The context rule in words."""
        return (
            f"the first {self.context_window} tokens are not stored; each stored token is seen with "
            f"{self.context_window} to {self.context_window + self.block - 1} tokens before it"
            f"{BEGINS if self.begins else ''}"
        )

    def differences(self, other: "Settings") -> list[str]:
        """'name: mine there, other's now' of each field that differs."""
        here, now = asdict(self), asdict(other)
        changed = [name for name in here if here[name] != now[name]]
        named = {name: f"datastore.{name}" for name in _OF_CONFIG}
        named |= {"model": "model (checkpoint)", "tokens": "token files"}
        return [f"{named.get(name, name)}: {here[name]!r} there, {now[name]!r} now" for name in changed]
