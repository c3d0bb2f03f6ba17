"""Settings of shards of token rows."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ShardsConfig:
    """Documents to shards of packed token rows (`distlm data shard`)."""

    source: Literal["folder", "demo", "hub"] = "folder"
    """Where the text comes from: a folder, the small demo corpus, or the Hugging Face hub."""
    text_dir: str = ""
    """Folder that holds, for each split, SPLIT.txt, SPLIT.jsonl or SPLIT.csv (also .gz, .xz, .bz2, .zst),
    SPLIT.parquet, wiki.SPLIT.tokens, or a folder SPLIT of such files (source=folder)."""
    text_field: str = "text"
    """Field of .jsonl, column of .csv and .parquet files that holds the text."""
    hub_name: str = ""
    """Data set on the hub, or a local folder that `datasets` can load (source=hub), e.g. Salesforce/wikitext."""
    hub_config: str = ""
    """Configuration of the hub data set, e.g. wikitext-103-raw-v1."""
    hub_field: str = "text"
    """Column of the hub data set that holds the text."""
    splits: list[str] = field(default_factory=lambda: ["train", "valid", "test"])
    """Splits that are made; training needs train and valid."""
    valid_share: float = 0.0
    """Share of train's documents that are taken out of train to be the valid split (0: the split is there)."""
    test_share: float = 0.0
    """The same for the test split."""
    documents: Literal["blank_line", "title", "line", "whole"] = "blank_line"
    """Where a document ends: at a blank line; before a WikiText title (" = Title = " between blank lines); at each
    line; at the end of a file or of a row of a hub data set. A row of .jsonl, .csv and .parquet is a document, unless
    this is line or title. The demo corpus has its own ends."""
    folder: str = ""
    """Where the shards live; empty: RUN_DIR/shards. Several runs may share one."""
    vocabulary: str = ""
    """WordPiece vocabulary: a vocab.txt with one piece per line, as BERT's, or a folder that holds one; empty: one is
    trained on the train split."""
    vocabulary_size: int = 30522
    """Pieces of a trained vocabulary, special tokens included."""
    vocabulary_text: int = 1_000_000_000
    """Bytes of text, taken evenly from train, that a vocabulary is trained on (0: all of train)."""
    lower_case: bool = True
    """Lower-case the text and strip accents (BERT's uncased models)."""
    row_tokens: int = 512
    """Tokens of a row, [CLS] and [SEP] included."""
    cross_documents: bool = True
    """Rows run on from one document into the next, with a [SEP] between them (RoBERTa's FULL-SENTENCES); false: each
    document begins a row, and its last row is padded (DOC-SENTENCES). Text is cut at tokens, not at sentences."""
    chunk_rows: int = 256
    """Rows of a chunk, which is one file of a shard, read as a whole."""
    shard_text: int = 32_000_000
    """Bytes of text in a shard, which holds whole documents. Ranks divide the shards among them."""
