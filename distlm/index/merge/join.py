"""`distlm index merge --parts FILE … --out FILE`: index files that faiss wrote, of one trained index, into one.

What faiss's own merges take on trust is compared here: the whole trained state (centroids, codebooks, ranges,
transforms, metric), byte for byte; that no id comes twice and none is missing; and that the files are whole. The
inputs are only read. The output is, byte for byte, what one process writes that adds the same codes file by file.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np

from distlm.errors import DistlmError, UsageError
from distlm.index.build.encode import transforms_of
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import require_faiss, require_new
from distlm.index.layout import Header
from distlm.index.merge.check import IdCheck
from distlm.index.merge.copy import MergeLayout
from distlm.index.merge.ids import IdBits, require_range
from distlm.index.merge.part_file import Part, end_ids, open_like, open_part, part_ids
from distlm.index.merge.write import UNIT_BYTES, write_merged
from distlm.index.records import JoinedPart, JoinRecord
from distlm.index.selfcheck import open_mapped
from distlm.runtime.files import bytes_hash, format_bytes, sync_folder
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stop import StopFlag

SAMPLE = 32
"""Lists looked at in the end: each maps some megabytes of the file."""
Ids = Literal["keep", "shift"]


def join_indexes(
    comm: Comm,
    stop: StopFlag,
    paths: Sequence[Path],
    out: Path,
    ids: Ids,
    gaps: bool = False,
    unit_bytes: int = UNIT_BYTES,
) -> JoinRecord:
    """Merge faiss files into `out`. Collective.

    ids: "keep" them (they number the whole store), or "shift" each file's by the keys of the files before it (every
    file numbers its own from 0; then the order of `paths` matters). gaps: ids may leave numbers out.
    Returns OUT.json, which lies beside it. Memory: about twice `unit_bytes`, the trained state, and one bit for each
    number up to the largest id; on rank 0 GATHERED_BYTES more. Raises DistlmError or UsageError, with the inputs
    untouched and no output, for what cannot be merged.
    """
    rank0_first(comm, lambda: _check_request(paths, out, ids))
    first = together(comm, lambda: open_part(paths[0]))
    mine = together(
        comm, lambda: {number: open_like(first, paths[number]) for number in range(comm.rank, len(paths), comm.size)}
    )
    every = {number: part for share in comm.allgather(mine) for number, part in share.items()}
    parts = [every[number] for number in range(len(paths))]
    shifts = _shifts(parts, ids)
    glanced = _first_ids(comm, stop, parts, shifts, ids, gaps)
    checked = glanced is None
    first_ids = _check_ids(comm, stop, parts, shifts, ids, gaps) if glanced is None else glanced
    temporary = out.with_name(f".{out.name}.tmp")
    while True:
        # In the order of their ids the files come together as one process adds them, whatever their order here.
        order = sorted(range(len(parts)), key=lambda number: first_ids[number])
        parts, shifts, first_ids = ([of[number] for number in order] for of in (parts, shifts, first_ids))
        layout = layout_of(first.state, parts, shifts)
        say(
            f"index merge: {len(parts)} parts, {sum(part.rows for part in parts)} keys, {format_bytes(layout.bytes)}",
            comm.rank,
        )
        names = [str(part.path) for part in parts]
        check = None if checked else IdCheck(names, _bits(parts, gaps), ids == "shift", shifts)
        digest = write_merged(comm, stop, layout, temporary, unit_bytes, check)
        if check is None:
            break
        first_ids, checked = _whole_ids(comm, check, parts, shifts, gaps), True
        if first_ids == sorted(first_ids):
            break
        say("index merge: the ends of the lists showed another order than all ids do: written once more", comm.rank)
    joined = [JoinedPart(str(part.path.absolute()), part.rows) for part in parts]
    if _unbroken(parts, first_ids) and not gaps:
        # Then they can be dropped by name.
        for entry, first_id in zip(joined, first_ids, strict=True):
            entry.first_id = first_id
    return rank0_first(comm, lambda: _finish(first.state, joined, layout, temporary, out, digest, ids))


def plan_join(paths: Sequence[Path], out: Path, ids: Ids) -> str:
    """What a merge would write, after the files' trained states were compared; ids are not read."""
    _check_request(paths, out, ids)
    first = open_part(paths[0])
    parts = [open_like(first, path) for path in paths]
    shifts = _shifts(parts, ids)
    layout = layout_of(first.state, parts, shifts)
    lines = [f"{part.path}: {part.rows} keys, ids {'from ' + str(shift) if ids == 'shift' else 'kept'}"
             for part, shift in zip(parts, shifts, strict=True)]  # fmt: skip
    total = sum(part.rows for part in parts)
    return "\n".join(
        [*lines, f"{out}: {total} keys, {len(parts[0].sizes)} lists, {format_bytes(layout.bytes)} of disk"]
    )


def layout_of(state: bytes, parts: Sequence[Part], shifts: Sequence[int]) -> MergeLayout:
    """Where every list of every part goes; `state`: their trained index."""
    return MergeLayout(
        header=Header(state).bytes(sum(part.rows for part in parts)),
        part_headers=tuple(part.header for part in parts),
        paths=tuple(part.path for part in parts),
        sizes=np.stack([part.sizes for part in parts]),
        code_size=parts[0].code_size,
        shifts=tuple(shifts),
    )


def natural_order(paths: Sequence[Path]) -> list[Path]:
    """Sorted so that shard_2 comes before shard_10."""

    def key(path: Path) -> list[tuple[bool, int, str]]:
        words = re.split(r"(\d+)", str(path))
        return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]

    return sorted(paths, key=key)


def _refuse_disorder(paths: Sequence[Path]) -> None:
    """DistlmError where files whose paths are equal but for their numbers do not follow these. Of other names nobody
    but the user knows the order."""
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\d+", "0", str(path)), []).append(path)
    for given in alike.values():
        for path, right in zip(given, natural_order(given), strict=True):
            if path != right:
                raise DistlmError(
                    f"--ids shift numbers the keys in the order of --parts, and {path} stands where {right} is "
                    "expected (a shell puts shard_10 before shard_2); name the files in the order of their keys, or, "
                    "if this is it, rename them, so that their numbers say so"
                )


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
    require_new(out)
    if not out.parent.is_dir():
        raise DistlmError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if ids == "shift":
        _refuse_disorder(paths)


def _shifts(parts: Sequence[Part], ids: Ids) -> list[int]:
    if ids == "keep":
        return [0] * len(parts)
    return [0, *np.cumsum([part.rows for part in parts[:-1]]).tolist()]


def _bits(parts: Sequence[Part], gaps: bool) -> IdBits:
    return IdBits(sum(part.rows for part in parts), gaps)


def _first_ids(
    comm: Comm, stop: StopFlag, parts: Sequence[Part], shifts: Sequence[int], ids: Ids, gaps: bool
) -> list[int] | None:
    """About the least id of each file, by the ends of some of its lists; None where their ranges overlap. Collective.

    Then all ids are read before anything is copied; else they are checked while they are in memory for that. Raises
    DistlmError for ids that cannot number the keys.
    """
    seen = _bits(parts, gaps)
    ends: dict[int, tuple[int, int]] = {}

    def look() -> None:
        for number in range(comm.rank, len(parts), comm.size):
            part = parts[number]
            found = end_ids(part)
            if len(found):
                require_range(found, part.rows, str(part.path), ids == "shift", seen)
                ends[number] = int(found.min()) + shifts[number], int(found.max()) + shifts[number]

    stop.check(comm, "index merge")
    together(comm, look)
    every = {number: range_ for share in comm.allgather(ends) for number, range_ in share.items()}
    ranges = sorted(every.values())
    if any(before[1] >= after[0] for before, after in pairwise(ranges)):
        return None
    return [every.get(number, (shifts[number], 0))[0] for number in range(len(parts))]


def _whole_ids(comm: Comm, check: IdCheck, parts: Sequence[Part], shifts: Sequence[int], gaps: bool) -> list[int]:
    """The least id of each file, after the units of all ranks were looked at. Collective.

    DistlmError for an id that comes twice or is missing.
    """
    check.bits.gather(comm)
    rank0_first(comm, lambda: _refuse_others(check.bits, parts, shifts, gaps))
    shares = comm.allgather(check.least)
    return [
        min((share[number] for share in shares if number in share), default=shifts[number])
        for number in range(len(parts))
    ]


def _check_ids(
    comm: Comm, stop: StopFlag, parts: Sequence[Part], shifts: Sequence[int], ids: Ids, gaps: bool
) -> list[int]:
    """Read all ids, each rank those of its files; the least id of each file, as it will be. Collective.

    DistlmError for an id that is negative, comes twice or is missing.
    """
    least: dict[int, int] = {}
    seen = _bits(parts, gaps)
    with Progress("index merge: check ids", len(parts), "parts", comm.rank) as progress:
        for first in range(0, len(parts), comm.size):
            stop.check(comm, "index merge")
            mine = range(first + comm.rank, min(first + comm.rank + 1, len(parts)))

            def mark(mine: range = mine) -> None:
                for number in mine:
                    part = parts[number]
                    for piece in filter(len, part_ids(part)):
                        first_id = require_range(piece, part.rows, str(part.path), ids == "shift", seen)
                        least[number] = min(least.get(number, first_id), first_id)
                        seen.add(piece + shifts[number])

            together(comm, mark)
            progress.advance(min(comm.size, len(parts) - first))
    seen.gather(comm)
    rank0_first(comm, lambda: _refuse_others(seen, parts, shifts, gaps))
    every_least = comm.allgather(least)
    return [every_least[number % comm.size].get(number, 0) + shifts[number] for number in range(len(parts))]


def _refuse_others(seen: IdBits, parts: Sequence[Part], shifts: Sequence[int], gaps: bool) -> None:
    """DistlmError for an id that comes twice, naming its files, or is missing; `seen`: by all ranks."""
    if seen.count() < seen.rows:
        # One comes twice, or that many could not be there. Which: read once more.
        pieces = (piece + shift for part, shift in zip(parts, shifts, strict=True) for piece in part_ids(part))
        number = seen.first_again(pieces)
        assert number is not None
        holders = [
            (part.path, sum(int(np.count_nonzero(piece == number - shift)) for piece in part_ids(part)))
            for part, shift in zip(parts, shifts, strict=True)
        ]
        where = [f"{path}{' twice' if count > 1 else ''}" for path, count in holders if count]
        raise DistlmError(
            f"the id {number} is in {' and in '.join(where)}; the files are copies, overlap, or each numbers its keys "
            "from 0 (then use --ids shift)"
        )
    _refuse_missing(seen, parts, gaps)


def _refuse_missing(seen: IdBits, parts: Sequence[Part], gaps: bool) -> None:
    missing = None if gaps else seen.missing()
    if missing is not None:
        raise DistlmError(
            f"the id {missing} is in none of the {len(parts)} files, which hold {seen.rows} keys; a file is missing "
            "(--gaps: numbers may be left out)"
        )


def _unbroken(parts: Sequence[Part], first_ids: Sequence[int]) -> bool:
    """Each part's ids are one range, of ids that tile the whole: `first_ids` rising, the least of each part."""
    filled = [(first, first + part.rows) for part, first in zip(parts, first_ids, strict=True) if part.rows]
    return all(before[1] == after[0] for before, after in pairwise(filled))


def _finish(
    state: bytes, parts: list[JoinedPart], layout: MergeLayout, temporary: Path, out: Path, digest: str, ids: Ids
) -> JoinRecord:
    """Check the file with faiss, give it its name, and write OUT.json beside it."""
    rows = sum(part.rows for part in parts)
    found = check_merged(temporary, rows)
    temporary.replace(out)
    sync_folder(out.parent)
    record = JoinRecord(
        rows=rows, bytes=layout.bytes, xxh3=digest, trained=bytes_hash(state), ids=ids, self_found=found, parts=parts
    )
    record.write(out.with_name(out.name + ".json"))
    return record


def check_merged(path: Path, rows: int) -> float:
    """The share of sampled keys, decoded from their codes, that find themselves in their own list."""
    faiss = require_faiss()
    index = open_mapped(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    inner, transforms = inverted_file(index), transforms_of(index)
    lists, width = inner.invlists, int(inner.code_size)
    if not index.ntotal == int(lists.compute_ntotal()) == rows:
        raise DistlmError(
            f"{path}: holds {lists.compute_ntotal()} keys, {rows} were merged; run the same command again"
        )
    inner.nprobe = 1
    filled = [number for number in range(inner.nlist) if lists.list_size(number)]
    found = []
    for number in filled[:: max(1, ceil(len(filled) / SAMPLE))]:
        size = lists.list_size(number)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        place = size // 2
        head = np.frombuffer(int(number).to_bytes(inner.coarse_code_size(), "little"), np.uint8)
        vector = index.sa_decode(np.concatenate([head, codes[place]])[None])
        for transform in transforms:
            vector = transform.apply(vector)
        near = min(SAMPLE, size)
        to_centroid = np.zeros((1, 1), np.float32)
        _, nearest = inner.search_preassigned(vector, near, np.array([[number]], np.int64), to_centroid)
        # Keys of one code are equally near: any of them may be kept.
        equal = int((codes == codes[place]).all(axis=1).sum())
        found.append(bool((nearest[0] == ids[place]).any()) or equal > near)
    return float(np.mean(found)) if found else 1.0
