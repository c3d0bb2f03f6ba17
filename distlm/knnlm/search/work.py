"""Units of work of a search: what one unit of evaluation blocks or one key shard needs; nothing here is collective."""

import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from distlm.data.blocks import Blocks, eval_blocks
from distlm.datastore.plan import Unit as Range
from distlm.errors import DistlmError
from distlm.index.pairs import SortedPairs, sort_pairs
from distlm.knnlm.search.carried import carried_bytes, drop_carried, open_carried
from distlm.knnlm.search.cut import Cut, cut_of
from distlm.knnlm.search.disk import TokenBytes
from distlm.knnlm.search.forward import TokenStates, context_rule, token_states
from distlm.knnlm.search.neighbours import (
    MANIFEST,
    PLAN,
    Neighbours,
    Unit,
    begun,
    read_unit,
    sweep,
    unit_folder,
    write_unit,
)
from distlm.knnlm.search.records import NeighboursManifest, NeighboursPlan, SelfTest
from distlm.knnlm.search.rescore import GroupScorer, from_nearest, nearest_first, row_ranges, unit_distances
from distlm.knnlm.search.source import Source
from distlm.knnlm.search.units import UnitFolder
from distlm.runtime.files import atomic_path, save_array

COMMAND = "distlm knn search"


@dataclass(frozen=True)
class SplitWork:
    """The plan of one split and its units of work; no method is collective."""

    source: Source
    folder: Path
    split: str
    self_test: SelfTest
    candidates: int
    """Neighbours that are searched for each token; exact distances choose knn.k of them."""

    @cached_property
    def blocks(self) -> Blocks:
        """Evaluation blocks of the split."""
        knn = self.source.knn
        return eval_blocks(self.source.tokens.split(self.split), knn.context_window, knn.block)

    @cached_property
    def cut(self) -> Cut:
        """How blocks are cut into passes and units; as it was begun, where it was."""
        return cut_of(self.blocks, self.source.knn, self.folder / MANIFEST, self.folder / PLAN)

    @cached_property
    def units(self) -> list[range]:
        """Block numbers of each unit."""
        return self.cut.units(len(self.blocks))

    @cached_property
    def ranges(self) -> list[Range]:
        """Units of phase 2: rows of the store."""
        return row_ranges([shard.rows for shard in self.source.datastore.shards])

    @cached_property
    def unit_tokens(self) -> list[int]:
        """Tokens (queries) of each unit."""
        return [int(self.blocks.scored[unit.start : unit.stop].sum()) for unit in self.units]

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return sum(self.unit_tokens)

    @property
    def token_bytes(self) -> TokenBytes:
        """Disk that a token takes."""
        source = self.source
        return TokenBytes.of(
            source.datastore.width, source.key_dtype.itemsize, source.knn.k, self.candidates if source.rescores else 0
        )

    @property
    def found(self) -> Path:
        """Where phase 1 writes: a folder of its own when phase 2 follows."""
        return self.folder / "found" if self.source.rescores else self.folder

    @property
    def scores(self) -> Path:
        """Folder of phase 2's distances."""
        return self.folder / "rescore"

    def scores_file(self, group: int, number: int) -> Path:
        """Distances of a group's pairs whose rows lie in a range."""
        return self.scores / f"group-{group:03d}-range-{number:05d}.npy"

    @cached_property
    def plan(self) -> NeighboursPlan:
        """What the results will be made from; the head of the manifest."""
        source, knn = self.source, self.source.knn
        store = source.datastore
        return NeighboursPlan(
            kind="neighbours", split=self.split, tokens=self.tokens, blocks=len(self.blocks),
            blocks_per_unit=self.cut.blocks_per_unit, batch_blocks=self.cut.batch_blocks,
            context_window=knn.context_window, block=knn.block,
            context_rule=context_rule(knn, source.model.begins),
            k=knn.k, nprobe=knn.nprobe if source.index is not None else None, search=knn.search,
            distances="quantised" if knn.search == "index" and knn.distances == "quantised" else "exact",
            tap=store.tap, width=store.width, key_dtype=source.key_dtype.name,
            model=source.model_fingerprint, dictionary=source.tokens.dictionary.hash,
            token_files=source.tokens.fingerprint, datastore=store.fingerprint,
            index="brute" if source.index is None else source.index.fingerprint, self_test=self.self_test,
            similarity="dot" if source.dot else UNSET,
            candidates=self.candidates if self.candidates > knn.k else UNSET, fast_scan=self.fast_scan,
        )  # fmt: skip

    @cached_property
    def fast_scan(self) -> bool | UnsetType:
        """How 4-bit codes are compared (NeighboursPlan); a finished search, and one that an older version began, stay
        as they were."""
        kept, index = begun(self.folder), self.source.index
        if kept is not None and (kept.fast_scan is UNSET or (self.folder / MANIFEST).exists()):
            return kept.fast_scan
        return UNSET if index is None or index.rounded is None else index.rounded

    @cached_property
    def files(self) -> UnitFolder:
        """The folder that is being filled."""
        return UnitFolder(
            self.folder, self.plan, NeighboursManifest, len(self.units), COMMAND, measured=("self_test",),
            setting="knn.folder" if self.source.knn.folder else "",
        )  # fmt: skip

    @property
    def carried_bytes(self) -> int:
        """Disk of the states that are carried from block to block, until the split is finished."""
        return carried_bytes(self.source.model, self.blocks, self.source.knn.carry)

    def check_before(self) -> None:
        """Rank 0, before any work: the split can be evaluated, the folder is ours."""
        if self.tokens == 0:
            raise DistlmError(f"split {self.split} has no tokens to evaluate")
        self.files.check_before()

    @property
    def is_begun(self) -> bool:
        """The folder is ours already."""
        return (self.folder / PLAN).exists()

    def alike(self, kept: NeighboursPlan) -> bool:
        """Whether `kept` neighbours answer this plan but for k. They may also differ in how the work was cut, in how
        4-bit codes were compared, and in their candidates where the plan asks for none."""
        fields = set(NeighboursPlan.__struct_fields__) - {
            "k", "candidates", "self_test", "format", "blocks_per_unit", "batch_blocks", "fast_scan",
        }  # fmt: skip
        if kept.batch_blocks not in (self.cut.batch_blocks, self.source.knn.batch_blocks):
            return False
        if self.source.knn.candidates and (kept.candidates or kept.k) < self.candidates:
            return False
        return all(getattr(kept, name) == getattr(self.plan, name) for name in fields)

    def begin(self) -> bool:
        """Rank 0: claim the folder; False when it is already whole."""
        if self.files.is_whole:
            Neighbours.open(self.folder)
            self._tidy()
            return False
        for folder in (self.found, self.scores):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        self.files.begin()
        return True

    def is_found(self, number: int) -> bool:
        """Phase 1 of a unit is done."""
        return unit_folder(self.found, number).exists() or self.files.is_written(number)

    @property
    def is_all_found(self) -> bool:
        """Phase 1 of every unit is done."""
        return all(map(self.is_found, range(len(self.units))))

    def states(self, numbers: Sequence[int]) -> Generator[TokenStates, None, None]:
        """Forward passes of some units, one unit after the other. Close it when it is left early."""
        source, units = self.source, [self.units[number] for number in numbers]
        tap, dtype = source.datastore.tap, source.key_dtype
        before = open_carried(self.folder) if source.knn.carry else None
        return token_states(source, self.split, self.blocks, units, self.cut, tap, dtype, before)

    def search_units(self, numbers: Sequence[int]) -> None:
        """Phase 1 of some units: forward passes of all, then of each search, gather values, write."""
        source = self.source
        with closing(self.states(numbers)) as found:
            for number, states in zip(numbers, found, strict=True):
                self.write_found(number, states, *source.search(states.queries, self.candidates))

    def write_found(
        self, number: int, states: TokenStates, ids: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
    ) -> None:
        """Write what a search found for one unit, ids and distances [q, k], with the values of the rows."""
        self.source.require_rows(ids)
        unit = Unit(*states, *nearest_first(ids, distances, self.source.values(ids)))
        assert len(unit) == self.unit_tokens[number]
        write_unit(unit_folder(self.found, number), unit)

    def finish(self) -> None:
        """Rank 0: the manifest, last, then remove what only the search needed."""
        self.files.finish()
        self._tidy()

    def _tidy(self) -> None:
        drop_carried(self.folder)
        for folder in (self.folder / "found", self.scores):
            shutil.rmtree(folder, ignore_errors=True)


class Group:
    """A group of units in memory: sorted pairs and, when a shard is scored, the queries. Loaded at first use."""

    def __init__(self, work: SplitWork, number: int, units: Sequence[int]) -> None:
        self.work, self.number, self.units = work, number, list(units)

    @cached_property
    def pairs(self) -> list[SortedPairs]:
        """Sorted pairs of each unit."""
        return [sort_pairs(np.asarray(read_unit(unit_folder(self.work.found, unit)).ids)) for unit in self.units]

    @cached_property
    def _scorer(self) -> GroupScorer:
        queries = np.concatenate([read_unit(unit_folder(self.work.found, unit)).queries for unit in self.units])
        counts = [self.work.unit_tokens[unit] for unit in self.units]
        return GroupScorer(queries, self.pairs, counts, self.work.source.dot)

    def is_scored(self, number: int) -> bool:
        """The distances of this group's pairs in a range of rows are on disk."""
        return self.work.scores_file(self.number, number).exists()

    def score_range(self, number: int) -> None:
        """Write the distances of this group's pairs in one range of rows."""
        store, rows = self.work.source.datastore, self.work.ranges[number]
        first = store.shards[rows.shard].first_row
        distances = self._scorer.shard(store.keys(rows.shard), first, rows.first, rows.rows)
        with atomic_path(self.work.scores_file(self.number, number)) as temporary:
            save_array(temporary, distances)

    @cached_property
    def _counts(self) -> np.ndarray[Any, Any]:
        shards, ranges = self.work.source.datastore.shards, self.work.ranges
        edges = [shards[rows.shard].first_row + rows.first for rows in ranges] + [self.work.source.datastore.rows]
        return np.stack([np.diff(pairs.bounds(edges)) for pairs in self.pairs])

    def finish_units(self, units: Sequence[int]) -> None:
        """Write units of this group with exact distances: the k nearest of the candidates, nearest first; each range's
        file is opened once."""
        k = self.work.source.knn.k
        places = [self.units.index(unit) for unit in units]
        starts = np.cumsum(self._counts, axis=0) - self._counts
        pieces: list[list[np.ndarray[Any, Any]]] = [[] for _ in places]
        for number in range(len(self.work.ranges)):
            scores = np.load(self.work.scores_file(self.number, number), mmap_mode="r")
            for place, own in zip(places, pieces, strict=True):
                start = int(starts[place, number])
                own.append(np.array(scores[start : start + int(self._counts[place, number])]))
        for unit, place, own in zip(units, places, pieces, strict=True):
            old = read_unit(unit_folder(self.work.found, unit))
            distances = unit_distances(self.pairs[place], len(old), own)
            if self.work.source.dot:
                distances = from_nearest(distances)
            ids, distances, values = nearest_first(old.ids, distances, old.values)
            new = Unit(old.queries, old.targets, old.log_probs, ids[:, :k], distances[:, :k], values[:, :k])
            write_unit(unit_folder(self.work.folder, unit), new)
