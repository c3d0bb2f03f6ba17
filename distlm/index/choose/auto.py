"""index.factory=auto: a factory from rows, width and limits, by rules that were measured (docs/faiss-index.md)."""

from dataclasses import dataclass
from pathlib import Path

from distlm.config.schema import AUTO, ID_BYTES, IndexConfig
from distlm.errors import UsageError
from distlm.index.choose.proposals import RABITQ_BYTES, lists_of
from distlm.index.factory import KEYS_PER_LIST
from distlm.index.layout import IndexFolder
from distlm.index.records import ChosenFactory
from distlm.index.search.fastscan import MOST_BYTES, packed_bytes

DEFAULT_BYTES = 72
"""Bytes of a key where no limit is given: those of the papers' PQ64."""
LISTS = 4
"""Lists over √rows. Never found by HNSW: beyond some nprobe a graph of real centroids finds no further lists."""
SCALAR_BITS = ((8, "SQ8"), (6, "SQ6"), (4, "SQ4"))
"""Bits of a number of a key → its code, the finest first."""
LEAST_RABITQ = 16
"""Bytes of a code from which on a bit for each of many numbers is better than four for each of few."""
LEAST_KEPT = 0.5
"""Share of a key's numbers that must be left for 4 bits of each to be better than a bit of more."""


@dataclass(frozen=True)
class Chosen:
    """A factory and why."""

    factory: str
    why: list[str]


def resolve(config: IndexConfig, rows: int, width: int, folder: Path | None = None) -> Chosen:
    """index.factory, or what auto stands for in a store of `rows` keys of `width` values.

    What an index folder has kept (choice.json) for the same store and limits holds, whatever the rules have become.
    Raises UsageError for limits that leave nothing.
    """
    if config.factory != AUTO:
        return Chosen(config.factory, [])
    if folder is not None and (path := IndexFolder(folder).choice_json).is_file():
        kept = ChosenFactory.read(path)
        if _inputs(kept) == _inputs(record_of(config, rows, width, Chosen("", []))):
            return Chosen(kept.factory, kept.why)
    return choose(rows, width, config)


def said(chosen: Chosen) -> list[str]:
    """What the user should know of a choice; nothing where a factory was asked for."""
    return [f"index.factory={AUTO}: {chosen.factory} ({'; '.join(chosen.why)})"] if chosen.why else []


def choose(rows: int, width: int, config: IndexConfig) -> Chosen:
    """The rules. Raises UsageError for limits that leave nothing."""
    lists = lists_of(LISTS, rows, config.sample)
    # Centroids, and the whole matrix of a PCA beside the part that is used: the most that a trained index has.
    trained = 4 * lists * width + 8 * width**2
    code, why = _code(rows, width, *_code_bytes(config, rows, trained))
    transform, comma, codes = code.rpartition(",")
    wanted = lists_of(LISTS, rows, rows)
    short = f" (index.sample={config.sample} keys train no more; {wanted} would be better)" if lists < wanted else ""
    why.append(f"{lists} lists: {LISTS} times the square root of {rows} keys, or next to it{short}")
    return Chosen(f"{transform}{comma}IVF{lists},{codes}", why)


def record_of(config: IndexConfig, rows: int, width: int, chosen: Chosen) -> ChosenFactory:
    """What the index folder keeps."""
    return ChosenFactory(
        rows=rows, width=width, sample=config.sample, max_bytes_per_key=config.max_bytes_per_key,
        max_memory=config.max_memory, factory=chosen.factory, why=chosen.why,
    )  # fmt: skip


def _inputs(record: ChosenFactory) -> tuple[float, ...]:
    return record.rows, record.width, record.sample, record.max_bytes_per_key, record.max_memory


def _code_bytes(config: IndexConfig, rows: int, trained: int) -> tuple[int, str]:
    """Most bytes of a code, and what sets them, where an index without keys has `trained` bytes."""
    bounds = {}
    if config.max_bytes_per_key:
        bounds[f"index.max_bytes_per_key={config.max_bytes_per_key}"] = config.max_bytes_per_key
    if config.max_memory:
        bounds[f"index.max_memory={config.max_memory:g}"] = max(0, int((config.max_memory * 1e9 - trained) / rows))
    if not bounds:
        return DEFAULT_BYTES - ID_BYTES, f"the default of {DEFAULT_BYTES} bytes a key"
    why = min(bounds, key=lambda name: bounds[name])
    if bounds[why] <= ID_BYTES:
        raise UsageError(
            f"{why}: besides centroids {rows} keys get {bounds[why]} bytes each and their ids take {ID_BYTES}; set at "
            f"least index.max_memory={1.01 * ((ID_BYTES + 1) * rows + trained) / 1e9:.3g}, or 0 for no limit"
        )
    return bounds[why] - ID_BYTES, why


def _repacked(rows: int, subspaces: int) -> bool:
    """Whether there are keys enough to train codes of 4 bits, and few enough for FastScan."""
    return rows >= KEYS_PER_LIST << 4 and packed_bytes(rows, 0, -(-subspaces // 2)) <= MOST_BYTES


def _code(rows: int, width: int, most: int, limit: str) -> tuple[str, list[str]]:
    """Transform and code of at most `most` bytes."""
    pairs = width // 2
    if width % 2 == 0 and 0.9 * most <= pairs / 2 <= most and _repacked(rows, pairs):
        what = f"{-(-pairs // 2)} bytes of code, 4 bits for each of {pairs} pairs of values"
        return f"PQ{pairs}x4", [f"PQ{pairs}x4: {what} of keys of {width}, searched by FastScan, within {limit}"]
    for bits, name in SCALAR_BITS:
        if bits * width <= 8 * most:
            what = f"{-(-bits * width // 8)} bytes of code, {bits} bits for each value"
            return name, [f"{name}: {what} of keys of {width}, within {limit}"]
    kept, code, each = 2 * most, "SQ4", "4 bits"
    used, transform = most, "PCA"
    if most >= LEAST_RABITQ and kept < LEAST_KEPT * width:
        # Its numbers must be alike, which the rotation behind a PCARn makes them.
        kept, code, each, transform = min(width, 8 * (most - RABITQ_BYTES)), "RaBitQ", "a bit", "PCAR"
        used = -(-kept // 8) + RABITQ_BYTES
    name = f"{transform}{kept},{code}"
    return name, [f"{name}: {used} bytes of code, {each} for each of {kept} values of keys of {width}, within {limit}"]
