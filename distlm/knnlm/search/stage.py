"""Neighbours of every token of the evaluation splits, to files, over all ranks.

Phase 1, unit by unit: forward pass over evaluation blocks → queries, targets, the LM's log-probabilities → search.
Phase 2, where exact distances are asked of an index: one sequential pass over the key shards (rescore.py).
A unit is some blocks (cut.py), or some rows of a shard (rescore.py), so every file is the same for any number of ranks.
Queries are rounded to the keys' dtype before they are searched: files alone determine every number that follows.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from msgspec import UNSET, UnsetType

from distlm.errors import DistlmError
from distlm.index.faiss_module import rank_threads
from distlm.index.search.file import refuse_vain
from distlm.knnlm.evaluate.table import self_test_words
from distlm.knnlm.search.by_lists import search_by_lists
from distlm.knnlm.search.carried import make_carried
from distlm.knnlm.search.cut import MORE_UNITS
from distlm.knnlm.search.disk import peak_bytes
from distlm.knnlm.search.local import wanted_copies
from distlm.knnlm.search.neighbours import MANIFEST, begun
from distlm.knnlm.search.records import NeighboursManifest, NeighboursPlan
from distlm.knnlm.search.rescore import plan_groups
from distlm.knnlm.search.selftest import self_test
from distlm.knnlm.search.source import Source, open_source
from distlm.knnlm.search.units import require_room
from distlm.knnlm.search.work import COMMAND, Group, SplitWork
from distlm.runtime.local.copies import copied, read_in_place
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import QUESTION, STAGE_SECONDS, TOKENS_PER_S
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.units.rounds import rounds, say_idle


def run_search(stage: Stage, split: str | None = None) -> dict[str, float]:
    """Search for the neighbours of every split of knn.splits (or of one) and write RUN/neighbours/LABEL/SPLIT.

    Finished splits are skipped, and those of which more neighbours are kept; a killed search continues with the first
    unfinished unit. With launch.stage_in what is read at random is read from copies on each node's disk (local.py).
    Returns seconds, tokens, k and, unless knn.self_test=false, the self-test's share of stored keys
    that find their own row.
    Raises DistlmError when model, dictionary, datastore and index do not belong together, when the self-test fails,
    when a folder of neighbours was made from other ones, or while another run writes it; Stopped after a stop signal.
    """
    start = time.monotonic()
    splits = [split] if split else stage.config.knn.splits
    wanted = rank0_first(stage.comm, lambda: wanted_copies(stage, splits))
    with copied(stage, "knn search", wanted) as copies:
        source = together(stage.comm, lambda: open_source(stage, copies))
        candidates = rank0_first(stage.comm, lambda: _candidates(stage, source, splits))
        rank0_first(stage.comm, lambda: _check_asked(source, candidates))
        for root, files in source.written(splits, stage.run.index):
            stage.require_whole(root, read_in_place(files, wanted))
        test = rank0_first(stage.comm, lambda: self_test(source))
        say(f"knn search: self-test: {self_test_words(test)}", stage.comm.rank)
        works = [SplitWork(source, stage.run.neighbours(name), name, test, candidates) for name in splits]
        works = [work for work in works if not rank0_first(stage.comm, partial(_served, stage.run, work))]
        rank0_first(stage.comm, lambda: _check_before(stage, splits, works))
        searched = _search_splits(stage, works)
    seconds = time.monotonic() - start
    self_found = {} if isinstance(test.found, UnsetType) else {"self_found": test.found}
    if stage.comm.rank == 0 and searched:
        stage.run.metrics.write(
            "knn search",
            {
                STAGE_SECONDS: round(seconds, 3),
                TOKENS_PER_S: round(searched / seconds, 1),
                **self_found,
                QUESTION: stage.run.label,
            },
        )
    return {
        "seconds": seconds,
        "tokens": searched,
        "tokens_per_s": searched / seconds,
        "k": source.knn.k,
        **self_found,
    }


def _check_asked(source: Source, candidates: int) -> None:
    """Say what is asked in vain. Raises UsageError for more neighbours than there are keys, or than a GPU finds."""
    lists = None if source.index is None else source.index.nlist
    refuse_vain(source.knn, source.datastore.rows, candidates, lists, "knn search", rank=0)


def _candidates(stage: Stage, source: Source, splits: Sequence[str]) -> int:
    """Neighbours of each token that are searched: of one number for all splits."""
    found = source.candidates
    if not source.knn.candidates:
        found = max((plan.candidates or plan.k for plan in _begun(stage, splits).values()), default=found)
    if found > source.knn.k:
        say(f"knn search: exact distances choose {source.knn.k} of {found} neighbours that the index finds")
    return found


def _begun(stage: Stage, splits: Sequence[str]) -> dict[Path, NeighboursPlan]:
    """Folder → plan of each split of the search configuration that was finished or begun."""
    folders = [stage.run.neighbours(name) for name in dict.fromkeys([*splits, *stage.config.knn.splits])]
    return {folder: plan for folder in folders if (plan := begun(folder))}


def _check_scan(stage: Stage, source: Source, splits: Sequence[str]) -> None:
    """DistlmError where a split of the search configuration was searched with 4-bit codes compared in another way."""
    rounded = None if source.index is None else source.index.rounded
    for folder, plan in _begun(stage, splits).items():
        if rounded is not None and plan.fast_scan not in (UNSET, rounded):
            how = {True: "by FastScan's tables of 8 bits", False: "as they are"}
            raise DistlmError(
                f"{folder}: 4-bit codes were compared {how[not rounded]} there, knn.scan={source.knn.scan} compares "
                f"them {how[rounded]} and finds slightly other neighbours; set knn.scan="
                f"{'lists' if rounded else 'queries'}, or remove {folder} and run `{COMMAND}` again"
            )


def _served(run: RunDir, work: SplitWork) -> bool:
    """Finished neighbours of a larger k answer for this split, too."""
    folder = run.kept_neighbours(work.split)
    if folder == work.folder or work.is_begun:
        return False
    kept = NeighboursManifest.read(folder / MANIFEST)
    if not work.alike(kept):
        return False
    say(f"knn search {work.split}: {folder} holds {kept.k} neighbours; their first {work.plan.k} answer, nothing to do")
    return True


def _check_before(stage: Stage, splits: Sequence[str], works: Sequence[SplitWork]) -> None:
    unfinished = [work for work in works if not work.files.is_whole]
    if unfinished:
        _check_scan(stage, unfinished[0].source, splits)
    for work in works:
        work.check_before()
    if unfinished:
        needed = peak_bytes([work.tokens for work in unfinished], unfinished[0].token_bytes)
        needed += sum(work.carried_bytes for work in unfinished)
        require_room([work.folder for work in unfinished], needed, COMMAND)


def _search_splits(stage: Stage, works: Sequence[SplitWork]) -> int:
    """Both phases of some splits; their tokens, without those of splits that were there. Collective."""
    comm = stage.comm
    pending: list[SplitWork] = []
    with ExitStack() as held:
        for work in works:
            # A finished folder may be read-only.
            if not rank0_first(comm, lambda work=work: work.files.is_whole):  # type: ignore[misc]
                held.enter_context(only_writer(work.folder, comm, "searching for these neighbours"))
            if rank0_first(comm, work.begin):
                pending.append(work)
            else:
                say(f"knn search {work.split}: {work.folder} is complete, nothing to do", comm.rank)
        if pending:
            _find(stage, pending)
        for work in pending:
            _finish(stage, work)
    return sum(work.tokens for work in pending)


def _find(stage: Stage, works: Sequence[SplitWork]) -> None:
    """Phase 1 of all splits together: the fewer units there are, the more it counts that no rank waits at the end of
    each. Collective; by their only writer."""
    places = [(number, unit) for number, work in enumerate(works) for unit in range(len(work.units))]

    def is_found(place: int) -> bool:
        number, unit = places[place]
        return works[number].is_found(unit)

    def search(run: Sequence[int]) -> None:
        for number, of_split in groupby((places[place] for place in run), key=itemgetter(0)):
            works[number].search_units([unit for _, unit in of_split])

    if works[0].source.knn.carry:
        # A start that ended behind its last unit reads nothing again.
        begun = rank0_first(stage.comm, lambda: [n for n, work in enumerate(works) if not work.is_all_found])
        make_carried(stage, works[0].source, [works[number] for number in begun])
    if works[0].source.index is not None and works[0].source.knn.scan == "lists":
        for work in works:
            search_by_lists(stage, work, f"knn search {work.split}")
        return
    label = f"knn search {', '.join(work.split for work in works)}"
    in_rounds(stage, label, "units", range(len(places)), is_found, search, MORE_UNITS)


def _finish(stage: Stage, work: SplitWork) -> None:
    """Phase 2 of one split, where there is one, and its manifest. Collective; by its only writer."""
    if work.source.rescores:
        width = work.source.datastore.width
        for number, units in enumerate(plan_groups(work.unit_tokens, work.candidates, width)):
            _rescore_group(stage, Group(work, number, units))
    rank0_first(stage.comm, work.finish)


def _rescore_group(stage: Stage, group: Group) -> None:
    """Exact distances of a group: its pairs shard by shard, then its units. Collective."""
    work = group.work
    if rank0_first(stage.comm, lambda: all(work.files.is_written(unit) for unit in group.units)):
        return
    label = f"{work.split} (group {group.number})"
    ranges = range(len(work.ranges))
    in_rounds(stage, f"knn rescore {label}", "ranges", ranges, group.is_scored, partial(each, group.score_range))
    in_rounds(stage, f"knn write {label}", "units", group.units, work.files.is_written, group.finish_units)


def in_rounds(
    stage: Stage,
    label: str,
    unit: str,
    items: Sequence[int],
    done: Callable[[int], bool],
    act: Callable[[Sequence[int]], None],
    mend: str = "",
) -> None:
    """`act` on every item that is not done, some at a time, each rank on a run of them; stop signals and errors reach
    all. `mend`: what makes more items, where that is to be said to ranks that have none. Collective."""
    comm = stage.comm
    pending = rank0_first(comm, lambda: [item for item in items if not done(item)])
    if mend:
        say_idle(comm, label, len(pending), mend)
    with Progress(label, len(items), unit, comm.rank, done=len(items) - len(pending)) as progress:
        for found in rounds(stage, label, pending, partial(_counted, act), rank_threads()):
            progress.advance(sum(found))


def _counted(act: Callable[[Sequence[int]], None], items: Sequence[int]) -> int:
    act(items)
    return len(items)


def each(act: Callable[[int], None], items: Sequence[int]) -> None:
    """`act` on one item after the other."""
    for item in items:
        act(item)
