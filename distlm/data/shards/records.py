"""Records of a folder of shards: its manifest, and what it holds while it is unfinished."""

from pathlib import Path
from typing import Any, ClassVar, Self

from msgspec import UNSET, UnsetType

from distlm.errors import DistlmError
from distlm.runtime.records import Part, Record

KIND = "distlm shards"


class ShardSettings(Part, kw_only=True):
    """What decides the shards: settings of the section `shards` that count for this source."""

    source: str
    """shards.source."""
    hub_name: str | UnsetType = UNSET
    """shards.hub_name."""
    hub_config: str | UnsetType = UNSET
    """shards.hub_config."""
    hub_field: str | UnsetType = UNSET
    """shards.hub_field."""
    text_field: str | UnsetType = UNSET
    """shards.text_field; absent: text."""
    valid_share: float | UnsetType = UNSET
    """shards.valid_share, of train's documents."""
    test_share: float | UnsetType = UNSET
    """shards.test_share, of train's documents."""
    splits: list[str]
    """shards.splits."""
    documents: str
    """shards.documents."""
    lower_case: bool
    """shards.lower_case."""
    row_tokens: int
    """shards.row_tokens: S, [CLS] and [SEP] included."""
    cross_documents: bool
    """shards.cross_documents."""
    chunk_rows: int
    """shards.chunk_rows."""
    shard_text: int
    """shards.shard_text, bytes of text."""
    vocabulary: str
    """Hash of the vocabulary that shards.vocabulary names; empty: one was trained."""
    vocabulary_size: int | UnsetType = UNSET
    """shards.vocabulary_size, pieces of a trained one."""
    vocabulary_text: int | UnsetType = UNSET
    """shards.vocabulary_text, bytes that one was trained on."""


class TextFacts(Part, kw_only=True):
    """One source of a split: a file, a table of a data set, or articles of the demo corpus. A split that was split off
    train has train's."""

    name: str
    """In the text's folder; of a table its split."""
    bytes: int | UnsetType = UNSET
    """Size of the file, as it is on disk."""
    hub: str | UnsetType = UNSET
    """Data set."""
    config: str | UnsetType = UNSET
    """Configuration of the data set."""
    field: str | UnsetType = UNSET
    """Column of the text."""
    datasets: str | UnsetType = UNSET
    """Version of the `datasets` library."""
    source: str | UnsetType = UNSET
    """Where the demo corpus is from."""
    python: str | UnsetType = UNSET
    """Version of Python, where the demo corpus is its help texts."""
    sha256: str
    """Of the file, or of the rows with a newline behind each."""
    licence: str | UnsetType = UNSET
    """Of the demo corpus."""
    fallback: str | UnsetType | None = UNSET
    """Why the demo corpus is Python's help texts; null: it is not."""
    articles: dict[str, int] | UnsetType = UNSET
    """Articles of each split of the demo corpus."""
    rows: int | UnsetType = UNSET
    """Rows of the table, or records of the file."""
    text: int
    """Bytes of UTF-8 text."""


class Tokenizer(Part):
    """Facts of a WordPiece tokenizer: size of the vocabulary, hash, and the ids of the special tokens."""

    NAMES: ClassVar[tuple[str, ...]] = ("pad", "unk", "cls", "sep", "mask")

    vocabulary: int
    """V, pieces."""
    hash: str
    """Of the pieces in order and the treatment of case."""
    lower_case: bool
    """Text is lower-cased and accents are stripped."""
    pad: int
    """Id of [PAD]."""
    unk: int
    """Id of [UNK]."""
    cls: int
    """Id of [CLS]."""
    sep: int
    """Id of [SEP]."""
    mask: int
    """Id of [MASK]."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Never masked, never drawn as a replacement."""
        return self.pad, self.unk, self.cls, self.sep, self.mask


class ShardEntry(Part):
    """A written shard."""

    name: str
    """Of its file, without .tar."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """xxh3-128 of the file."""
    rows: int
    """Rows of all chunks."""
    tokens: int
    """Tokens of text, without [CLS], [SEP] and padding."""
    documents: int
    """Documents that end in it."""
    chunks: list[str]
    """Each "offset bytes rows xxh3-128": where its .npy file lies in the tar, its size, its rows, its hash."""


class SplitEntry(Part):
    """A split's shards."""

    rows: int
    """Rows of all shards."""
    tokens: int
    """Tokens of text of all shards."""
    documents: int
    """Documents of all shards."""
    shards: list[ShardEntry]
    """In the order of the text."""


class ManifestFile(Record, kw_only=True):
    """A finished folder of shards: tar files of chunks, which are .npy files [rows, S] of token ids."""

    FILE: ClassVar[str] = "RUN/shards/manifest.json"
    WHAT: ClassVar[str] = "manifest of shards"
    WRITER: ClassVar[str] = "distlm data shard"
    READERS: ClassVar[tuple[str, ...]] = ("distlm train", "distlm evaluate", "distlm finetune", "distlm data verify")
    MEND: ClassVar[str] = "the file was edited or is damaged: remove the folder and make the shards again"

    kind: str = KIND
    """Tells it from other manifests."""
    dtype: str
    """Of an id in the shards: uint16, or int32 for a larger vocabulary."""
    chunk: str = "offset bytes rows xxh3-128"
    """How `chunks` are written."""
    unit: str = "source,start,end,bytes of each piece of text of a shard"
    """How `units` are written."""
    tokenizer: Tokenizer
    """Of the ids."""
    settings: ShardSettings
    """What decided the shards: another start with others is refused."""
    text: dict[str, list[TextFacts]]
    """The sources of each split."""
    splits: dict[str, SplitEntry]
    """The shards of each split."""
    units: dict[str, list[str]]
    """For each shard of a split its pieces of text, "source,start,end,bytes" with a space between: source counts from
    0 in `text`; start and end are bytes of unpacked text, or rows of a table."""
    others: dict[str, str] | UnsetType = UNSET
    """The files of tokenizer/ → xxh3-128."""

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        """As Record.of. Raises DistlmError for another kind of manifest, too."""
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise DistlmError(f"{path}: not the {cls.WHAT} (its `kind` says otherwise); choose another shards.folder")
        return super().of(tree, path)

    def tree(self) -> dict[str, Any]:
        """As Record.tree; first what it is."""
        return {"kind": self.kind, **super().tree()}


class PlanFile(Record, kw_only=True):
    """Which text goes into which shard, while the folder is unfinished."""

    FILE: ClassVar[str] = "RUN/shards/.plan.json"
    WHAT: ClassVar[str] = "plan of shards"
    WRITER: ClassVar[str] = "distlm data shard"
    READERS: ClassVar[tuple[str, ...]] = ("distlm data shard",)

    settings: ShardSettings
    """As in manifest.json."""
    text: dict[str, list[TextFacts]]
    """As in manifest.json."""
    units: dict[str, list[list[tuple[int, int, int, int]]]]
    """For each shard of a split its pieces of text: source, start, end, bytes."""


class Marker(Record, kw_only=True):
    """One shard of an unfinished folder is whole: a shard as in manifest.json."""

    FILE: ClassVar[str] = "RUN/shards/.SPLIT-00000.json"
    WHAT: ClassVar[str] = "marker of a shard"
    WRITER: ClassVar[str] = "distlm data shard"
    READERS: ClassVar[tuple[str, ...]] = ("distlm data shard",)

    belongs: str
    """Hash of the plan and the tokenizer that it was made with."""
    name: str
    """Of its file, without .tar."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """xxh3-128 of the file."""
    rows: int
    """Rows of all chunks."""
    tokens: int
    """Tokens of text, without [CLS], [SEP] and padding."""
    documents: int
    """Documents that end in it."""
    chunks: list[str]
    """As in manifest.json."""
