"""The files of each split in a folder."""

from pathlib import Path

from distlm.data.text.choice import TextChoice
from distlm.data.text.packed import TOOLS, packing
from distlm.data.text.parquet import ParquetSource
from distlm.data.text.record_files import CsvSource, JsonlSource
from distlm.data.text.source import FileSource
from distlm.errors import DistlmError, UsageError
from distlm.runtime.progress import say

FolderSource = FileSource | JsonlSource | CsvSource | ParquetSource
_PACKED = (".txt", ".jsonl", ".csv")
SUFFIXES = (*(kind + tool for kind in _PACKED for tool in ("", *TOOLS)), ".parquet")
"""Of the files that are read."""
FORMS = ".txt, .jsonl, .csv (also .gz, .xz, .bz2, .zst) or .parquet"
"""The same for people."""


def folder_sources(choice: TextChoice, one_line: bool = True) -> dict[str, list[FolderSource]]:
    """Split that is read → its files, in the order of the text; `one_line`: a row that is a document is one line.

    Raises DistlmError, naming the settings, when the folder or a split is missing, a split is empty, there in two
    forms, or there and to be split off train.
    """
    setting = f"{choice.section}.text_dir"
    if not choice.text_dir:
        raise UsageError(f"{setting} is empty; set it to a folder with train.txt, valid.txt and test.txt")
    folder = Path(choice.text_dir)
    if not folder.is_dir():
        raise DistlmError(
            f"{setting}={choice.text_dir}: no such folder; give one with train.txt, valid.txt and test.txt"
        )
    for split in choice.shares:
        if found := _forms(folder, split):
            raise DistlmError(
                f"{folder / found[0]}: the {split} split is there; leave {choice.section}.{split}_share out to use it, "
                "or move it away"
            )
    return {split: _files_of(folder, split, choice, one_line) for split in choice.read}


def is_columnar(name: str) -> bool:
    """Whether a file holds its text in a field."""
    return name.removesuffix(packing(name)).endswith((".jsonl", ".csv", ".parquet"))


def _forms(folder: Path, split: str) -> list[str]:
    """Names of what may be this split's text."""
    names = [*(split + suffix for suffix in SUFFIXES), f"wiki.{split}.tokens", split]
    return [name for name in names if (folder / name).is_dir() == (name == split) and (folder / name).exists()]


def _files_of(folder: Path, split: str, choice: TextChoice, one_line: bool) -> list[FolderSource]:
    found = _forms(folder, split)
    if not found:
        others = [form for other in choice.read for form in _forms(folder, other)[:1]]
        name = "wiki.{}.tokens" if others and all(form.startswith("wiki.") for form in others) else "{}.txt"
        mend = f"; put it there ({FORMS}, or a folder {split} of such files)"
        if split != "train":
            mend += f", or {choice.splitting}"
        if choice.section == "shards":
            mend += ", or leave the split out of shards.splits"
        raise DistlmError(f"{folder / name.format(split)}: no such file (the {split} split){mend}")
    if len(found) > 1:
        raise DistlmError(
            f"{folder}: the {split} split is there more than once ({', '.join(found)}): two corpora in one folder; "
            "move one of them to another"
        )
    if found != [split]:
        path = folder / found[0]
        if path.stat().st_size == 0:
            raise DistlmError(f"{path}: empty file: the {split} split has no text")
        return [_source(path, found[0], choice, one_line)]
    inside = sorted(path for path in (folder / split).rglob("*") if path.is_file() and not path.name.startswith("."))
    texts = [path for path in inside if path.name.endswith(SUFFIXES)]
    if not texts:
        raise DistlmError(f"{folder / split}: no text files; expected names that end in {FORMS}")
    if len(texts) < len(inside):
        say(f"{folder / split}: {len(inside) - len(texts)} files are not {FORMS}: left out")
    return [_source(path, path.relative_to(folder).as_posix(), choice, one_line) for path in texts]


def _source(path: Path, name: str, choice: TextChoice, one_line: bool) -> FolderSource:
    if not is_columnar(name):
        return FileSource(path, name)
    stem = name.removesuffix(packing(name))
    kind = next(kind for end, kind in _COLUMNAR.items() if stem.endswith(end))
    return kind(
        path, name, f"{choice.section}.text_field", choice.text_field, choice.rows_are_documents, one_line
    )  # fmt: skip


_COLUMNAR: dict[str, type[JsonlSource] | type[CsvSource] | type[ParquetSource]] = {
    ".jsonl": JsonlSource, ".csv": CsvSource, ".parquet": ParquetSource,
}  # fmt: skip
