"""`distlm index drop`: an index without some of its keys; the others keep their ids."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from msgspec import UnsetType

from distlm.errors import DistlmError, UsageError
from distlm.index.faiss_module import require_new
from distlm.index.layout import Array, Header, lists_header
from distlm.index.merge.copy import read_at
from distlm.index.merge.join import check_merged
from distlm.index.merge.part_file import Part, open_part
from distlm.index.records import DropRecord, JoinRecord
from distlm.runtime.files import read_json, require_free_disk, sync_folder
from distlm.runtime.progress import Progress
from distlm.system_errors import told

Ranges = Sequence[tuple[int, int]]


def drop_keys(index: Path, ranges: Ranges, names: Sequence[str], out: Path) -> dict[str, int]:
    """Write `index` without the ids of `ranges` [low, high) and of the parts `names` to `out`; `index` is only read.

    names: parts that `index` was merged from, each by its path or the end of it that no other part has. Returns rows,
    dropped and bytes. Memory: the longest list. Raises DistlmError for names or ranges that are not in the index, and
    when nothing stays; UsageError for a name of several parts.
    """
    require_new(out)
    if not ranges and not names:
        raise UsageError("index drop: say what, with --ids LOW:HIGH … or --parts NAME …")
    part = open_part(index)
    ranges = [*ranges, *_part_ranges(index, names)]
    sizes = _kept_sizes(part, ranges, index)
    rows = int(sizes.sum())
    if not rows:
        raise DistlmError(f"{index}: no key would stay; an index without keys is its trained file")
    header = Header(part.state).bytes(rows) + lists_header(sizes, part.code_size)
    count = len(header) + rows * (part.code_size + 8)
    temporary = out.with_name(f".{out.name}.tmp")
    # A killed start has left it.
    temporary.unlink(missing_ok=True)
    require_free_disk(out.absolute().parent, count, "the smaller index")
    try:
        with told(out, temporary):
            digest = _write(part, ranges, header, temporary)
            check_merged(temporary, rows)
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(out.absolute().parent)
    dropped = part.rows - rows
    DropRecord(rows=rows, bytes=count, xxh3=digest, from_index=str(index.absolute()), dropped=list(ranges)).write(
        out.with_name(out.name + ".json")
    )
    return {"rows": rows, "dropped": dropped, "bytes": count}


def _part_ranges(index: Path, names: Sequence[str]) -> list[tuple[int, int]]:
    """Ids of the parts of a merged index."""
    if not names:
        return []
    beside = index.with_name(index.name + ".json")
    tree = read_json(beside, "what the index was merged from")
    # Beside an index that was extended or dropped from lies another record.
    other = isinstance(tree, dict) and "parts" not in tree
    merged = [] if other else JoinRecord.of_file(tree, beside).parts
    parts = {part.path: (part.first_id, part.rows) for part in merged if not isinstance(part.first_id, UnsetType)}
    found = [parts[_part_named(index, name, list(parts))] for name in names]
    return [(first, first + rows) for first, rows in found]


def _part_named(index: Path, name: str, paths: Sequence[str]) -> str:
    """The one of `paths`, absolute, that is `name`, as a path from here or as the end of one."""
    here = Path(name).resolve()
    end = Path(name).parts
    found = [path for path in paths if Path(path).resolve() == here] or [
        path for path in paths if Path(path).parts[-len(end) :] == end
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"index drop --parts {name}: {index} was merged from {len(found)} files of that name; name one by its "
            f"path: {', '.join(found)}"
        )
    lasts = [Path(path).name for path in paths]
    # A name alone does not tell some of them apart.
    shown = lasts if len(set(lasts)) == len(lasts) else paths
    few = ", ".join(sorted(shown)[:8]) or "none with ids of their own"
    raise DistlmError(f"{index}: was not merged from {name}; its parts are {few}")


def _lists(part: Part) -> Iterator[tuple[int, int, int]]:
    """(list, keys, place in the file) of the lists that hold keys."""
    places = part.header + np.concatenate([[0], np.cumsum(part.sizes * (part.code_size + 8))])
    for number in np.flatnonzero(part.sizes).tolist():
        yield number, int(part.sizes[number]), int(places[number])


def _kept(ids: Array, ranges: Ranges) -> Array:
    inside = np.zeros(len(ids), bool)
    for low, high in ranges:
        inside |= (ids >= low) & (ids < high)
    return ~inside


def _kept_sizes(part: Part, ranges: Ranges, index: Path) -> Array:
    """Keys that stay in each list, int64 [nlist]; DistlmError for a range without keys."""
    sizes = np.zeros_like(part.sizes)
    hits = np.zeros(len(ranges), np.int64)
    with Progress("index drop: look", part.rows, "keys", 0) as progress:
        for number, size, place in _lists(part):
            ids = np.frombuffer(read_at(part.path, place + size * part.code_size, 8 * size), "<i8")
            hits += [int(((ids >= low) & (ids < high)).sum()) for low, high in ranges]
            sizes[number] = _kept(ids, ranges).sum()
            progress.advance(size)
    for (low, high), hit in zip(ranges, hits, strict=True):
        if not hit:
            raise DistlmError(f"{index}: has no ids from {low} to {high - 1}; nothing was dropped")
    return sizes


def _write(part: Part, ranges: Ranges, header: bytes, path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("wb") as stream, Progress("index drop", part.rows, "keys", 0) as progress:

        def put(data: bytes) -> None:
            stream.write(data)
            digest.update(data)

        put(header)
        for _, size, place in _lists(part):
            raw = read_at(part.path, place, size * (part.code_size + 8))
            codes = np.frombuffer(raw, np.uint8, size * part.code_size).reshape(size, part.code_size)
            ids = np.frombuffer(raw, "<i8", size, size * part.code_size)
            kept = _kept(ids, ranges)
            put(codes[kept].tobytes())
            put(ids[kept].tobytes())
            progress.advance(size)
        stream.flush()
        os.fsync(stream.fileno())
    return str(digest.hexdigest())
