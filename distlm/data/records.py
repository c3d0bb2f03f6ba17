"""The record of token files: `meta.json`, which is written last and says that they are whole."""

from typing import ClassVar

from msgspec import UNSET, UnsetType

from distlm.runtime.records import Part, Record


class SplitFacts(Part):
    """One split's file of ids."""

    tokens: int
    """Ids in the file; one `</s>` per line is among them."""
    lines: int
    """Lines of text, blank ones included."""
    unk: int
    """Tokens that are `<unk>`."""
    hash: str
    """xxh3-128 of the file."""
    words: int | UnsetType = UNSET
    """Words of the text, line ends counted; absent where every token is a word."""


class TokenSettings(Part):
    """What decides the token files: settings of the section `data` that count for this source."""

    source: str
    """data.source."""
    text_dir: str | UnsetType = UNSET
    """data.text_dir, absolute."""
    hub_name: str | UnsetType = UNSET
    """data.hub_name."""
    hub_config: str | UnsetType = UNSET
    """data.hub_config."""
    hub_field: str | UnsetType = UNSET
    """data.hub_field."""
    text_field: str | UnsetType = UNSET
    """data.text_field; absent: text."""
    valid_share: float | UnsetType = UNSET
    """data.valid_share, of train's documents."""
    test_share: float | UnsetType = UNSET
    """data.test_share, of train's documents."""
    documents: str | UnsetType = UNSET
    """data.documents, where there is such a share."""
    first_words: int | UnsetType = UNSET
    """data.first_words, words of each split; absent: all."""
    tokenizer: str | UnsetType = UNSET
    """Hash of the tokenizer that data.tokenizer names."""
    dictionary: str | UnsetType = UNSET
    """Hash of the dictionary that data.dictionary names."""
    min_count: int | UnsetType = UNSET
    """data.min_count, occurrences."""
    max_words: int | UnsetType = UNSET
    """data.max_words, words."""
    pad_to_multiple: int | UnsetType = UNSET
    """data.pad_to_multiple, entries."""


class TextFile(Part):
    """A text file of a folder."""

    name: str
    """In data.text_dir."""
    bytes: int
    """Its size."""
    sha256: str
    """Of its bytes."""


class DemoSource(Part, kw_only=True):
    """The demo corpus."""

    source: str
    """Package and file that it was taken from."""
    sha256: str | UnsetType = UNSET
    """Of that file, where it holds Wikipedia's articles."""
    python: str | UnsetType = UNSET
    """Version of Python, where the articles are its help texts."""
    licence: str
    """Of the text."""
    fallback: str | None
    """Why it is Python's help texts instead of Wikipedia's articles; null: it is not."""
    articles: dict[str, int]
    """Articles of each split."""


class HubSource(Part):
    """A data set of the `datasets` library."""

    name: str
    """On the hub, or a local folder."""
    config: str
    """Of the data set; may be empty."""
    field: str
    """Column of the text."""
    rows: dict[str, int]
    """Rows of each split."""
    datasets: str
    """Version of the library."""


class TextSource(Part):
    """The text: `files` and `folders`, or `demo`, or `hub`, as `source` says."""

    source: str
    """folder, demo or hub."""
    files: dict[str, TextFile] | UnsetType = UNSET
    """The file of each split that has one."""
    folders: dict[str, list[TextFile]] | UnsetType = UNSET
    """The files of each split that is a folder of them."""
    demo: DemoSource | UnsetType = UNSET
    """The demo corpus."""
    hub: HubSource | UnsetType = UNSET
    """The data set."""


class EditionMatch(Part):
    """The published corpus that the text is, or nearly is."""

    name: str
    """Of the corpus."""
    compared: list[str]
    """What was compared: token counts, vocabulary, sha256."""
    differences: list[str]
    """What differs, in words."""
    exact: bool
    """Nothing differs."""

    def line(self) -> str:
        """One line for people: a recognition, or a warning that says exactly what differs."""
        if self.exact:
            return f"recognised {self.name} (equal {', '.join(self.compared)})"
        return f"WARNING: nearly {self.name}, but not it: {'; '.join(self.differences)}"


class TokenizerFacts(Part):
    """A sub-word tokenizer."""

    hash: str
    """Of its tokenizer.json and the piece that ends a line."""
    pieces: int
    """Pieces; piece i has id i + 4."""
    line_end: int
    """Number of the piece that ends a line."""
    line_end_piece: str
    """That piece."""


class TokensMeta(Record, kw_only=True):
    """Token files of one corpus: int32 ids of each split in `SPLIT.bin`, words in `dict.txt`."""

    FILE: ClassVar[str] = "RUN/tokens/meta.json"
    WHAT: ClassVar[str] = "description of token files"
    WRITER: ClassVar[str] = "distlm data prepare"
    READERS: ClassVar[tuple[str, ...]] = (
        "distlm train", "distlm evaluate", "distlm datastore write", "distlm knn search", "distlm knn cache",
        "distlm knn evaluate",
    )  # fmt: skip
    MEND: ClassVar[str] = "delete it and run `distlm data prepare`"

    dtype: str
    """Of an id: int32, little-endian."""
    vocabulary: int
    """V: words of the dictionary, specials and padding counted."""
    types: int
    """Distinct words of train, `<unk>` and `</s>` counted; pieces that occur, where tokens are sub-words."""
    dictionary: str
    """Hash of `dict.txt`'s words in the order of their ids."""
    splits: dict[str, SplitFacts]
    """By name: train, valid, test."""
    settings: TokenSettings
    """What decided the files: another start with others is refused."""
    source: TextSource
    """Where the text is from."""
    edition: EditionMatch | None
    """Recognised corpus; null: none, or tokens are sub-words."""
    tokenizer: TokenizerFacts | UnsetType = UNSET
    """Where tokens are sub-words."""
    others: dict[str, str] | UnsetType = UNSET
    """dict.txt and, where there is one, tokenizer.json → xxh3-128 of the file."""
