"""What the index stages will need: disk, memory, time."""

from dataclasses import dataclass
from math import ceil

from distlm.config.schema import AUTO, RunConfig
from distlm.data.estimate import expected_tokens
from distlm.datastore.lengths import lengths_of
from distlm.datastore.plan import plan_store
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.codes import planned_units
from distlm.index.build.encode import LEAST_BATCH, transforms_of
from distlm.index.build.integer_lists import memory
from distlm.index.choose.auto import Chosen, resolve, said
from distlm.index.factory import MOST_KEYS_PER_LIST, Factory, check_factory, fit_factory, inverted_file
from distlm.index.faiss_module import require_faiss
from distlm.index.merge.stage import UNIT_BYTES
from distlm.index.train.codes import needed_rows
from distlm.index.train.sample import WIDE_BYTES
from distlm.models.described import causal, model_of
from distlm.runtime.files import format_bytes
from distlm.runtime.local.place import SETTING, asked_place
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import idle_note, speedup

KMEANS_ITERATIONS = 10
PQ_ITERATIONS = 25
"""What faiss trains a product quantiser with."""
COARSE_EFFICIENCY = 0.8
"""Share of the matrix-multiply rate that faiss's nearest-centroid search reaches (measured: 85 to 95 %)."""
ENCODE_EFFICIENCY = 0.055
"""The same for its product-quantiser encoder (measured: 35,000 keys/s for PQ64 of 1,024 values on two cores)."""
COPY_RATE = 400e6
"""Bytes/s of checking, copying and reading back parts on a local disk."""
READ_RATE = 1e9
"""Assumed bytes/s of reading the keys for their checksums, all ranks together."""
PROCESS_BYTES = 150 << 20
"""Python, numpy and faiss."""


@dataclass(frozen=True)
class Store:
    """What the plan must know of a datastore that may not be written yet."""

    rows: int
    width: int
    shards: int
    written: bool
    item: int = 2
    """Bytes of one number of a key."""

    @property
    def keys_bytes(self) -> int:
        """Of all keys, as they are stored."""
        return self.rows * self.width * self.item


def plan_index(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of train, add and merge together, from the datastore, or from the token files while it is not written.

    Raises DistlmError for a refused factory.
    """
    store = store_of(config)
    if store is None:
        if config.index.factory != AUTO:
            check_factory(config.index.factory, _width(config))
        work = f"{config.index.factory}; the number of keys is known after `distlm data prepare`"
        return StagePlan("index build", work, disk_bytes=0, memory_bytes=0, seconds=None, known=False)
    chosen, plan = fitted(config, store.rows, store.width)
    template = template_bytes(plan)
    parts = store.rows * plan.key_bytes + store.shards * template
    merged = store.rows * plan.key_bytes + template
    notes = [*said(chosen), *plan.messages]
    if config.index.keep_parts:
        notes.append(f"the parts ({format_bytes(parts)}) stay on disk; index.keep_parts=false frees them at the end")
    if not store.written:
        notes.append("the datastore is not written yet: its rows are those that the text will give")
    notes += copied(config, store)
    units = add_units(plan, store)
    notes += idle_note(units, ranks, f"launch.ranks={units} takes as long to add keys")
    return StagePlan(
        stage="index build",
        work=f"{store.rows} keys × {store.width} → {plan.used}, {plan.key_bytes} bytes/key, {store.shards} parts",
        disk_bytes=parts + merged + template,
        memory_bytes=max(train_memory(plan, store, ranks), add_memory(plan, store), merge_memory(plan, store)),
        seconds=_seconds(plan, store, parts + merged, rank_flops(config.launch.threads, ranks), ranks),
        notes=notes,
        units=(units,),
    )


def fitted(config: RunConfig, rows: int, width: int) -> tuple[Chosen, Factory]:
    """What `distlm index train` makes for a store of `rows` keys. Raises DistlmError for a refused factory."""
    chosen = resolve(config.index, rows, width, RunDir.of(config).index)
    return chosen, fit_factory(chosen.factory, width, rows, config.index.sample)


def copied(config: RunConfig, store: Store) -> list[str]:
    """What launch.stage_in copies to the nodes while keys are added, as a note."""
    place = asked_place(config.launch.stage_in)
    if not place:
        return []
    return [
        f"{SETTING}={place}: {format_bytes(store.keys_bytes)} of keys are copied over all nodes: to each those of the "
        "shards that its ranks add"
    ]


def template_bytes(plan: Factory) -> int:
    """Size of the trained index without keys: centroids, codebooks, transforms, one number per list."""
    faiss = require_faiss()
    index = plan.build()
    inner = inverted_file(index)
    count = 4 * plan.nlist * (inner.d + 2)
    if isinstance(inner, faiss.IndexIVFPQ):
        count += 4 * inner.d * (1 << inner.pq.nbits)
    if isinstance(graph := faiss.downcast_index(inner.quantizer), faiss.IndexHNSW):
        # Twice M neighbours of each centroid on the lowest level, half of that on all others together.
        count += 4 * plan.nlist * 3 * graph.hnsw.nb_neighbors(1)
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        count += 4 * plan.width * inner.d * outer.chain.size()
        # PCA is stored with its whole rotation besides the part that is used.
        count += 4 * plan.width**2 if "PCA" in plan.used else 0
    return count


def add_units(plan: Factory, store: Store) -> int:
    """Units of work of adding the keys."""
    per_shard = ceil(store.rows / store.shards)
    shards = [min(per_shard, store.rows - first) for first in range(0, store.rows, per_shard)]
    return planned_units(plan.build(), shards)


def trained_keys(plan: Factory) -> int:
    """Keys that k-means reads in each iteration."""
    return min(plan.sample, MOST_KEYS_PER_LIST * plan.nlist)


def subspaces(plan: Factory) -> int:
    """M of a product quantiser, whose subspaces are trained apart; 0 without one."""
    inner = inverted_file(plan.build())
    return int(inner.pq.M) if isinstance(inner, require_faiss().IndexIVFPQ) else 0


def shared_transforms(plan: Factory) -> bool:
    """Whether all ranks train the transforms together: PCA, and what learns nothing."""
    return all(part.is_trained or isinstance(part, require_faiss().PCAMatrix) for part in transforms_of(plan.build()))


def train_memory(plan: Factory, store: Store, ranks: int) -> int:
    """Peak of a rank that trains."""
    index = plan.build()
    inner = inverted_file(index)
    # Its share of the sample as it is stored, or as fp32 where that is little, and behind a transform as fp32; the
    # sums, and those of the other ranks.
    little = 4 * plan.sample * store.width // ranks <= WIDE_BYTES
    key = store.width * (4 if little else store.item) + (4 * inner.d if transforms_of(index) else 0)
    sums = 2 * 8 * plan.nlist * inner.d
    # Residuals that train the codes: its own, and of some subspaces those of all ranks, twice.
    codes = 3 * 4 * inner.d * min(plan.sample, needed_rows(inner)) // ranks
    pca = 2 * 8 * store.width**2 if transforms_of(index) else 0
    integers = memory(plan.nlist, inner.d, trained_keys(plan) * KMEANS_ITERATIONS)
    return PROCESS_BYTES + integers + plan.sample * key // ranks + max(sums, codes, pca) + 2 * template_bytes(plan)


def train_traffic(plan: Factory, ranks: int) -> int:
    """Bytes between ranks: the sums of each iteration there and back, and residuals."""
    if ranks == 1:
        return 0
    inner = inverted_file(plan.build())
    return ranks * (
        2 * 8 * plan.nlist * inner.d * KMEANS_ITERATIONS + 4 * inner.d * min(plan.sample, needed_rows(inner))
    )


def add_memory(plan: Factory, store: Store, batch: int = LEAST_BATCH) -> int:
    """Peak of a rank that adds shards, `batch` keys at a time."""
    # Faiss grows lists by doubling; the batch in use and the one read ahead, and the residuals of the one in use.
    keys = min(batch, store.rows) * store.width * 4
    used = PROCESS_BYTES + memory(plan.nlist, inverted_file(plan.build()).d, store.rows)
    return used + 2 * ceil(store.rows / store.shards) * plan.key_bytes + 3 * keys + 2 * template_bytes(plan)


def merge_memory(plan: Factory, store: Store) -> int:
    """Peak of a rank that merges."""
    merged = store.rows * plan.key_bytes + template_bytes(plan)
    buffers = 2 * min(UNIT_BYTES, merged) + 4 * 8 * store.shards * plan.nlist
    return PROCESS_BYTES + buffers + 2 * template_bytes(plan)


def _seconds(plan: Factory, store: Store, bytes_moved: int, rank_flops: float, ranks: int) -> float:
    faiss = require_faiss()
    inner = inverted_file(plan.build())
    coarse = 2 * plan.nlist * inner.d / COARSE_EFFICIENCY
    turned = 2 * plan.width * inner.d * len(transforms_of(plan.build())) / COARSE_EFFICIENCY
    encode = 2 * (1 << inner.pq.nbits) * inner.d / ENCODE_EFFICIENCY if isinstance(inner, faiss.IndexIVFPQ) else 0.0
    kmeans = trained_keys(plan) * (coarse * KMEANS_ITERATIONS + turned)
    codebook = min(plan.sample, needed_rows(inner)) * encode * PQ_ITERATIONS
    train = kmeans / (rank_flops * ranks) + codebook / (rank_flops * min(ranks, subspaces(plan) or 1))
    add = store.rows * (turned + coarse + encode) / (rank_flops * speedup([add_units(plan, store)], ranks))
    checked = store.keys_bytes / READ_RATE
    return checked + train + add + bytes_moved / COPY_RATE


def store_of(config: RunConfig) -> Store | None:
    """The datastore of a run, or what it will be by the token files or the text; None where nothing is known."""
    run = RunDir.of(config)
    try:
        datastore = Datastore.open(run.datastore)
        return Store(
            datastore.rows, datastore.width, len(datastore.shards), written=True, item=datastore.key_dtype.itemsize
        )
    except DistlmError:
        pass
    written = config.datastore
    tokens = expected_tokens(config).tokens.get(written.split, 0)
    if not tokens:
        return None
    plan = plan_store(tokens, *lengths_of(config), written.batch_blocks, written.rows_per_shard)
    return Store(plan.rows, _width(config), len(plan.shards), written=False, item=written.key_item)


def _width(config: RunConfig) -> int:
    """D of the keys that the configured model will give."""
    return causal(model_of(config)).width
