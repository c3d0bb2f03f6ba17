"""The stage `datastore write`: the unit of work is one shard; of those left, rank r of R takes the r-th of every R."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from distlm.config.schema import RunConfig
from distlm.data.tokens import TokenFiles
from distlm.datastore.estimate import plan_datastore
from distlm.datastore.extract import batches_of_hidden_states
from distlm.datastore.lengths import block_lengths
from distlm.datastore.manifest import (
    MANIFEST,
    SIDECARS,
    keys_path,
    planned_manifest,
    planned_shard,
    read_manifest,
    read_sidecar,
    shard_files,
    sidecar_path,
    store_bytes,
    values_path,
    write_sidecar,
)
from distlm.datastore.manifest import file_problem as problem_of
from distlm.datastore.plan import ShardPlan, StorePlan, plan_store
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.datastore.shard_writer import ShardWriter
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint, model_of_card, read_model_card
from distlm.models.described import causal, require_tap
from distlm.models.io import check_dictionary, load_model
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import format_bytes, require_free_disk, sweep_temporaries
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.device import default_device
from distlm.runtime.ranks.share import Share, share_of
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage

__all__ = ["plan_datastore", "run_datastore_write", "write_shard"]

_LABEL = "datastore write"


Fill = Callable[[ShardPlan, Callable[[int], None]], Shard]
"""Writes one shard, telling a function the rows of each batch, and returns it with checksums."""


@dataclass(frozen=True)
class StoreJob:
    """What every rank knows before the work starts."""

    folder: Path
    checkpoint: Path
    ids: npt.NDArray[np.int32]
    plan: StorePlan
    settings: Settings


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
    """Write RUN/datastore; finished shards of an earlier start are kept.

    With launch.share=K/N this process writes the shards K, K+N, … only, at once with other shares, and leaves the
    store unfinished: the same command without it completes it.
    Raises DistlmError on every rank for: an unknown tap, a model of another dictionary, blocks that do not fit,
    a folder with a store of other settings or with foreign files, a full disk, keys that are not finite or do not fit
    datastore.key_dtype. Raises Stopped at a shard boundary after a stop signal.
    """
    job = together(stage.comm, lambda: open_job(stage.config, stage.run))
    tokens = TokenFiles.open(stage.run.tokens(stage.config))
    stage.require_whole(tokens.folder, tokens.written(stage.config.datastore.split))

    def fill() -> Fill:
        model, _ = load_model(job.checkpoint, default_device())
        return lambda shard, advance: write_shard(model, job.ids, job.plan, shard, job.settings, job.folder, advance)

    return fill_store(stage, job, fill)


def fill_store(stage: Stage, job: StoreJob, fill: Callable[[], Fill]) -> StoreSummary:
    """Write the shards of a store that are not there; what `fill` gives writes one. Otherwise as run_datastore_write.

    `fill` is called once, on every rank, and only when there is something to write.
    """
    start, comm = time.monotonic(), stage.comm
    share = together(comm, lambda: share_of(stage.config, comm.size))
    shards = _shards(job, share)
    # A finished folder may be read-only.
    finished = rank0_first(comm, lambda: _is_finished(job))
    with nullcontext() if finished else only_writer(job.folder, comm, "writing this datastore", share):
        whole = rank0_first(comm, lambda: _begin(job, share))
        left = [shard for shard in shards if shard.index not in whole]
        told: list[list[Shard]] | None = None
        if left:
            write = together(comm, fill)
            # Told, not read back from the sidecars: a network file system may show other nodes' files late.
            told = comm.gather(_write_shards(stage, write, left, sum(shard.rows for shard in shards)))
        if share is None:
            # Also with nothing left: shares, or a run that was killed here, may have written the last shard.
            rank0_first(comm, lambda: _finish(job, whole, told or []))
    seconds = time.monotonic() - start
    written = sum(shard.rows for shard in left)
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
    comm = SingleComm()
    if _is_finished(job):
        return
    with only_writer(job.folder, comm, "writing this datastore"):
        whole = _begin(job, None)
        left = [shard for shard in job.plan.shards if shard.index not in whole]
        written = [write_shard(model, job.ids, job.plan, shard, job.settings, job.folder) for shard in left]
        _finish(job, whole, [written])


def write_shard(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    plan: StorePlan,
    shard: ShardPlan,
    settings: Settings,
    folder: Path,
    advance: Callable[[int], None] = lambda rows: None,
) -> Shard:
    """Compute and write one shard, sidecar last; `advance` is told the rows of each batch. Returns it with checksums.

    Memory: the model, one batch of blocks per CPU thread, and the queue of ShardWriter.
    """
    batches = batches_of_hidden_states(model, ids, plan.blocks, plan.batches(shard), settings.tap)
    with closing(batches), ShardWriter(folder, settings, planned_shard(shard)) as writer:
        for keys, targets, _ in batches:
            writer.put(keys, targets)
            advance(len(targets))
    write_sidecar(folder, settings, writer.finished)
    return writer.finished


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


def _begin(job: StoreJob, share: Share | None) -> dict[int, Shard]:
    """Claim the folder, keep what is whole. Returns the whole shards (of the share) by number. On rank 0 only."""
    manifest = _own_manifest(job)
    if share is not None:
        return _begin_share(job, share, manifest)
    folder, settings, shards = job.folder, job.settings, job.plan.shards
    sweep_temporaries(folder)
    if manifest is not None and manifest.complete:
        damaged = [shard.index for shard in manifest.shards if not _in_place(job, shard)]
        if not damaged:
            _remove_sidecars(folder)
            say(f"{_LABEL}: {folder} is complete, nothing to do")
            return {shard.index: shard for shard in manifest.shards}
        say(f"{_LABEL}: {len(damaged)} of {len(shards)} shards are damaged, writing them again: {damaged}")
        for shard in manifest.shards:
            if shard.index not in damaged:
                write_sidecar(folder, settings, shard)
    planned_manifest(settings, job.plan).write(folder / MANIFEST)
    return _keep_whole(job, shards)


def _begin_share(job: StoreJob, share: Share, manifest: Manifest | None) -> dict[int, Shard]:
    """As _begin, touching only what no other share writes: files of its own shards, and a manifest equal to theirs."""
    shards = _shards(job, share)
    if manifest is not None and manifest.complete:
        damaged = [shard.index for shard in manifest.shards if not _in_place(job, shard)]
        if damaged:
            raise DistlmError(
                f"{job.folder}: complete, but shards {damaged} are damaged; run the same command without launch.share"
            )
        say(f"{_LABEL}: {job.folder} is complete, nothing to do for share {share}")
        return {shard.index: shard for shard in manifest.shards}
    for shard in shards:
        for path, *_ in shard_files(job.folder, job.settings, planned_shard(shard)):
            sweep_temporaries(job.folder, path.name)
    if manifest is None:
        planned_manifest(job.settings, job.plan).write(job.folder / MANIFEST)
    say(f"{_LABEL}: share {share} of {len(job.plan.shards)} shards; a run without launch.share completes the store")
    return _keep_whole(job, shards)


def _keep_whole(job: StoreJob, shards: Sequence[ShardPlan]) -> dict[int, Shard]:
    """Those of `shards` that are on disk as their sidecars say; the disk must hold the others."""
    folder, settings = job.folder, job.settings
    sidecars = [read_sidecar(folder, settings, planned_shard(shard)) for shard in shards]
    whole = {shard.index: shard for shard in sidecars if shard is not None}
    left = [planned_shard(shard) for shard in shards if shard.index not in whole]
    for shard in left:
        # An old sidecar must not vouch for a file that is being replaced.
        sidecar_path(folder, shard.index).unlink(missing_ok=True)
    needed = store_bytes(settings, left)
    require_free_disk(folder, needed, f"datastore ({len(left)} of {len(shards)} shards)")
    if whole:
        say(f"{_LABEL}: {len(whole)} of {len(shards)} shards are complete, continuing")
    rows = sum(shard.rows for shard in shards)
    say(
        f"{_LABEL}: {rows} rows x {settings.width} {settings.key_dtype}, {len(left)} shards to write "
        f"({format_bytes(needed)}); keys are {settings.tap}; {settings.rule}"
    )
    return whole


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


def _write_shards(stage: Stage, write: Fill, shards: list[ShardPlan], rows: int) -> list[Shard]:
    """Write the shards in turns of one per rank. Returns those of this rank. Collective.

    `rows` counts the finished shards too.
    """
    comm, mine = stage.comm, []
    done = rows - sum(shard.rows for shard in shards)
    with Progress(_LABEL, rows, "rows", comm.rank, done=done) as progress:
        for turn in range(ceil(len(shards) / comm.size)):
            stage.stop.check(comm, _LABEL)
            now = shards[turn * comm.size : (turn + 1) * comm.size]
            done += sum(shard.rows for shard in now)

            def advance(rows: int, peers: int = len(now), end: int = done) -> None:
                # Rank 0 counts for its peers too, which are as far as it is; the end of the turn is exact.
                progress.advance(min(rows * peers, end - progress.done))

            def unit(now: list[ShardPlan] = now) -> None:
                if comm.rank < len(now):
                    mine.append(write(now[comm.rank], advance))

            together(comm, unit)
            if progress.done < done:
                progress.advance(done - progress.done)
    return mine


def _finish(job: StoreJob, whole: dict[int, Shard], told: list[list[Shard]]) -> None:
    """All shards are whole: the complete manifest, then the sidecars go. On rank 0 only."""
    if read_manifest(job.folder).complete:
        return
    shards = whole | {shard.index: shard for of_rank in told for shard in of_rank}
    written = [shards[number] for number in sorted(shards)]
    Manifest.of_store(job.settings, job.plan.rows, written, complete=True).write(job.folder / MANIFEST)
    _remove_sidecars(job.folder)


def _remove_sidecars(folder: Path) -> None:
    for sidecar in folder.glob(SIDECARS):
        sidecar.unlink(missing_ok=True)
