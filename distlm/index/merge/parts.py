"""Parts: what must hold before they are merged or searched (coverage, template, checksums, the whole trained state
byte for byte), and opening them side by side as one index."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.add import part_record
from distlm.index.build.template import Template
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array, Header, IndexFolder, read_list_sizes, set_count
from distlm.index.records import PartRecord
from distlm.index.selfcheck import open_mapped
from distlm.runtime.files import file_hash

_MEND = "run `distlm index add` again"


def check_coverage(
    folder: IndexFolder, datastore: Datastore, template: Template, mend: str = _MEND
) -> list[PartRecord]:
    """Sidecars of all parts in shard order, which tile the store's rows exactly once.

    Raises DistlmError naming what is missing, superfluous, cut, of another template or of another store; `mend`: what
    helps then.
    """
    missing = [s.index for s in datastore.shards if not folder.part_json(s.index).exists()]
    if missing:
        few = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise DistlmError(
            f"{folder.parts}: {len(missing)} of {len(datastore.shards)} parts are missing (shards {few}); {mend}"
        )
    known = {folder.part_json(s.index).name for s in datastore.shards}
    for path in sorted(folder.parts.glob("part-*.json")):
        if path.name not in known:
            raise DistlmError(
                f"{path}: part of a shard that this store of {len(datastore.shards)} shards does not have; remove it"
            )
    records = []
    next_id = 0
    for shard in datastore.shards:
        path = folder.part_json(shard.index)
        record = PartRecord.read(path)
        expected = part_record(datastore, shard.index, template, record.bytes, record.xxh3, record.lists)
        _check_record(path, record, expected, mend)
        if record.first_id != next_id:
            raise DistlmError(f"{path}: its ids start at {record.first_id}, expected {next_id}; {mend}")
        next_id += record.rows
        part = folder.part(shard.index)
        size = part.stat().st_size if part.exists() else -1
        if size != record.bytes:
            found = "is missing" if size < 0 else f"is truncated or changed: {size} bytes, {record.bytes} expected"
            raise DistlmError(f"{part} {found}; remove {path.name} and {mend}")
        records.append(record)
    if next_id != datastore.rows:
        raise DistlmError(f"{folder.parts}: the parts hold {next_id} keys, the store {datastore.rows}; {mend}")
    return records


def check_part(folder: IndexFolder, record: PartRecord, header: Header) -> Array:
    """The same as part_sizes after reading the part whole. Raises DistlmError also when its checksum is wrong."""
    path = folder.part(record.shard)
    found = file_hash(path)
    if found != record.xxh3:
        raise DistlmError(
            f"{path}: damaged (checksum {found}, {record.xxh3} when it was written); {part_mend(folder, record)}"
        )
    return part_sizes(folder, record, header)


def part_mend(folder: IndexFolder, record: PartRecord) -> str:
    """What helps when a part is damaged."""
    return f"remove {folder.part_json(record.shard).name} and {_MEND}"


def part_sizes(folder: IndexFolder, record: PartRecord, header: Header) -> Array:
    """List sizes int64 [nlist] of one part; its lists are not read.

    Raises DistlmError when its trained state is not the template's, or its lists do not hold the rows that its sidecar
    names.
    """
    path = folder.part(record.shard)
    start = header.bytes(record.rows)
    with path.open("rb") as stream:
        if stream.read(len(start)) != start:
            # Coarse centroids, codebooks, ranges, transforms, metric: merge tools of faiss compare only the sizes.
            raise DistlmError(
                f"{path}: its trained state differs from the template's although its sidecar names the same template; "
                f"{part_mend(folder, record)}"
            )
        try:
            sizes = read_list_sizes(stream, header.nlist, header.code_size)
        except ValueError as error:
            raise DistlmError(f"{path}: {error}; remove it and {_MEND}") from error
        body = stream.tell()
    if sizes.sum() != record.rows or body + record.rows * (header.code_size + 8) != record.bytes:
        raise DistlmError(f"{path}: its lists hold {sizes.sum()} keys, {record.rows} expected; remove it and {_MEND}")
    return sizes


def open_parts(template: Template, paths: Sequence[Path]) -> Any:
    """One faiss index over the lists of all parts, which stay where they lie, memory-mapped.

    A search finds what it finds in the merged index: the same ids at the same distances. Each list is copied together
    when it is scanned, one at a time on each thread.
    """
    faiss = require_faiss()
    # With the precomputed table, as a merged file is opened for searching.
    index = faiss.deserialize_index(np.frombuffer(template.data, np.uint8).copy())
    inner = inverted_file(index)
    parts = [open_mapped(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE) for path in paths]
    pointers = faiss.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(inverted_file(part).invlists)
    lists = faiss.HStackInvertedLists(pointers.size(), pointers.data())
    inner.replace_invlists(lists, False)
    # faiss keeps plain pointers to all of these.
    index.referenced_objects = [*getattr(index, "referenced_objects", []), lists, parts]
    set_count(index, sum(part.ntotal for part in parts))
    return index


def remove_parts(folder: IndexFolder) -> None:
    """Remove all parts and their sidecars; sidecars first, so that no sidecar outlives its part."""
    for pattern in (r"part-\d+\.json", r"part-\d+\.index"):
        for path in sorted(folder.parts.iterdir()) if folder.parts.exists() else []:
            if re.fullmatch(pattern, path.name):
                path.unlink()


def _check_record(path: Path, record: PartRecord, expected: PartRecord, mend: str) -> None:
    # The store first: a part of another store has another template too, and the store is the reason.
    if record.datastore != expected.datastore:
        raise _foreign(path, "store", record.datastore, expected.datastore, mend)
    if record.template != expected.template:
        raise _foreign(path, "template", record.template, expected.template, mend)
    found = structs.asdict(record)
    for name, value in structs.asdict(expected).items():
        if found[name] != value:
            raise DistlmError(f"{path}: {name} is {found[name]!r}, expected {value!r}; remove it and {mend}")


def _foreign(path: Path, what: str, named: str, expected: str, mend: str) -> DistlmError:
    return DistlmError(f"{path}: part of another {what} (it names {named}, expected {expected}); remove it and {mend}")
