"""Writes texts in the forms that are read: packed, as records, as tables."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PACKINGS = ("", ".gz", ".xz", ".bz2", ".zst")


def packed(data: bytes, packing: str) -> bytes:
    """Skips the test where the library of .zst is missing."""
    if packing == ".zst":
        library = pytest.importorskip("zstandard", reason="zstandard is not installed")
        # Two frames: parallel packers write many.
        half = len(data) // 2
        return b"".join(library.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
    }  # fmt: skip
    return pack[packing](data)


def write_packed(path: Path, data: bytes) -> Path:
    """By the suffix of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(data, path.suffix if path.suffix in PACKINGS else ""))
    return path


def write_rows(path: Path, rows: Sequence[Any], field: str = "text", groups: int = 7) -> Path:
    """A .jsonl, .csv (both also packed) or .parquet file of these texts and a column before them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"id": [*range(len(rows))], field: [*rows]}), path, row_group_size=groups)
        return path
    if ".jsonl" in path.name:
        lines = (json.dumps({"id": number, field: row}) + "\n" for number, row in enumerate(rows))
        return write_packed(path, "".join(lines).encode())
    made = io.StringIO()
    csv.writer(made).writerows([["id", field], *enumerate(rows)])
    return write_packed(path, made.getvalue().encode())
