"""What the search will need: disk, memory, time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from distlm.config.schema import RunConfig
from distlm.data.blocks import eval_blocks
from distlm.data.estimate import expected_tokens
from distlm.data.tokens import TokenFiles
from distlm.datastore.lengths import lengths_of
from distlm.errors import DistlmError, UsageError
from distlm.index.choose.plan import fitted
from distlm.index.factory import Factory
from distlm.index.search.candidates import candidates_of, is_coarse, refuse_too_many
from distlm.index.search.fastscan import MOST_BYTES, packed_bytes
from distlm.index.search.lists import BATCH_BYTES
from distlm.knnlm.search.cut import MORE_UNITS, planned_cut
from distlm.knnlm.search.disk import TokenBytes, peak_bytes
from distlm.knnlm.search.rescore import CHUNK_BYTES, GROUP_BYTES, passes
from distlm.models.described import causal, causal_kind, model_bytes, model_of
from distlm.models.kind import CausalDescription
from distlm.models.registry import kind
from distlm.runtime.files import format_bytes
from distlm.runtime.local.place import SETTING, asked_place
from distlm.runtime.plan import StagePlan, machine_flops, rank_flops
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import idle_note, speedup

_BASE_MEMORY = 450_000_000
"""Python with torch and faiss."""
_CODES_PER_S = 1.5e9
"""Bytes of PQ code a core compares in a second (table look-ups), from benchmarks/rescoring.py."""
_PACKED_CODES_PER_S = 6e9
"""The same for a 4-bit index repacked for FastScan."""
_UNPACKED_CODES_PER_S = 0.16e9
"""The same for a 4-bit index that is too large to be repacked."""
_RATES = {"SQ8": 4e9, "SQ6": 0.5e9, "SQ4": 4e9, "RaBitQ": 4e9, "Flat": 8e9}
"""The same for other codes, from benchmarks/candidates.py; SQ8 is taken to be like SQ4, Flat to be bound by memory."""
_QUERY_S = 6e-5
"""Seconds of one core for a query besides its codes: its lists are found, its look-up tables made (IVF1024,PQ32)."""
_NEIGHBOUR_S = 2e-7
"""Seconds of one core for each neighbour that a query keeps."""
_WRITTEN_BYTES_PER_S = 4e8
"""Assumed rate at which units are written and flushed."""
_DOT_BYTES_PER_S = 8e9
"""Bytes of fp32 keys a core multiplies with scattered queries in a second, from benchmarks/rescoring.py."""
_DISK_BYTES_PER_S = 1e9
"""Assumed sequential read rate of all ranks together."""
_READ_FLOPS = 7e9
"""Floating-point operations in a second of one core that reads one token after the other, which the memory bounds: the
40 M of awd-lstm-wikitext2 take 5.6 ms."""
_START_S = 2.0
"""Opening files and a model's description."""
_CELL_S = 2.0e-9
"""Seconds of one core for one distance at one temperature."""
_MIXTURES = 6
"""About how many mixtures are scored and resampled."""
_RESAMPLED_S = 2.0e-7
"""Seconds of one token of a mixture, the bootstrap included."""
_PQ = re.compile(r"(?<!O)PQ(\d+)(?:x(\d+))?")
"""Sub-quantisers and, where they are not 8, bits of a product quantiser in a factory string."""


READ_FIRST = "one rank reads each split first, one token after the other (knn.carry): more ranks do not shorten that"


@dataclass(frozen=True)
class _Counts:
    queries: int
    rows: int
    vocabulary: int
    notes: tuple[str, ...]
    exact: bool


def plan_search(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of the search of all splits. Raises UsageError for more neighbours than the store has rows."""
    knn, model, k = config.knn, causal(model_of(config)), config.knn.k
    width, item = model.width, config.datastore.key_item
    counts = _count(config)
    notes = list(counts.notes)
    if not counts.queries or not counts.rows:
        work = f"{k} neighbours of each token ({', '.join(knn.splits)})"
        return StagePlan("knn search", work, 0, 0, None, notes, known=False)
    index = _index_of(config, counts.rows, width)
    rescores = knn.similarity == "dot" or (knn.search == "index" and knn.distances == "exact")
    candidates = candidates_of(knn, counts.rows, index is not None and is_coarse(index.code_size, width))
    notes += _too_many(config, counts, candidates, index)
    if candidates > k:
        notes.append(f"exact distances choose {k} of {candidates} that the index finds (knn.candidates)")
    splits = [_count(config, [split]).queries for split in knn.splits]
    of_token = TokenBytes.of(width, item, k, candidates if rescores else 0)
    disk = peak_bytes(splits, of_token)
    if rescores:
        kept = counts.queries * of_token.kept
        notes.append(f"of the disk {format_bytes(disk - kept)} are free again afterwards; the "
                     f"{counts.rows * width * item / 1e9:.1f} GB of keys are read once in order")  # fmt: skip
    notes += _copied(config, counts.rows, width, index, candidates if rescores else 0)
    pairs = counts.queries * (4 * width + 8 * candidates)
    batch = knn.batch_blocks * (knn.context_window + knn.block)
    activations = 4 * batch * (8 * width + causal_kind(model).inner_floats(model))
    phases = _units(config)
    blocks = sum(phases.blocks)
    tokens = min(counts.queries, planned_cut(blocks, knn).blocks_per_unit * knn.block)
    unit = 3 * tokens * ((of_token.found or of_token.kept) + 4 * width)
    if knn.search == "index" and knn.scan == "lists":
        # What a batch's queries have found: kept, sent, and received.
        unit = max(unit, 3 * BATCH_BYTES)
    codes = counts.rows * index.key_bytes if index else 128 << 20
    packed = _packed_bytes(index, counts.rows) if index else 0
    memory = (
        _BASE_MEMORY + model_bytes(model, counts.vocabulary) + activations + codes + packed
        + max(unit, min(pairs, GROUP_BYTES) + 4 * CHUNK_BYTES if rescores else 0)
    )  # fmt: skip
    notes.append("memory counts the memory-mapped index, which ranks of a node share")
    if packed:
        notes.append(f"and the copy of it that each rank repacks for FastScan, {packed / 1e9:.1f} GB")
    notes += idle_note(phases.units, ranks, MORE_UNITS)
    seconds, rescoring = _seconds(config, model, counts, index, candidates if rescores else 0, ranks)
    # Each split on another rank.
    reading = sum(reading_seconds(config, model, tokens) for tokens in splits) if ranks < 2 else (
        max(reading_seconds(config, model, tokens) for tokens in splits))  # fmt: skip
    if reading:
        notes.append(READ_FIRST)
    return StagePlan(
        "knn search",
        f"{counts.queries} queries x {k} neighbours among {counts.rows} rows ({', '.join(knn.splits)})",
        disk_bytes=disk,
        memory_bytes=memory,
        seconds=seconds / speedup([phases.units], max(ranks, 1))
        + reading
        + rescoring / max(ranks, 1)
        + counts.queries * of_token.written / _WRITTEN_BYTES_PER_S,
        notes=notes,
        units=(phases.units,),
    )


def reading_seconds(config: RunConfig, model: CausalDescription, tokens: int) -> float:
    """Seconds in which one rank reads a split in one go, where the state is carried from block to block (knn.carry)."""
    if not config.knn.carry:
        return 0.0
    length = config.knn.block
    return tokens * causal_kind(model).forward_flops(model, "output", length) / _READ_FLOPS


def plan_tune(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of choosing λ, temperature and k on the first split, on one rank."""
    knn, counts = config.knn, _count(config, config.knn.splits[:1])
    work = f"{len(knn.lambdas)} λ x {len(knn.temperatures)} T x {len(knn.tried_ks)} k on {knn.splits[0]}"
    if not counts.queries:
        return StagePlan("knn tune", work, 0, 0, None, list(counts.notes), known=False)
    cells = counts.queries * knn.k
    # Each temperature is one exponential of every distance; buckets and gate hold some numbers of each token.
    seconds = _START_S + cells * (len(knn.temperatures) + 2) * _CELL_S
    memory = _BASE_MEMORY + counts.queries * 8 * 24 + 12 * knn.blocks_per_unit * knn.block * knn.k
    return StagePlan("knn tune", work, 1 << 20, memory, seconds, [*counts.notes, *_alone(ranks)])


def plan_evaluate(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of evaluating every split with the frozen settings, on one rank."""
    knn, counts = config.knn, _count(config)
    work = f"every mixture of {', '.join(knn.splits)}"
    if not counts.queries:
        return StagePlan("knn evaluate", work, 0, 0, None, list(counts.notes), known=False)
    notes, width = [*counts.notes, *_alone(ranks)], causal(model_of(config)).width
    seconds = _START_S + counts.queries * (knn.k * 4 * _CELL_S + _MIXTURES * _RESAMPLED_S)
    if knn.search == "index" and knn.similarity == "l2" and knn.ladder_sample:
        sample = min(knn.ladder_sample, counts.queries)
        item = config.datastore.key_item
        seconds += 2.0 * sample * counts.rows * width / machine_flops() + counts.rows * width * item / _DISK_BYTES_PER_S
        notes.append(
            f"the exactness ladder compares {sample} tokens with every key (knn.ladder_sample=0: it is left out)"
        )
    memory = _BASE_MEMORY + (128 << 20) + counts.queries * 8 * 3 * _MIXTURES
    return StagePlan("knn evaluate", work, counts.queries * (8 * _MIXTURES + 4), memory, seconds, notes)


@dataclass(frozen=True)
class _Units:
    blocks: tuple[int, ...]
    """Evaluation blocks of each split."""
    units: int
    """Units of work of all."""


def _units(config: RunConfig) -> _Units:
    """From the token files; where there are none the blocks are taken to be nine tenths full, of whole lines."""
    knn = config.knn
    try:
        files = TokenFiles.open(RunDir.of(config).tokens(config))
        blocks = [len(eval_blocks(files.split(split), knn.context_window, knn.block)) for split in knn.splits]
    except DistlmError:
        blocks = [ceil(_count(config, [split]).queries / (0.9 * knn.block)) for split in knn.splits]
    return _Units(tuple(blocks), sum(len(planned_cut(count, knn).units(count)) for count in blocks))


def _copied(config: RunConfig, rows: int, width: int, index: Factory | None, rescored: int) -> list[str]:
    """What launch.stage_in copies to each node (search/local.py)."""
    place, knn = asked_place(config.launch.stage_in), config.knn
    if not place:
        return []
    keys, values = rows * width * config.datastore.key_item, 4 * rows
    if index is None:
        return [f"{SETTING}={place}: {format_bytes(keys + values)} are copied to each node (keys and values)"]
    # Codes and ids, centroids and codebook.
    shared = rows * index.key_bytes + 4 * width * (index.nlist + 256) + values
    note = f"{SETTING}={place}: {format_bytes(shared)} are copied to each node (index and values)"
    queries = [_count(config, [split]).queries for split in knn.splits]
    if rescored and passes(queries, rescored, width) > 1:
        note += f", and {format_bytes(keys)} of keys over all nodes: to each those of the shards that its ranks score"
    return [note]


def _alone(ranks: int) -> list[str]:
    return ["one rank works, the others wait"] if ranks > 1 else []


def _too_many(config: RunConfig, counts: _Counts, candidates: int, index: Factory | None) -> list[str]:
    """What is asked for in vain. Raises UsageError where it is certain that a search for so many makes no sense."""
    knn, notes = config.knn, []
    if knn.k > counts.rows * (1 if counts.exact else 2):
        raise UsageError(
            f"knn.k={knn.k}: the datastore has {'' if counts.exact else 'about '}{counts.rows} rows; lower knn.k"
        )
    if index:
        refuse_too_many(knn, candidates, index.nlist)
    if index and knn.nprobe > index.nlist:
        notes.append(f"knn.nprobe={knn.nprobe} is more than the {index.nlist} lists of {index.used}: all are searched")
    return notes


def _seconds(
    config: RunConfig, model: CausalDescription, counts: _Counts, index: Factory | None, rescored: int, ranks: int
) -> tuple[float, float]:
    """Seconds of one rank of `ranks` if it did all, on the CPU: forward passes and search, and exact distances of
    `rescored` candidates of each query (0: none are)."""
    knn, width, flops = config.knn, model.width, rank_flops(config.launch.threads, ranks)
    length = knn.context_window + knn.block
    forward = counts.queries * (length / knn.block) * causal_kind(model).forward_flops(model, "output", length) / flops
    if index is None:
        search = 2.0 * counts.queries * counts.rows * width / flops
    else:
        scanned = counts.rows * min(1.0, knn.nprobe / index.nlist)
        of_query = _QUERY_S + max(rescored, knn.k) * _NEIGHBOUR_S + 2 * index.nlist * width / flops
        search = counts.queries * (scanned * index.code_size / _codes_rate(index, counts.rows) + of_query)
    if not rescored:
        return forward + search, 0.0
    item = config.datastore.key_item
    dots = counts.queries * rescored * 4 * width / _DOT_BYTES_PER_S
    return forward + search, dots + counts.rows * width * item / _DISK_BYTES_PER_S


def _codes_rate(index: Factory, rows: int) -> float:
    """Bytes of code that a core compares in a second."""
    if _bits(index) == 4:
        return _PACKED_CODES_PER_S if _packed_bytes(index, rows) else _UNPACKED_CODES_PER_S
    kind = index.used.rpartition(",")[2]
    return next((rate for name, rate in _RATES.items() if kind.startswith(name)), _CODES_PER_S)


def _packed_bytes(index: Factory, rows: int) -> int:
    """Memory of the copy for FastScan: 0 where none is made."""
    if _bits(index) != 4:
        return 0
    count = packed_bytes(rows, index.nlist, index.code_size)
    return count if count <= MOST_BYTES else 0


def _index_of(config: RunConfig, rows: int, width: int) -> Factory | None:
    """The index that is searched; None for brute force."""
    return fitted(config, rows, width)[1] if config.knn.search == "index" else None


def _bits(index: Factory) -> int:
    """Bits of one number of the product quantiser, 0 without one."""
    found = _PQ.search(index.used)
    return int(found[2] or 8) if found else 0


def _count(config: RunConfig, splits: Sequence[str] | None = None) -> _Counts:
    """Tokens of the splits (of knn.splits) and rows of the store, from the token files or estimated from the text."""
    found, store = expected_tokens(config), config.datastore
    queries = sum(found.tokens.get(split, 0) for split in (config.knn.splits if splits is None else splits))
    rows = max(0, found.tokens.get(store.split, 0) - lengths_of(config)[0])
    words = found.words or kind(config.model.kind).assumed_words(config)
    return _Counts(queries, rows, words, found.note, found.exact)
