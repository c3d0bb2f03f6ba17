"""The files of each split in a folder."""

import os
from collections.abc import Iterable
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


def sizes_now(text_dir: Path, names: Iterable[str]) -> dict[str, int]:
    """Name → bytes of the files that make up a split now whose files were `names`: those that are there, and, where
    they were those of a folder, others in it. Of these only such in forms that `names` has: when the split was read,
    those in other forms may have been left out."""
    before = list(names)
    forms, folders = {_form(name) for name in before}, {name.split("/")[0] for name in before if "/" in name}
    others = (path for place in folders for path in _files_below(text_dir / place) if _form(path.name) in forms)
    files = {*others, *(path for name in before if (path := text_dir / name).is_file())}
    return {path.relative_to(text_dir).as_posix(): path.stat().st_size for path in files}


def _form(name: str) -> str:
    return Path(name.removesuffix(packing(name))).suffix + packing(name)


def _files_below(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders, in the order of their names; those that are hidden, or in a hidden folder,
    are left out. Links to folders are followed; a folder that is there under two names is read once."""
    found, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # Links last, so that what is here is read under its own name.
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".") and real not in seen),
            key=lambda name, place=place: (Path(place, name).is_symlink(), name),  # type: ignore[misc]
        )
        if real not in seen:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if path.is_file())


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
    inside = _files_below(folder / split)
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
