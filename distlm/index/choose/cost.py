"""What building an index will need on so many ranks, from measured rates: disk, memory, traffic, seconds, by stage."""

from dataclasses import dataclass

from distlm.index.build.encode import LEAST_BATCH
from distlm.index.choose.plan import (
    KMEANS_ITERATIONS,
    Store,
    add_memory,
    add_units,
    merge_memory,
    shared_transforms,
    subspaces,
    template_bytes,
    train_memory,
    train_traffic,
    trained_keys,
)
from distlm.index.factory import Factory
from distlm.index.records import Rates
from distlm.runtime.units.planned import speedup

MERGE_FIXED_S = 0.1
"""Opening the merged file and looking sampled keys up in it."""


@dataclass(frozen=True)
class Cost:
    """One stage. Bytes are over all ranks, but for memory."""

    stage: str
    disk_bytes: int
    """Left on disk."""
    memory_bytes: int
    """Peak resident memory of the rank that needs most."""
    read_bytes: int
    written_bytes: int
    network_bytes: int
    seconds: float
    read_rate: float
    """Bytes per second that the file system must deliver to all ranks together; 0: it does not matter."""


def index_costs(factory: Factory, store: Store, rates: Rates, ranks: int) -> list[Cost]:
    """Costs of train, add and merge of `store` on `ranks` ranks that are like the one that was measured.

    Training: the keys are compared with their checksums, each shard by one rank; then each rank has its share of the
    sample, and whole subspaces of a product quantiser; transforms but PCA are trained on one. Adding: each rank encodes
    a run of units. Merging is bound by the disk: its rate is that of one rank, whatever the ranks.
    """
    template = template_bytes(factory)
    parts = store.rows * factory.key_bytes + store.shards * template
    merged = store.rows * factory.key_bytes + template
    sample = factory.sample * store.width * store.item
    keys = store.keys_bytes
    train_s = (
        keys / speedup([store.shards], ranks) / rates.read_bytes_s
        + sample / rates.read_bytes_s
        + trained_keys(factory) * KMEANS_ITERATIONS / (rates.kmeans_keys_s * ranks)
        + rates.pq_s / min(ranks, max(1, subspaces(factory)))
        + (
            factory.sample / (rates.transform_keys_s * (ranks if shared_transforms(factory) else 1))
            if rates.transform_keys_s
            else 0.0
        )
        + rates.transform_fixed_s
    )
    # Keys are read while others are encoded; codes are written, and parts made of them when a shard's are all there.
    encode_s = max(store.rows / rates.add_keys_s, keys / rates.read_bytes_s)
    part_s = (parts + store.rows * factory.key_bytes) / rates.write_bytes_s
    add_s = encode_s / speedup([add_units(factory, store)], ranks) + part_s / speedup([store.shards], ranks)
    merge_s = MERGE_FIXED_S + merged / rates.merge_bytes_s
    return [
        Cost("index train", template, train_memory(factory, store, ranks), keys + sample, template,
             train_traffic(factory, ranks), train_s, 0.0),
        Cost("index add", parts, add_memory(factory, store, LEAST_BATCH * max(1, rates.threads // 2)), keys, parts, 0,
             add_s, keys / add_s),
        Cost("index merge", merged, merge_memory(factory, store), parts, merged, 0, merge_s, 0.0),
    ]  # fmt: skip
