"""The template: one trained index without keys, made on rank 0 from a sample that all ranks read."""

import time
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.sample import read_sample, sample_counts, sample_rows
from distlm.index.factory import KEYS_PER_LIST, MOST_KEYS_PER_LIST, Factory, fit_factory, inverted_file
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.layout import Array, Header, IndexFolder, serialise
from distlm.index.records import TemplateRecord
from distlm.runtime.files import (
    atomic_path,
    bytes_hash,
    format_bytes,
    require_free_disk,
    sweep_temporaries,
)
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.stage import Stage


@dataclass(frozen=True)
class Template:
    """A trained, empty index and what it belongs to."""

    id: str
    """xxh3-128 of the file: every part and the merged index name it."""
    data: bytes
    """The faiss file."""
    record: TemplateRecord
    """template.json."""

    @property
    def header(self) -> Header:
        """Bytes before the inverted lists, for any number of keys."""
        return Header(self.data)


def load_template(folder: IndexFolder, datastore: Datastore) -> Template:
    """Read template.index and check it against template.json and the store.

    Raises DistlmError when it is missing, damaged, or was trained on another store.
    """
    if not folder.template_json.exists():
        raise DistlmError(f"{folder.template_json}: no such file (index template); run `distlm index train` first")
    record = TemplateRecord.read(folder.template_json)
    if record.datastore != datastore.fingerprint:
        raise DistlmError(
            f"{folder.template_json}: template of another store (trained on {record.datastore}, this store is "
            f"{datastore.fingerprint}); remove {folder.root} and train again, or give the new index a name "
            "of its own with index.name="
        )
    try:
        data = folder.template.read_bytes()
    except FileNotFoundError as error:
        raise DistlmError(f"{folder.template}: missing; remove {folder.root} and run `distlm index train`") from error
    if bytes_hash(data) != record.template:
        raise DistlmError(
            f"{folder.template}: damaged ({len(data)} bytes with checksum {bytes_hash(data)}, {folder.template_json} "
            f"says {record.template}); remove {folder.root} and train again"
        )
    return Template(record.template, data, record)


class TrainSummary(TypedDict):
    """What the stage prints."""

    seconds: float
    template: str
    nlist: int
    sample: NotRequired[int]
    done_before: NotRequired[bool]


def run_index_train(stage: Stage) -> TrainSummary:
    """Train RUN/index/NAME/template.index on a seeded sample of the datastore.

    Every rank reads the sample of its shards; rank 0 trains with the node's cores while the others wait.
    Raises DistlmError for a refused factory, NaN or infinite keys, a template of another store or factory, and while
    another run writes this index.
    """
    require_faiss()
    datastore = together(stage.comm, lambda: Datastore.open(stage.run.datastore))
    folder, config = IndexFolder(stage.run.index), stage.config.index
    plan = together(stage.comm, lambda: fit_factory(config.factory, datastore.width, datastore.rows, config.sample))
    # First without the lock: a finished folder may be read-only.
    if done := _nothing_to_do(stage, folder, datastore, plan):
        return done
    with only_writer(folder.root, stage.comm, "training this index"):
        # The run that held the lock until now may have trained it.
        if done := _nothing_to_do(stage, folder, datastore, plan):
            return done
        stage.require_whole(datastore.folder, datastore.written())
        return _train_together(stage, folder, datastore, plan)


def _nothing_to_do(stage: Stage, folder: IndexFolder, datastore: Datastore, plan: Factory) -> TrainSummary | None:
    """What run_index_train returns for a template that is there; None without one. Collective."""
    done = rank0_first(stage.comm, lambda: _trained_before(folder, datastore, plan, stage.config.index.seed))
    if not done:
        return None
    say(f"index train: {folder.template} is complete, nothing to do", stage.comm.rank)
    return {"seconds": 0.0, "template": done.template, "nlist": done.nlist, "done_before": True}


def _train_together(stage: Stage, folder: IndexFolder, datastore: Datastore, plan: Factory) -> TrainSummary:
    """The work of run_index_train. Collective; by the only writer."""
    start = time.monotonic()
    if stage.comm.rank == 0:
        for message in plan.messages:
            say(f"index train: {message}")
    rank0_first(stage.comm, lambda: _prepare_folder(folder, plan))
    keys = gather_sample(stage, datastore, plan, stage.config.index.seed)
    record = rank0_first(
        stage.comm, lambda: _train(stage, folder, datastore, plan, keys if keys is not None else np.empty((0, 0)))
    )
    seconds = time.monotonic() - start
    if stage.comm.rank == 0:
        stage.run.metrics.write("index train", {STAGE_SECONDS: round(seconds, 3), "sample": plan.sample})
    require_faiss().omp_set_num_threads(rank_threads())
    return {"seconds": seconds, "template": record.template, "nlist": plan.nlist, "sample": plan.sample}


def gather_sample(stage: Stage, datastore: Datastore, plan: Factory, seed: int) -> Array | None:
    """The sample, fp32 [n, D] in shard order, on rank 0; None elsewhere. Collective.

    Keys travel as stored (float16 halves the traffic), one shard of each rank at a time.
    """
    comm, shards = stage.comm, datastore.shards
    counts = sample_counts([shard.rows for shard in shards], plan.sample)
    sample = np.empty((plan.sample, datastore.width), np.float32) if comm.rank == 0 else None
    filled = 0
    with Progress("index train: read sample", plan.sample, "keys", comm.rank) as progress:
        for first in range(0, len(shards), comm.size):
            stage.stop.check(comm, "index train (nothing is lost: it starts with reading the sample)")

            def read(unit: int = first + comm.rank) -> Array | None:
                if unit >= len(shards):
                    return None
                rows = sample_rows(seed, unit, shards[unit].rows, counts[unit])
                return read_sample(datastore, unit, rows)

            pieces = comm.gather(together(comm, read))
            if sample is None or pieces is None:
                continue
            for piece in pieces:
                if piece is not None:
                    sample[filled : filled + len(piece)] = piece
                    filled += len(piece)
                    progress.advance(len(piece))
    assert sample is None or filled == plan.sample
    return sample


def train_template(plan: Factory, keys: Array, seed: int, threads: int) -> bytes:
    """Train a factory on keys fp32 [n, D]; the bytes of the empty index. k-means seeds are `seed`.

    Raises DistlmError when faiss cannot train it, or its file cannot be merged.
    """
    faiss = require_faiss()
    faiss.omp_set_num_threads(threads)
    index = plan.build()
    inner = inverted_file(index)
    inner.cp.seed = seed
    inner.cp.max_points_per_centroid = MOST_KEYS_PER_LIST
    # Few keys were already reported once, in words; faiss would print a line for each of M sub-quantisers.
    inner.cp.min_points_per_centroid = min(KEYS_PER_LIST, max(1, len(keys) // plan.nlist))
    if isinstance(inner, faiss.IndexIVFPQ):
        inner.pq.cp.seed = seed
        inner.pq.cp.min_points_per_centroid = 1
        # It renumbers codes for a Hamming filter that no search here uses, and costs 1.5 s per sub-quantiser.
        inner.do_polysemous_training = False
    try:
        index.train(keys)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip()
        raise DistlmError(f"index.factory={plan.used!r}: training on {len(keys)} keys failed ({reason})") from error
    data = serialise(index)
    Header(data)
    return data


def _train(stage: Stage, folder: IndexFolder, datastore: Datastore, plan: Factory, keys: Array) -> TemplateRecord:
    faiss = require_faiss()
    # The other ranks of this node wait, so their cores are free; and the count must not follow the rank count, since
    # sums of another number of threads round differently.
    threads = stage.config.launch.threads or usable_cores()
    say(
        f"index train: {plan.used} on {len(keys)} keys × {datastore.width} "
        f"({format_bytes(keys.nbytes)}), {threads} threads"
    )
    began = time.monotonic()
    data = train_template(plan, keys, stage.config.index.seed, threads)
    with atomic_path(folder.template) as temporary:
        temporary.write_bytes(data)
    record = TemplateRecord(
        template=bytes_hash(data),
        datastore=datastore.fingerprint,
        factory_asked=plan.asked,
        factory=plan.used,
        metric="L2",
        width=datastore.width,
        nlist=plan.nlist,
        code_size=plan.code_size,
        sample=plan.sample,
        seed=stage.config.index.seed,
        faiss=faiss.__version__,
        bytes=len(data),
    )
    record.write(folder.template_json)
    say(f"index train: trained in {time.monotonic() - began:.1f} s, template {record.template}")
    return record


def _trained_before(folder: IndexFolder, datastore: Datastore, plan: Factory, seed: int) -> TemplateRecord | None:
    if not folder.template_json.exists():
        return None
    record = load_template(folder, datastore).record
    now_and_then = (
        ("factory", record.factory, plan.used), ("sample", record.sample, plan.sample), ("seed", record.seed, seed)
    )  # fmt: skip
    for name, then, now in now_and_then:
        if then != now:
            raise DistlmError(
                f"{folder.template_json}: trained with {name} {then!r}, now {now!r}; give the new one a name of its "
                f"own with index.name=, set index.{name}= as it was, or remove {folder.root}"
            )
    return record


def _prepare_folder(folder: IndexFolder, plan: Factory) -> None:
    folder.root.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder.root)
    # Centroids and, at most, a square transform and codebooks of the same order.
    require_free_disk(folder.root, 4 * plan.width * (plan.nlist + 2 * plan.width + 256), "the index template")
