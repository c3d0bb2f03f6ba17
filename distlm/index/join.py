"""`distlm index merge --parts FILE … --out FILE`: index files that faiss wrote, of one trained index, into one.

What faiss's own merges take on trust is compared here: the whole trained state (centroids, codebooks, ranges,
transforms, metric), byte for byte; that no id comes twice and none is missing; and that the files are whole. The
inputs are only read. The output is, byte for byte, what one process writes that adds the same codes file by file.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distlm.errors import DistlmError, UsageError
from distlm.index.copy import MergeLayout, read_at
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import require_faiss
from distlm.index.ids import IdBits, require_range
from distlm.index.layout import Array, Header, lists_header, read_list_sizes, serialise, set_count
from distlm.index.selfcheck import open_mapped
from distlm.index.write import write_merged
from distlm.runtime.collective import rank0_first, together
from distlm.runtime.comm import Comm
from distlm.runtime.files import bytes_hash, format_bytes, sync_folder, write_json
from distlm.runtime.progress import Progress, say
from distlm.runtime.stop import StopFlag

UNIT_BYTES = 64 << 20
"""Output of one unit; a rank holds about twice this."""
READ_BYTES = 16 << 20
"""Codes and ids read at once while ids are checked."""
SAMPLE = 64
Ids = Literal["keep", "shift"]


@dataclass(frozen=True)
class Part:
    """One input file."""

    path: Path
    state: bytes
    """The trained index without keys, as faiss writes it."""
    sizes: Array
    """Keys of each list, int64 [nlist]."""
    code_size: int
    header: int
    """Bytes before the first list."""

    @property
    def rows(self) -> int:
        """Keys."""
        return int(self.sizes.sum())


def join_indexes(
    comm: Comm,
    stop: StopFlag,
    paths: Sequence[Path],
    out: Path,
    ids: Ids,
    gaps: bool = False,
    unit_bytes: int = UNIT_BYTES,
) -> dict[str, Any]:
    """Merge faiss files into `out`. Collective.

    ids: "keep" them (they number the whole store), or "shift" each file's by the keys of the files before it (every
    file numbers its own from 0; then the order of `paths` matters). gaps: ids may leave numbers out.
    Returns rows, bytes, parts, xxh3 and self_found. Memory: about twice `unit_bytes`, the trained state, and on rank 0
    one bit for each id. Raises DistlmError or UsageError, with the inputs untouched and no output, for what cannot be
    merged.
    """
    rank0_first(comm, lambda: _check_request(paths, out, ids))
    parts = together(comm, lambda: [open_part(path) for path in paths])
    together(comm, lambda: check_states(parts))
    shifts = _shifts(parts, ids)
    first_ids = _check_ids(comm, stop, parts, shifts, ids, gaps)
    # In the order of their ids the files come together as one process adds them, whatever their order here.
    order = sorted(range(len(parts)), key=lambda number: first_ids[number])
    parts, shifts = [parts[number] for number in order], [shifts[number] for number in order]
    layout = layout_of(parts, shifts)
    say(
        f"index merge: {len(parts)} parts, {sum(part.rows for part in parts)} keys, {format_bytes(layout.bytes)}",
        comm.rank,
    )
    temporary = out.with_name(f".{out.name}.tmp")
    digest = write_merged(comm, stop, layout, temporary, unit_bytes)
    return rank0_first(comm, lambda: _finish(parts, layout, temporary, out, digest, ids))


def plan_join(paths: Sequence[Path], out: Path, ids: Ids) -> str:
    """What a merge would write, after the files' trained states were compared; ids are not read."""
    _check_request(paths, out, ids)
    parts = [open_part(path) for path in paths]
    check_states(parts)
    layout = layout_of(parts, _shifts(parts, ids))
    lines = [f"{part.path}: {part.rows} keys, ids {'from ' + str(shift) if ids == 'shift' else 'kept'}"
             for part, shift in zip(parts, _shifts(parts, ids), strict=True)]  # fmt: skip
    total = sum(part.rows for part in parts)
    return "\n".join(
        [*lines, f"{out}: {total} keys, {len(parts[0].sizes)} lists, {format_bytes(layout.bytes)} of disk"]
    )


def open_part(path: Path) -> Part:
    """Read the trained state and the list sizes of a faiss file; nothing of its lists.

    Raises DistlmError for a file that faiss cannot read, that is cut, or whose type cannot be merged on disk.
    """
    faiss = require_faiss()
    index = open_mapped(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    _check_type(index, path)
    inner = inverted_file(index)
    lists, code_size = inner.invlists, int(inner.code_size)
    if int(lists.code_size) != code_size:
        raise DistlmError(f"{path}: lists of {lists.code_size}-byte codes, the index has {code_size}-byte codes")
    sizes = np.array([lists.list_size(number) for number in range(inner.nlist)], np.int64)
    if not index.ntotal == inner.ntotal == sizes.sum():
        raise DistlmError(f"{path}: its lists hold {sizes.sum()} keys, its head says {index.ntotal}; it is damaged")
    header = _header_bytes(path, sizes, code_size)
    # The number of lists that a search probes is a setting of the reader, no trained state.
    inner.nprobe = 1
    empty = faiss.ArrayInvertedLists(inner.nlist, code_size)
    # The index owns it from here on.
    empty.this.disown()
    inner.replace_invlists(empty, True)
    set_count(index, 0)
    return Part(path, serialise(index), sizes, code_size, header)


def check_states(parts: Sequence[Part]) -> None:
    """DistlmError naming the first file whose trained state is not the first file's, and what differs."""
    first = parts[0]
    for part in parts[1:]:
        if part.state != first.state:
            raise DistlmError(
                f"{part.path}: another trained index than {first.path} ({_difference(first, part)}); parts of one "
                "index are added to copies of one trained file: add it anew to that, or leave it out"
            )


def layout_of(parts: Sequence[Part], shifts: Sequence[int]) -> MergeLayout:
    """Where every list of every part goes."""
    header = Header(parts[0].state)
    return MergeLayout(
        header=header.bytes(sum(part.rows for part in parts)), part_headers=tuple(part.header for part in parts),
        paths=tuple(part.path for part in parts), sizes=np.stack([part.sizes for part in parts]),
        code_size=parts[0].code_size, shifts=tuple(shifts),
    )  # fmt: skip


def natural_order(paths: Sequence[Path]) -> list[Path]:
    """Sorted so that shard_2 comes before shard_10."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in re.split(r"(\d+)", str(path))]

    return sorted(paths, key=key)


def _check_request(paths: Sequence[Path], out: Path, ids: Ids) -> None:
    if not paths:
        raise UsageError("index merge --parts: name the files")
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        if not path.is_file():
            raise DistlmError(f"{path}: no such file; --parts takes index files that faiss wrote")
        status = path.stat()
        same = seen.get((status.st_dev, status.st_ino))
        if same is not None:
            raise DistlmError(f"--parts names {path} twice" + (f" (also as {same})" if same != path else ""))
        seen[status.st_dev, status.st_ino] = path
    if out.exists():
        raise DistlmError(f"--out {out}: is there already; remove it, or write to another file")
    if not out.parent.is_dir():
        raise DistlmError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if ids == "shift" and list(paths) != natural_order(paths):
        right = natural_order(paths)
        wrong = next(place for place, (a, b) in enumerate(zip(paths, right, strict=True)) if a != b)
        raise DistlmError(
            f"--ids shift numbers the keys in the order of --parts, and {paths[wrong]} stands where {right[wrong]} is "
            "expected (a shell puts shard_10 before shard_2); name the files in the order of their keys"
        )


def _check_type(index: Any, path: Path) -> None:
    """DistlmError for a type whose lists cannot be copied, by name."""
    faiss = require_faiss()
    outer = faiss.downcast_index(index)
    kind = type(outer).__name__
    inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
    name = type(inner).__name__
    if isinstance(outer, faiss.IndexIDMap):
        raise DistlmError(f"{path}: {kind} keeps its ids outside the lists; add with ids to the inverted file itself")
    if not isinstance(inner, faiss.IndexIVF):
        over = "" if inner is outer else f"{kind} over "
        raise DistlmError(f"{path}: {over}{name} has no inverted lists to merge; build IVF…,PQ…, IVF…,SQ8 or IVF…,Flat")
    if "FastScan" in name:
        raise DistlmError(
            f"{path}: {name} packs codes in blocks of 32, whose lists cannot be joined or renumbered on disk; keep the "
            "plain form (IVF…,PQ…x4 without fs) on disk and repack it when it is loaded"
        )
    if isinstance(inner, faiss.IndexIVFPQR):
        raise DistlmError(f"{path}: {name} keeps second codes outside the lists; build IVF…,PQ… and refine by the keys")


def _header_bytes(path: Path, sizes: Array, code_size: int) -> int:
    """Bytes before the first list; DistlmError when the file does not end with its lists, or is cut."""
    body, size = int(sizes.sum()) * (code_size + 8), path.stat().st_size
    lead = len(lists_header(sizes, code_size))
    start = size - body - lead
    try:
        if start < 0:
            raise ValueError("the file ends early")
        with path.open("rb") as stream:
            stream.seek(start)
            if not np.array_equal(read_list_sizes(stream, len(sizes), code_size), sizes):
                raise ValueError("other list sizes than faiss reads")
    except ValueError as error:
        raise DistlmError(
            f"{path}: does not end with its inverted lists ({error}); it is cut, or its lists lie in another file: "
            "read it with faiss and write it as one"
        ) from error
    return start + lead


def _difference(first: Part, other: Part) -> str:
    """What differs between two trained indexes, in words."""
    faiss = require_faiss()
    a, b = (faiss.deserialize_index(np.frombuffer(part.state, np.uint8).copy(), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            for part in (first, other))  # fmt: skip
    x, y = inverted_file(a), inverted_file(b)
    for what, of in (("type", lambda index, inner: (type(faiss.downcast_index(index)).__name__, type(inner).__name__)),
                     ("width", lambda index, inner: index.d), ("metric", lambda index, inner: inner.metric_type),
                     ("lists", lambda index, inner: inner.nlist), ("code size", lambda index, inner: inner.code_size),
                     ("by_residual", lambda index, inner: inner.by_residual)):  # fmt: skip
        mine, theirs = of(a, x), of(b, y)
        if mine != theirs:
            return f"{what} {theirs} instead of {mine}"
    if not np.array_equal(_centroids(x), _centroids(y)):
        return "other coarse centroids"
    if hasattr(x, "pq") and not np.array_equal(
        faiss.vector_to_array(x.pq.centroids), faiss.vector_to_array(y.pq.centroids)
    ):
        return "another product-quantiser codebook on the same centroids"
    if hasattr(x, "sq") and not np.array_equal(
        faiss.vector_to_array(x.sq.trained), faiss.vector_to_array(y.sq.trained)
    ):
        return "other scalar-quantiser ranges on the same centroids"
    if type(faiss.downcast_index(a)).__name__ == "IndexPreTransform":
        return "another transform (PCA, OPQ) or other settings"
    return "other settings"


def _centroids(inner: Any) -> Array:
    return np.asarray(inner.quantizer.reconstruct_n(0, inner.nlist))


def _shifts(parts: Sequence[Part], ids: Ids) -> list[int]:
    if ids == "keep":
        return [0] * len(parts)
    return [0, *np.cumsum([part.rows for part in parts[:-1]]).tolist()]


def _check_ids(
    comm: Comm, stop: StopFlag, parts: Sequence[Part], shifts: Sequence[int], ids: Ids, gaps: bool
) -> list[int]:
    """Read all ids, each rank those of its files; the least id of each file, as it will be. Collective.

    DistlmError for an id that is negative, comes twice or is missing.
    """
    least: dict[int, int] = {}
    seen = IdBits(sum(part.rows for part in parts), gaps)
    with Progress("index merge: check ids", len(parts), "parts", comm.rank) as progress:
        for first in range(0, len(parts), comm.size):
            stop.check(comm, "index merge (it starts over from the parts)")
            mine = range(first + comm.rank, min(first + comm.rank + 1, len(parts)))

            def mark(mine: range = mine) -> int | None:
                for number in mine:
                    part = parts[number]
                    for piece in filter(len, part_ids(part)):
                        require_range(piece, part.rows, str(part.path), ids == "shift", seen)
                        least[number] = min(least.get(number, piece.min()), int(piece.min()))
                        twice = seen.add(piece + shifts[number])
                        if twice is not None:
                            return twice
                return None

            _refuse_twice(
                comm, next((n for n in comm.allgather(together(comm, mark)) if n is not None), None), parts, shifts
            )
            progress.advance(min(comm.size, len(parts) - first))
    every = comm.gather(seen)
    _refuse_twice(comm, rank0_first(comm, lambda: seen.join(every[1:] if every else [])), parts, shifts)
    rank0_first(comm, lambda: _refuse_missing(seen, parts, gaps))
    every_least = comm.allgather(least)
    return [every_least[number % comm.size].get(number, 0) + shifts[number] for number in range(len(parts))]


def _refuse_twice(comm: Comm, number: int | None, parts: Sequence[Part], shifts: Sequence[int]) -> None:
    if number is None:
        return

    def refuse() -> None:
        holders = [
            (part.path, sum(int(np.count_nonzero(piece == number - shift)) for piece in part_ids(part)))
            for part, shift in zip(parts, shifts, strict=True)
        ]
        where = [f"{path}{' twice' if count > 1 else ''}" for path, count in holders if count]
        raise DistlmError(
            f"the id {number} is in {' and in '.join(where)}; the files are copies, overlap, or each numbers its keys "
            "from 0 (then use --ids shift)"
        )

    rank0_first(comm, refuse)


def _refuse_missing(seen: IdBits, parts: Sequence[Part], gaps: bool) -> None:
    missing = None if gaps else seen.missing()
    if missing is not None:
        raise DistlmError(
            f"the id {missing} is in none of the {len(parts)} files, which hold {seen.rows} keys; a file is missing "
            "(--gaps: numbers may be left out)"
        )


def part_ids(part: Part) -> Iterator[Array]:
    """The ids of a part, list by list, int64; about READ_BYTES of the file at a time."""
    width = part.code_size
    ends = np.cumsum(part.sizes * (width + 8))
    first, held = 0, 0
    while first < len(part.sizes):
        last = max(first + 1, int(np.searchsorted(ends, held + READ_BYTES, side="right")))
        sizes, count = part.sizes[first:last], int(ends[last - 1]) - held
        if last == first + 1:
            # One list, maybe a large one: its ids alone.
            start, size = part.header + held + int(sizes[0]) * width, int(sizes[0]) * 8
            for skip in range(0, size, READ_BYTES):
                yield np.frombuffer(read_at(part.path, start + skip, min(READ_BYTES, size - skip)), "<i8")
        else:
            raw = np.frombuffer(read_at(part.path, part.header + held, count), np.uint8)
            starts = np.concatenate([[0], np.cumsum(sizes * (width + 8))[:-1]]) + sizes * width
            pairs = zip(starts.tolist(), sizes.tolist(), strict=True)
            yield np.concatenate([raw[start : start + 8 * size].view("<i8") for start, size in pairs])
        first, held = last, held + count


def _finish(
    parts: Sequence[Part], layout: MergeLayout, temporary: Path, out: Path, digest: str, ids: Ids
) -> dict[str, Any]:
    """Check the file with faiss, give it its name, and write OUT.json beside it."""
    found = _check_merged(temporary, sum(part.rows for part in parts))
    temporary.replace(out)
    sync_folder(out.parent)
    record = {
        "format": 1, "rows": sum(part.rows for part in parts), "bytes": layout.bytes, "xxh3": digest,
        "trained": bytes_hash(parts[0].state), "ids": ids, "self_found": found,
        "parts": [{"path": str(part.path.absolute()), "rows": part.rows} for part in parts],
    }  # fmt: skip
    write_json(out.with_name(out.name + ".json"), record)
    return {**record, "parts": len(parts)}


def _check_merged(path: Path, rows: int) -> float:
    """The share of sampled keys, decoded from their codes, that find themselves in their own list."""
    faiss = require_faiss()
    index = open_mapped(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    inner = inverted_file(index)
    lists = inner.invlists
    if not index.ntotal == int(lists.compute_ntotal()) == rows:
        raise DistlmError(
            f"{path}: holds {lists.compute_ntotal()} keys, {rows} were merged; run the same command again"
        )
    filled = [number for number in range(inner.nlist) if lists.list_size(number)]
    found = []
    for number in filled[:: max(1, ceil(len(filled) / SAMPLE))]:
        size, width = lists.list_size(number), inner.code_size
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)
        numbers = faiss.rev_swig_ptr(lists.get_ids(number), size)
        place = size // 2
        code = np.concatenate([_list_number(inner, number), codes[place]])
        near, ids = _search_list(inner, number, index.sa_decode(code[None]), index, min(SAMPLE, size))
        # Keys of one code are equally near: any of them may be kept.
        found.append(bool((ids == numbers[place]).any()) or bool((codes == codes[place]).all(1).sum() > len(ids)))
        del near
    return float(np.mean(found)) if found else 1.0


def _search_list(inner: Any, number: int, vectors: Array, index: Any, k: int) -> tuple[Array, Array]:
    """The k nearest of one list."""
    from distlm.index.encode import transforms_of

    for transform in transforms_of(index):
        vectors = transform.apply(vectors)
    inner.nprobe = 1
    nearest = np.array([[number]], np.int64)
    distances, ids = inner.search_preassigned(vectors, k, nearest, np.zeros((1, 1), np.float32))
    return distances[0], ids[0]


def _list_number(inner: Any, number: int) -> Array:
    """The list number as `sa_encode` writes it, uint8 [coarse code size]."""
    return np.frombuffer(int(number).to_bytes(inner.coarse_code_size(), "little"), np.uint8)
