"""The neural cache of every evaluation split, to files, over all ranks.

Where no search has kept the hidden states that it needs, they are computed first. A unit is some evaluation blocks
(search/cut.py), in both phases, so every file is the same for any number of ranks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from distlm.data.tokens import TokenFiles
from distlm.knnlm.cache.files import CacheWork, cache_bytes, check_windows
from distlm.knnlm.search.carried import drop_carried, make_carried
from distlm.knnlm.search.forward import Forward, open_forward
from distlm.knnlm.search.neighbours import MANIFEST, written_units
from distlm.knnlm.search.stage import each, in_rounds
from distlm.knnlm.search.states import COMMAND, StatesWork
from distlm.knnlm.search.units import UnitFolder, require_room
from distlm.models.card import model_fingerprint, model_of_card, read_model_card
from distlm.models.described import causal, require_tap
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS, TOKENS_PER_S
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.stage import Stage


def run_cache(stage: Stage) -> dict[str, float]:
    """Compute p_cache of every token of knn.splits at every window and θ of the section `cache`, into RUN/cache/SPLIT.

    Finished splits are skipped, a killed start continues with the first unfinished unit. Returns seconds, tokens,
    tokens_per_s, and forward_tokens: those whose hidden states were computed first. Raises DistlmError when a window is
    longer than a split, when model and token files do not belong together, when a folder was made with other settings,
    or while another run writes it; Stopped after a stop signal.
    """
    start = time.monotonic()
    works = together(stage.comm, lambda: _plan(stage))
    computed = _states(stage, works)
    scored = 0
    for work in works:
        scored += _score(stage, work)
    seconds = time.monotonic() - start
    if stage.comm.rank == 0 and (scored or computed):
        record = {STAGE_SECONDS: round(seconds, 3), TOKENS_PER_S: round(scored / seconds, 1)}
        stage.run.metrics.write("knn cache", record)
    return {"seconds": seconds, "tokens": scored, "forward_tokens": computed, "tokens_per_s": scored / seconds}


def _plan(stage: Stage) -> list[StatesWork]:
    config, run = stage.config, stage.run
    tokens = TokenFiles.open(run.tokens(config))
    checkpoint = run.model_checkpoint(config)
    model, cache = model_fingerprint(checkpoint), config.cache
    key = "cache.tap" if cache.tap else "datastore.tap"
    require_tap(causal(model_of_card(read_model_card(checkpoint))), cache.tap or config.datastore.tap, key)
    works = [StatesWork(config, run, tokens, model, split) for split in config.knn.splits]
    for work in works:
        check_windows(config.cache, work.split, work.tokens)
    return works


def _check(stage: Stage, states: StatesWork) -> None:
    """The states of a split are as they were written. Collective."""
    kept = together(stage.comm, states.states)
    stage.require_whole(kept.folder, written_units(kept.folder, kept.manifest.units, COMMAND))


def _states(stage: Stage, works: list[StatesWork]) -> int:
    """Forward passes of the splits that lack states; tokens of these splits. Before them, that the disk has room for
    states and cache of all splits. Collective."""
    missing = [work for work in works if rank0_first(stage.comm, partial(_lacks, work))]
    if not missing:
        rank0_first(stage.comm, lambda: _require_room(stage, works, {}))
        return 0
    forward = together(stage.comm, lambda: open_forward(stage))
    tokens = forward.tokens
    stage.require_whole(tokens.folder, tokens.written(*(work.split for work in missing)))
    for work in missing:
        rank0_first(stage.comm, work.files.check_before)
    own = {work.folder: work.bytes(forward.model, forward.knn.carry) for work in missing}
    rank0_first(stage.comm, lambda: _require_room(stage, works, own))
    for work in missing:
        _fill(
            stage,
            work.files,
            f"knn states {work.split}",
            partial(work.compute_units, forward),
            partial(_carry, stage, work, forward),
        )
    return sum(work.tokens for work in missing)


def _require_room(stage: Stage, works: Sequence[StatesWork], states: Mapping[Path, int]) -> None:
    """For `states`, folder → bytes, and the cache of all splits."""
    needed = dict(states)
    for work in works:
        folder = stage.run.cache(work.split)
        if not (folder / MANIFEST).exists():
            needed[folder] = cache_bytes(stage.config.cache, work.tokens)
    require_room(list(needed), sum(needed.values()), COMMAND)


def _carry(stage: Stage, work: StatesWork, forward: Forward) -> None:
    """Collective."""
    if forward.knn.carry:
        make_carried(stage, forward, [work])


def _lacks(work: StatesWork) -> bool:
    return work.kept() is None


def _score(stage: Stage, states: StatesWork) -> int:
    """The cache of one split; its tokens, 0 when it was there. Collective."""
    folder = stage.run.cache(states.split)
    work = together(stage.comm, lambda: CacheWork(stage.config.cache, states.states(), folder))
    rank0_first(stage.comm, work.files.check_before)
    if rank0_first(stage.comm, lambda: work.files.is_whole):
        say(f"knn cache {work.split}: {folder} is complete, nothing to do", stage.comm.rank)
        return 0
    _check(stage, states)
    _fill(stage, work.files, f"knn cache {work.split}", partial(each, work.compute_unit))
    return work.states.tokens


def _fill(
    stage: Stage,
    files: UnitFolder,
    label: str,
    compute: Callable[[Sequence[int]], None],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write the units that are missing, as the folder's only writer; `before` comes first. Collective."""
    with only_writer(files.folder, stage.comm, "writing these results"):
        rank0_first(stage.comm, files.begin)
        if not rank0_first(stage.comm, lambda: all(map(files.is_written, range(files.units)))):
            before()
        in_rounds(stage, label, "units", range(files.units), files.is_written, compute)
        rank0_first(stage.comm, partial(drop_carried, files.folder))
        rank0_first(stage.comm, files.finish)
