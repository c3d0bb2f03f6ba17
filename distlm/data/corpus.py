"""Readers of text: each gives the lines of the train, valid and test split, unaltered, and says where they are from."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distlm.config.schema import DataConfig
from distlm.data.records import HubSource, TextFile, TextSource
from distlm.data.tokens import SPLITS
from distlm.errors import DistlmError, UsageError

STYLES: tuple[Callable[[str], str], ...] = (lambda split: f"{split}.txt", lambda split: f"wiki.{split}.tokens")
"""File names of a split: ours, and WikiText's."""
HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid"), "test": ("test",)}
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Corpus:
    """Text of the three splits."""

    description: TextSource
    """What `meta.json` says about the source."""
    lines: Mapping[str, int]
    """Lines of each split (rows of a hub data set, which may hold several)."""
    places: Mapping[str, str]
    """Split → the name that errors show: a file, or a data set and split."""
    read: Callable[[str], Iterator[str]]
    """Split → its lines, without the newline. May be called again. Raises DistlmError for text that is not UTF-8."""


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that the settings name. Folder files are read once here, for their hashes.

    Raises DistlmError for a missing folder, split or library, an empty split, or a folder with two naming styles.
    """
    if config.source == "folder":
        return _folder_corpus(folder_files(config.text_dir))
    if config.source == "demo":
        return _demo_corpus()
    return _hub_corpus(config)


def folder_files(text_dir: str) -> dict[str, Path]:
    """The file of each split in a folder of {train,valid,test}.txt or wiki.{train,valid,test}.tokens.

    Raises DistlmError when the folder or a file is missing or empty, or both styles are there.
    """
    if not text_dir:
        raise UsageError("data.text_dir is empty; set it to a folder with train.txt, valid.txt and test.txt")
    folder = Path(text_dir)
    if not folder.is_dir():
        raise DistlmError(f"data.text_dir={text_dir}: no such folder; give one with train.txt, valid.txt and test.txt")
    found = [[name for split in SPLITS if (folder / (name := style(split))).is_file()] for style in STYLES]
    if all(found):
        raise DistlmError(
            f"data.text_dir={text_dir}: two corpora in one folder ({', '.join(found[0])} and {', '.join(found[1])}); "
            "move one of them to another folder"
        )
    style = STYLES[1] if found[1] else STYLES[0]
    files = {split: folder / style(split) for split in SPLITS}
    for split, path in files.items():
        if not path.is_file():
            raise DistlmError(f"{path}: no such file (the {split} split); all of {', '.join(SPLITS)} are needed")
        if path.stat().st_size == 0:
            raise DistlmError(f"{path}: empty file; the {split} split needs text")
    return files


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, cut at newlines only; a last line without one counts.

    Raises DistlmError naming the line for bytes that are not UTF-8.
    """
    with path.open("rb", buffering=_CHUNK) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield raw.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise DistlmError(
                    f"{path}, line {number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at column "
                    f"{error.start + 1}); convert the file, e.g. iconv -f LATIN1 -t UTF-8"
                ) from error


def _folder_corpus(files: Mapping[str, Path]) -> Corpus:
    facts, lines = {}, {}
    for split, path in files.items():
        facts[split], lines[split] = _file_facts(path)
    return Corpus(
        description=TextSource("folder", files=facts),
        lines=lines,
        places={split: str(path) for split, path in files.items()},
        read=lambda split: read_lines(files[split]),
    )


def _file_facts(path: Path) -> tuple[TextFile, int]:
    """Size and hash of a file, and its lines."""
    digest, size, newlines, last = hashlib.sha256(), 0, 0, b"\n"
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size, newlines, last = size + len(chunk), newlines + chunk.count(b"\n"), chunk[-1:]
    return TextFile(path.name, size, digest.hexdigest()), newlines + (last != b"\n")


def _demo_corpus() -> Corpus:
    from distlm.data.demo_text import demo_text

    demo = demo_text()
    return Corpus(
        description=TextSource("demo", demo=demo.description),
        lines={split: len(rows) for split, rows in demo.lines.items()},
        places={split: f"demo corpus, {split}" for split in SPLITS},
        read=lambda split: iter(demo.lines[split]),
    )


def _hub_corpus(config: DataConfig) -> Corpus:
    tables = hub_tables("data", config.hub_name, config.hub_config, config.hub_field)
    what = hub_label("data", config.hub_name, config.hub_config)
    rows = {split: len(table) for split, table in tables.items()}
    return Corpus(
        description=TextSource(
            "hub",
            hub=HubSource(config.hub_name, config.hub_config, config.hub_field, rows, metadata.version("datasets")),
        ),
        lines=rows,
        places={split: f"{what}, {split}" for split in SPLITS},
        read=lambda split: _hub_lines(tables[split], config.hub_field, f"{what}, {split}"),
    )


def hub_label(section: str, name: str, config: str) -> str:
    """A hub data set as errors name it; `section` is that of its settings."""
    return f"{section}.hub_name={name}" + (f" ({config})" if config else "")


def load_hub(section: str, name: str, config: str) -> Any:
    """Splits of a data set of the `datasets` library: one on the hub, or a local folder that it can load.

    Raises DistlmError, naming the settings of `section`, when the library or the data set is missing.
    """
    if not name:
        raise DistlmError(f"{section}.hub_name is empty; name a data set, e.g. {section}.hub_name=Salesforce/wikitext")
    try:
        import datasets
    except ImportError as error:
        raise DistlmError(
            f"{section}.source=hub needs the datasets library: pip install 'distlm[hub]' ({error})"
        ) from error
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises many kinds: its own, of the network, of the file readers
        what = hub_label(section, name, config)
        raise DistlmError(
            f"{what}: the datasets library cannot load it: {type(error).__name__}: {error}; check {section}.hub_name "
            f"and {section}.hub_config, or download the text and use {section}.source=folder"
        ) from error


def hub_tables(section: str, name: str, config: str, column: str, splits: Sequence[str] = SPLITS) -> Mapping[str, Any]:
    """Split → table of the `datasets` library that has the column `column` only.

    Raises DistlmError, naming the settings of `section`, when the library, the data set, a split or the column is
    missing, or a split is empty.
    """
    loaded = load_hub(section, name, config)
    what = hub_label(section, name, config)
    tables: dict[str, Any] = {}
    for split in splits:
        names = HUB_SPLITS[split]
        found = next((word for word in names if word in loaded), None)
        if found is None:
            raise DistlmError(f"{what}: no {' or '.join(names)} split; it has {', '.join(loaded)}")
        table = loaded[found]
        if column not in table.column_names:
            raise DistlmError(f"{what}: no column {section}.hub_field={column}; it has {', '.join(table.column_names)}")
        if len(table) == 0:
            raise DistlmError(f"{what}: the {found} split is empty")
        tables[split] = table.select_columns([column])
    return tables


def _hub_lines(table: Any, field: str, place: str) -> Iterator[str]:
    """A row is a line, with or without its newline; a row that holds several lines gives several."""
    number = 0
    for batch in table.iter(batch_size=1000):
        for text in batch[field]:
            number += 1
            if not isinstance(text, str):
                raise DistlmError(f"{place}, row {number}: column {field} holds {text!r}, expected text")
            yield from text.removesuffix("\n").split("\n")
