"""The stage `datastore write`: the unit of work is a batch of blocks, or some (plan.py); each rank takes a run of them.

Ranks write into the same files at once (unfinished/), so that a store of one shard keeps any number of them busy.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from distlm.config.schema import RunConfig
from distlm.data.tokens import TokenFiles
from distlm.datastore.estimate import MORE_UNITS, plan_datastore
from distlm.datastore.extract import batches_of_hidden_states
from distlm.datastore.lengths import block_lengths
from distlm.datastore.manifest import (
    MANIFEST,
    keys_path,
    planned_manifest,
    planned_shard,
    read_manifest,
    shard_files,
    store_bytes,
    values_path,
    write_sidecar,
)
from distlm.datastore.manifest import file_problem as problem_of
from distlm.datastore.plan import ShardPlan, StorePlan, Unit, plan_store
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.datastore.shard_writer import ShardWriter, Streak
from distlm.datastore.unfinished.files import clear, units_path
from distlm.datastore.unfinished.units import Fill, Kept, StoreJob, keep, record, sealed, write_run
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint, model_of_card, read_model_card
from distlm.models.described import causal, require_tap
from distlm.models.io import check_dictionary, load_model
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import sweep_temporaries
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.device import default_device
from distlm.runtime.ranks.share import Share, share_of
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.units.rounds import rounds, say_idle

__all__ = ["Fill", "StoreJob", "plan_datastore", "run_datastore_write", "write_shard"]

_LABEL = "datastore write"


class StoreSummary(TypedDict):
    """What the stage prints."""

    rows: int
    """Of the store, or the share; so are width, shards and bytes."""
    width: int
    shards: int
    bytes: int
    seconds: float
    """Of this start; so are rows_written and rows_per_s."""
    rows_written: int
    rows_per_s: float


def run_datastore_write(stage: Stage) -> StoreSummary:
    """Write RUN/datastore; finished units of an earlier start are kept.

    With launch.share=K/N this process writes the shards K, K+N, … only, at once with other shares, and leaves the
    store unfinished: the same command without it completes it.
    Raises DistlmError on every rank for: an unknown tap, a model of another dictionary, blocks that do not fit,
    a folder with a store of other settings or with foreign files, a full disk, keys that are not finite or do not fit
    datastore.key_dtype. Raises Stopped at a unit boundary after a stop signal.
    """
    job = together(stage.comm, lambda: open_job(stage.config, stage.run))
    tokens = TokenFiles.open(stage.run.tokens(stage.config))
    stage.require_whole(tokens.folder, tokens.written(stage.config.datastore.split))

    def fill() -> Fill:
        model, _ = load_model(job.checkpoint, default_device())
        return partial(put_keys, model, job)

    return fill_store(stage, job, fill)


def fill_store(stage: Stage, job: StoreJob, fill: Callable[[], Fill]) -> StoreSummary:
    """Write the units of a store that are not there; what `fill` gives puts their rows. Otherwise as
    run_datastore_write.

    `fill` is called once, on every rank, and only when there is something to write.
    """
    start, comm = time.monotonic(), stage.comm
    share = together(comm, lambda: share_of(stage.config, comm.size))
    shards = _shards(job, share)
    # A finished folder may be read-only.
    finished = rank0_first(comm, lambda: _is_finished(job))
    with nullcontext() if finished else only_writer(job.folder, comm, "writing this datastore", share):
        kept = rank0_first(comm, lambda: _begin(job, share))
        left = kept.left(job.plan, shards)
        say_idle(comm, _LABEL, len(left), MORE_UNITS)
        if left:
            put = together(comm, fill)
            for new in _write_units(stage, job, put, left, sum(shard.rows for shard in shards)):
                kept.add(new)
                rank0_first(comm, lambda: record(job, share, kept))
        _seal_others(stage, job, kept, shards)
        if share is None:
            # Also with nothing left: shares, or a run that was killed here, may have written the last shard.
            rank0_first(comm, lambda: _finish(job, kept.whole))
        else:
            rank0_first(comm, lambda: units_path(job.folder, share).unlink(missing_ok=True))
    seconds = time.monotonic() - start
    written = sum(unit.rows for unit in left)
    summary: StoreSummary = {
        "rows": sum(shard.rows for shard in shards),
        "width": job.settings.width,
        "shards": len(shards),
        "bytes": store_bytes(job.settings, [planned_shard(shard) for shard in shards]),
        "seconds": seconds,
        "rows_written": written,
        "rows_per_s": written / seconds,
    }
    if comm.rank == 0 and left:
        stage.run.metrics.write(
            _LABEL, {STAGE_SECONDS: round(seconds, 3), **{k: v for k, v in summary.items() if k != "seconds"}}
        )
    return summary


def write_alone(job: StoreJob, model: LanguageModel) -> None:
    """Write a store in this process, outside a run; finished shards of an earlier start are kept.

    The same files as run_datastore_write. Raises DistlmError as that.
    """
    comm, streak = SingleComm(), Streak()
    if _is_finished(job):
        return
    with only_writer(job.folder, comm, "writing this datastore"):
        kept = _begin(job, None)
        for shard in job.plan.shards:
            if left := kept.left(job.plan, [shard]):
                kept.add(write_run(job, partial(put_keys, model, job), streak, lambda rows: None, left))
                record(job, None, kept)
            if shard.index not in kept.whole:
                kept.add(sealed(job, kept, shard))
        _finish(job, kept.whole)


def write_shard(
    model: LanguageModel,
    ids: npt.NDArray[np.int32],
    plan: StorePlan,
    shard: ShardPlan,
    settings: Settings,
    folder: Path,
) -> Shard:
    """Compute and write one whole shard. Returns it with checksums. Memory: as put_keys and ShardWriter."""
    job = StoreJob(folder, Path(), ids, plan, settings)
    units = plan.units(shard)
    return write_run(job, partial(put_keys, model, job), Streak(), lambda rows: None, units).whole[shard.index]


def put_keys(
    model: LanguageModel,
    job: StoreJob,
    writer: ShardWriter,
    shard: ShardPlan,
    first: int,
    rows: int,
    advance: Callable[[int], None],
) -> None:
    """Compute the rows [first, first + rows) of a shard, which are whole batches, and put them; a `Fill`.

    Memory: the model, one batch of blocks per CPU thread, and the queue of ShardWriter.
    """
    plan = job.plan
    batches = batches_of_hidden_states(model, job.ids, plan.blocks, plan.batches(shard, first, rows), job.settings.tap)
    with closing(batches):
        for keys, targets, _ in batches:
            writer.put(keys, targets)
            advance(len(targets))


def open_job(config: RunConfig, run: RunDir) -> StoreJob:
    """Check everything that can be checked before the first forward pass; writes nothing."""
    store = config.datastore
    checkpoint = run.model_checkpoint(config)
    card = read_model_card(checkpoint)
    model = causal(model_of_card(card))
    require_tap(model, store.tap, "datastore.tap")
    tokens = TokenFiles.open(run.tokens(config))
    check_dictionary(card, tokens.dictionary)
    ids = tokens.split(store.split)
    window, block = block_lengths(store.context_window, store.block, model.max_positions)
    plan = plan_store(len(ids), window, block, store.batch_blocks, store.rows_per_shard, model.max_positions)
    settings = Settings(
        split=store.split, tap=store.tap, context_window=window, block=block,
        batch_blocks=store.batch_blocks, rows_per_shard=plan.rows_per_shard, key_dtype=store.key_dtype,
        width=model.width, vocabulary=card.vocabulary, model=model_fingerprint(checkpoint),
        dictionary=tokens.dictionary.hash, tokens=tokens.fingerprint, begins=model.begins,
    )  # fmt: skip
    return StoreJob(run.datastore, checkpoint, ids, plan, settings)


def _shards(job: StoreJob, share: Share | None) -> list[ShardPlan]:
    """All shards, or those of a share."""
    return [shard for shard in job.plan.shards if share is None or share.has(shard.index)]


def _is_finished(job: StoreJob) -> bool:
    """The store is complete and its files are in place. Raises DistlmError when the folder is not this store's."""
    manifest = _own_manifest(job) if (job.folder / MANIFEST).exists() else None
    return manifest is not None and manifest.complete and all(_in_place(job, shard) for shard in manifest.shards)


def _begin(job: StoreJob, share: Share | None) -> Kept:
    """Claim the folder, keep what is whole (of the share). On rank 0 only."""
    manifest = _own_manifest(job)
    if share is not None:
        return _begin_share(job, share, manifest)
    folder, settings, shards = job.folder, job.settings, job.plan.shards
    sweep_temporaries(folder)
    if manifest is not None and manifest.complete:
        damaged = [shard.index for shard in manifest.shards if not _in_place(job, shard)]
        if not damaged:
            clear(folder)
            say(f"{_LABEL}: {folder} is complete, nothing to do")
            return Kept({shard.index: shard for shard in manifest.shards})
        say(f"{_LABEL}: {len(damaged)} of {len(shards)} shards are damaged, writing them again: {damaged}")
        for shard in manifest.shards:
            if shard.index not in damaged:
                write_sidecar(folder, settings, shard)
    planned_manifest(settings, job.plan).write(folder / MANIFEST)
    return keep(job, share, shards)


def _begin_share(job: StoreJob, share: Share, manifest: Manifest | None) -> Kept:
    """As _begin, touching only what no other share writes: files of its own shards, and a manifest equal to theirs."""
    shards = _shards(job, share)
    if manifest is not None and manifest.complete:
        damaged = [shard.index for shard in manifest.shards if not _in_place(job, shard)]
        if damaged:
            raise DistlmError(
                f"{job.folder}: complete, but shards {damaged} are damaged; run the same command without launch.share"
            )
        say(f"{_LABEL}: {job.folder} is complete, nothing to do for share {share}")
        return Kept({shard.index: shard for shard in manifest.shards})
    for shard in shards:
        for path, *_ in shard_files(job.folder, job.settings, planned_shard(shard)):
            sweep_temporaries(job.folder, path.name)
    if manifest is None:
        planned_manifest(job.settings, job.plan).write(job.folder / MANIFEST)
    say(f"{_LABEL}: share {share} of {len(job.plan.shards)} shards; a run without launch.share completes the store")
    return keep(job, share, shards)


def _own_manifest(job: StoreJob) -> Manifest | None:
    """The folder's manifest, None in a new folder. Raises DistlmError when the folder is not this store's."""
    if not (job.folder / MANIFEST).exists():
        ours = {path(job.folder, shard.index).name for shard in job.plan.shards for path in (keys_path, values_path)}
        foreign = [
            item.name for item in job.folder.iterdir() if not item.name.startswith(".") and item.name not in ours
        ]
        if foreign:
            raise DistlmError(
                f"{job.folder}: holds files that are not a datastore ({', '.join(sorted(foreign)[:3])}); "
                "move them away or choose another run_dir="
            )
        return None
    manifest = read_manifest(job.folder)
    if changed := manifest.settings.differences(job.settings):
        raise DistlmError(
            f"{job.folder}: datastore was begun with other settings ({'; '.join(changed)}); use the same settings, "
            "another run_dir=, or remove the folder"
        )
    return manifest


def _in_place(job: StoreJob, shard: Shard) -> bool:
    return not any(
        problem_of(path, header, size) for path, header, size, _ in shard_files(job.folder, job.settings, shard)
    )


def _write_units(stage: Stage, job: StoreJob, put: Fill, left: list[Unit], rows: int) -> Iterator[Kept]:
    """Write the units over the ranks; after each round gives what all ranks wrote in it. Collective.

    `rows` counts what is finished, too.
    """
    comm, streak = stage.comm, Streak()
    done, last = rows - sum(unit.rows for unit in left), rows
    with Progress(_LABEL, rows, "rows", comm.rank, done=done) as progress:

        def advance(rows: int) -> None:
            # Rank 0 counts for its peers too, which are as far as it is; the end of a round is exact.
            progress.advance(min(rows * min(comm.size, len(left)), last - progress.done))

        act = partial(write_run, job, put, streak, advance)
        rows_at = {unit.key: unit.rows for unit in left}
        for found in rounds(stage, _LABEL, left, act, torch.get_num_threads()):
            new = Kept()
            for of_rank in found:
                new.add(of_rank)
            done += sum(rows_at[key] for key in new.done)
            if progress.done < done:
                progress.advance(done - progress.done)
            yield new


def _seal_others(stage: Stage, job: StoreJob, kept: Kept, shards: Sequence[ShardPlan]) -> None:
    """Read back the shards that several ranks or starts have written, each on one rank. Collective."""
    pending = [shard for shard in shards if shard.index not in kept.whole]
    for found in rounds(stage, _LABEL, pending, lambda run: [sealed(job, kept, shard) for shard in run]):
        for of_rank in found:
            for new in of_rank:
                kept.add(new)


def _finish(job: StoreJob, shards: dict[int, Shard]) -> None:
    """All shards are whole: the complete manifest, then what only an unfinished store has goes. On rank 0 only."""
    if not read_manifest(job.folder).complete:
        written = [shards[number] for number in sorted(shards)]
        Manifest.of_store(job.settings, job.plan.rows, written, complete=True).write(job.folder / MANIFEST)
    clear(job.folder)
