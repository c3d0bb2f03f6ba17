"""The template: one trained index without keys."""

import time
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from distlm.config.schema import AUTO
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.torch_lists import gpu_device
from distlm.index.choose.auto import Chosen, record_of, resolve, said
from distlm.index.factory import MOST_KEYS_PER_LIST, Factory, fit_factory, quantizer_bits
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.layout import Header, IndexFolder
from distlm.index.records import TemplateRecord
from distlm.index.train.kept import remove_kept
from distlm.index.train.sample import StoreSample
from distlm.index.train.team import Team
from distlm.index.train.template import trained
from distlm.runtime.files import (
    atomic_path,
    bytes_hash,
    require_free_disk,
    sweep_temporaries,
)
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first, together
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

    Every rank reads and holds a share of the sample, and all train together; a killed k-means goes on. Raises
    DistlmError for a refused factory, NaN or infinite keys, a template of another store or factory, and while another
    run writes this index.
    """
    require_faiss()
    datastore = together(stage.comm, lambda: Datastore.open(stage.run.datastore))
    folder, config = IndexFolder(stage.run.index), stage.config.index
    chosen = rank0_first(stage.comm, lambda: resolve(config, datastore.rows, datastore.width, folder.root))
    plan = together(stage.comm, lambda: fit_factory(chosen.factory, datastore.width, datastore.rows, config.sample))
    # First without the lock: a finished folder may be read-only.
    if done := _nothing_to_do(stage, folder, datastore, plan):
        return done
    with only_writer(folder.root, stage.comm, "training this index"):
        # The run that held the lock until now may have trained it.
        if done := _nothing_to_do(stage, folder, datastore, plan):
            return done
        start = time.monotonic()
        stage.require_whole(datastore.folder, datastore.written())
        return _train_together(stage, folder, datastore, plan, chosen, start)


def _nothing_to_do(stage: Stage, folder: IndexFolder, datastore: Datastore, plan: Factory) -> TrainSummary | None:
    """What run_index_train returns for a template that is there; None without one. Collective."""
    done = rank0_first(stage.comm, lambda: _trained_before(folder, datastore, plan, stage.config.index.seed))
    if not done:
        return None
    say(f"index train: {folder.template} is complete, nothing to do", stage.comm.rank)
    return {"seconds": 0.0, "template": done.template, "nlist": done.nlist, "done_before": True}


def _train_together(
    stage: Stage, folder: IndexFolder, datastore: Datastore, plan: Factory, chosen: Chosen, start: float
) -> TrainSummary:
    """The work of run_index_train, which began at `start`. Collective; by the only writer."""
    if stage.comm.rank == 0:
        for message in (*said(chosen), *plan.messages):
            say(f"index train: {message}")
    rank0_first(stage.comm, lambda: _prepare_folder(folder, plan))
    if stage.config.index.factory == AUTO:
        record = record_of(stage.config.index, datastore.rows, datastore.width, chosen)
        rank0_first(stage.comm, lambda: record.write(folder.choice_json))
    seed = stage.config.index.seed
    sample = StoreSample(datastore, plan.sample, seed)
    say(
        f"index train: {plan.used} on {sample.rows} keys × {sample.width}, {rank_threads()} threads a rank",
        stage.comm.rank,
    )
    what = "index train (k-means goes on from its last iteration)"
    team = Team(stage.comm, rank_threads(), gpu_device(), lambda: stage.stop.check(stage.comm, what))
    data = trained(plan, sample, seed, team, folder.root, datastore.fingerprint)
    template = rank0_first(stage.comm, lambda: _write(folder, datastore, plan, seed, data)).template
    seconds = time.monotonic() - start
    say(f"index train: trained in {seconds:.1f} s, template {template}", stage.comm.rank)
    if stage.comm.rank == 0:
        stage.run.metrics.write("index train", {STAGE_SECONDS: round(seconds, 3), "sample": plan.sample})
    return {"seconds": seconds, "template": template, "nlist": plan.nlist, "sample": plan.sample}


def _write(folder: IndexFolder, datastore: Datastore, plan: Factory, seed: int, data: bytes) -> TemplateRecord:
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
        seed=seed,
        faiss=require_faiss().__version__,
        bytes=len(data),
    )
    record.write(folder.template_json)
    remove_kept(folder.root)
    return record


def _trained_before(folder: IndexFolder, datastore: Datastore, plan: Factory, seed: int) -> TemplateRecord | None:
    if not folder.template_json.exists():
        return None
    record = load_template(folder, datastore).record
    # Earlier versions trained product quantisers of more than 8 bits on no more keys than those of 8.
    of_before = min(plan.sample, MOST_KEYS_PER_LIST * max(plan.nlist, 256))
    sample = record.sample if record.sample == of_before else plan.sample
    now_and_then = (
        ("factory", record.factory, plan.used), ("sample", record.sample, sample), ("seed", record.seed, seed)
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
    books = 1 << max(8, quantizer_bits(plan.build(), plan.asked))
    require_free_disk(folder.root, 4 * plan.width * (plan.nlist + 2 * plan.width + books), "the index template")
