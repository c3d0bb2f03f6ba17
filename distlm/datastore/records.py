"""Records of a datastore: its manifest, and what says that one shard of an unfinished store is whole."""

from pathlib import Path
from typing import Any, ClassVar, Self

from msgspec import UNSET, UnsetType, field

from distlm.datastore.settings import Settings
from distlm.errors import DistlmError
from distlm.runtime.files import json_hash
from distlm.runtime.records import Part, Record

KIND = "distlm datastore"


class Context(Part):
    """Which tokens are context and which are stored."""

    context_window: int
    """datastore.context_window, tokens."""
    block: int
    """datastore.block, tokens stored by one block."""
    batch_blocks: int
    """datastore.batch_blocks, blocks of one forward pass."""
    rule: str
    """The same in words."""
    begins: bool | UnsetType = UNSET
    """Each block has the beginning-of-text token in front, which is context and no row; absent: it has none."""


class Shard(Part):
    """One shard: rows [first_row, first_row + rows) are the tokens [token_start, token_end) of the split."""

    index: int
    """Number of the shard, from 0: of `keys-00000.npy` and `values-00000.npy`."""
    first_row: int
    """Rows of the shards before it."""
    rows: int
    """Keys, and values."""
    token_start: int
    """Place in the split of the first stored token."""
    token_end: int
    """Place behind the last one."""
    keys_hash: str | None = field(name="keys_xxh3", default=None)
    """xxh3-128 of the whole file of keys; null while it is not written."""
    values_hash: str | None = field(name="values_xxh3", default=None)
    """xxh3-128 of the whole file of values; null while it is not written."""
    done: bool = False
    """Both files were written."""

    def __post_init__(self) -> None:
        self.done = bool(self.keys_hash and self.values_hash)


class Manifest(Record, kw_only=True):
    """A store's settings and shards. Keys [rows, D] and values [rows] lie in .npy files, one of each per shard."""

    FILE: ClassVar[str] = "RUN/datastore/manifest.json"
    WHAT: ClassVar[str] = "manifest of a datastore"
    WRITER: ClassVar[str] = "distlm datastore write"
    READERS: ClassVar[tuple[str, ...]] = (
        "distlm datastore verify", "distlm index train", "distlm index add", "distlm index merge", "distlm knn search",
        "distlm knn evaluate", "distlm generate",
    )  # fmt: skip
    MEND: ClassVar[str] = "the file was edited or is damaged: remove the folder and write the datastore again"

    kind: str = KIND
    """Tells it from other manifests."""
    complete: bool
    """All shards are written: until then nobody else reads the store."""
    rows: int
    """N, of all shards."""
    value_dtype: str = "int32"
    """Of a value, a token id; little-endian."""
    split: str
    """datastore.split."""
    tap: str
    """datastore.tap: the hidden state that became the key."""
    rows_per_shard: int
    """datastore.rows_per_shard, rounded down to whole batches."""
    key_dtype: str
    """datastore.key_dtype: float16 or float32."""
    width: int
    """D, numbers of a key."""
    vocabulary: int
    """V: values are below it."""
    model: str
    """Fingerprint of the model."""
    dictionary: str
    """Hash of the dictionary that values are ids of."""
    tokens: str
    """Fingerprint of the token files."""
    context: Context
    """The context rule."""
    shards: list[Shard]
    """In the order of their rows."""

    @classmethod
    def of_store(cls, settings: Settings, rows: int, shards: list[Shard], complete: bool) -> "Manifest":
        """The manifest of a store of these settings."""
        context = Context(
            settings.context_window, settings.block, settings.batch_blocks, settings.rule, settings.begins or UNSET
        )
        return cls(
            complete=complete, rows=rows, split=settings.split, tap=settings.tap,
            rows_per_shard=settings.rows_per_shard, key_dtype=settings.key_dtype, width=settings.width,
            vocabulary=settings.vocabulary, model=settings.model, dictionary=settings.dictionary,
            tokens=settings.tokens, context=context, shards=shards,
        )  # fmt: skip

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        """As Record.of. Raises DistlmError for another kind of manifest, and for shards that do not follow, too."""
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise DistlmError(f"{path}: not the {cls.WHAT} (its `kind` says otherwise); choose another folder")
        manifest = super().of(tree, path)
        manifest._check_consistent(path)
        return manifest

    def tree(self) -> dict[str, Any]:
        """As Record.tree; first what it is."""
        return {"kind": self.kind, **super().tree()}

    @property
    def settings(self) -> Settings:
        """What decided the bytes of the store."""
        context = self.context
        return Settings(
            self.split, self.tap, context.context_window, context.block, context.batch_blocks, self.rows_per_shard,
            self.key_dtype, self.width, self.vocabulary, self.model, self.dictionary, self.tokens, bool(context.begins),
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Identifies the store: settings and the checksum of every file."""
        return json_hash(self.tree())

    def _check_consistent(self, path: Path) -> None:
        row = 0
        for number, shard in enumerate(self.shards):
            if (shard.index, shard.first_row, shard.token_end - shard.token_start) != (number, row, shard.rows):
                raise DistlmError(
                    f"{path}: shard {number} does not follow the one before it; write the datastore again"
                )
            row += shard.rows
        done = sum(shard.done for shard in self.shards)
        if row != self.rows or (self.complete and done < len(self.shards)):
            raise DistlmError(
                f"{path}: says {self.rows} rows, complete={self.complete}, and lists {row} rows in {done} written "
                "shards; write the datastore again"
            )


class Sidecar(Record, kw_only=True):
    """One shard of an unfinished store is whole: a shard as in manifest.json. Gone when the store is complete."""

    FILE: ClassVar[str] = "RUN/datastore/.shard-00000.json"
    WHAT: ClassVar[str] = "sidecar of a shard"
    WRITER: ClassVar[str] = "distlm datastore write"
    READERS: ClassVar[tuple[str, ...]] = ("distlm datastore write",)

    store: str
    """Hash of the settings that it was written with."""
    index: int
    """Number of the shard, from 0."""
    first_row: int
    """Rows of the shards before it."""
    rows: int
    """Keys, and values."""
    token_start: int
    """Place in the split of the first stored token."""
    token_end: int
    """Place behind the last one."""
    keys_hash: str
    """xxh3-128 of the whole file of keys."""
    values_hash: str
    """xxh3-128 of the whole file of values."""

    @classmethod
    def of_shard(cls, settings: Settings, shard: Shard) -> "Sidecar":
        """What marks a shard of a store of these settings."""
        return cls(
            store=settings.hash, index=shard.index, first_row=shard.first_row, rows=shard.rows,
            token_start=shard.token_start, token_end=shard.token_end, keys_hash=shard.keys_hash or "",
            values_hash=shard.values_hash or "",
        )  # fmt: skip


class UnitsFile(Record, kw_only=True):
    """Which units of the shards of an unfinished store are written, so that a killed start goes on from there. Gone
    when the store is complete; a share (launch.share) has its own, `.units-K-of-N.json`."""

    FILE: ClassVar[str] = "RUN/datastore/.units.json"
    WHAT: ClassVar[str] = "record of written units"
    WRITER: ClassVar[str] = "distlm datastore write"
    READERS: ClassVar[tuple[str, ...]] = ("distlm datastore write",)

    store: str
    """Hash of the settings that they were written with."""
    unit_rows: int
    """Rows of a unit; the last one of a shard has fewer."""
    done: dict[str, list[str]]
    """SHARD/UNIT → xxh3-128 of its keys and of its values."""
