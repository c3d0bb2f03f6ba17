"""Records of an index: of its template, its parts, the finished index, and of files that tools of an index write."""

import math
from typing import Any, ClassVar

from msgspec import UNSET, UnsetType, field

from distlm.runtime.records import Part, Record

CODES = ".codes*.json"
"""Names of records of encoded units in the folder of parts."""
_MADE_WITH_INDEX = ("distlm index add", "distlm index merge", "distlm index build", "distlm knn search")


class TemplateRecord(Record, kw_only=True):
    """The trained index without keys, `template.index`; written after it."""

    FILE: ClassVar[str] = "RUN/index/NAME/template.json"
    WHAT: ClassVar[str] = "index template"
    WRITER: ClassVar[str] = "distlm index train"
    READERS: ClassVar[tuple[str, ...]] = (*_MADE_WITH_INDEX, "distlm index info")
    MEND: ClassVar[str] = "remove the folder and run `distlm index train` again"

    template: str
    """xxh3-128 of template.index: every part and the merged index name it."""
    datastore: str
    """Fingerprint of the store that it was trained on."""
    factory_asked: str
    """index.factory."""
    factory: str
    """The same with as many lists as the store can train."""
    metric: str
    """L2: squared distances."""
    width: int
    """D, numbers of a key."""
    nlist: int
    """Inverted lists."""
    code_size: int
    """Bytes of a key's code, without its id."""
    sample: int
    """Keys that it was trained on."""
    seed: int
    """index.seed."""
    faiss: str
    """Version of faiss."""
    bytes: int
    """Size of template.index."""


class KmeansRecord(Record, kw_only=True):
    """How far an unfinished k-means is; the centroids are in `.kmeans-ITERATIONS.npy` beside it."""

    FILE: ClassVar[str] = "RUN/index/NAME/.kmeans.json"
    WHAT: ClassVar[str] = "state of a k-means"
    WRITER: ClassVar[str] = "distlm index train"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index train",)

    key: str
    """Hash of all that the centroids follow from; a state of another k-means counts for nothing."""
    iterations: int
    """Iterations that are done."""
    xxh3: str
    """xxh3-128 of the centroids' file."""


class PartRecord(Record, kw_only=True):
    """The keys of one shard of the store, `part-00000.index`; written after it."""

    FILE: ClassVar[str] = "RUN/index/NAME/parts/part-00000.json"
    WHAT: ClassVar[str] = "part sidecar"
    WRITER: ClassVar[str] = "distlm index add"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index add", "distlm index merge", "distlm knn search")
    MEND: ClassVar[str] = "remove it and run `distlm index add` again"

    template: str
    """Template that the keys were added to."""
    datastore: str
    """Fingerprint of the store."""
    shard: int
    """Number of the shard, from 0."""
    first_id: int
    """Id of the first key: its row in the store."""
    rows: int
    """Keys; their ids follow one another."""
    bytes: int
    """Size of the part."""
    xxh3: str
    """xxh3-128 of the part."""
    lists: str | UnsetType = UNSET
    """xxh3-64 of each list's codes and ids, 16 hex digits each (of more than 4,096 lists: of so many groups of them),
    by which a merge checks what it copies; absent in old files, which it reads once more for that."""


class CodesRecord(Record, kw_only=True):
    """Which units of keys are encoded that are in no part yet, `.part-00000.codes`; gone when all parts are there. A
    share (launch.share) has its own, `.codes-K-of-N.json`."""

    FILE: ClassVar[str] = "RUN/index/NAME/parts/.codes.json"
    WHAT: ClassVar[str] = "record of encoded units"
    WRITER: ClassVar[str] = "distlm index add"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index add",)

    key: str
    """Hash of all that the codes follow from; those of another store or template count for nothing."""
    done: dict[str, str]
    """SHARD/UNIT → xxh3-128 of its codes."""


class IndexRecord(Record, kw_only=True):
    """The finished index, one file `merged.index` or its parts; written last."""

    FILE: ClassVar[str] = "RUN/index/NAME/index.json"
    WHAT: ClassVar[str] = "index record"
    WRITER: ClassVar[str] = "distlm index merge"
    READERS: ClassVar[tuple[str, ...]] = (
        "distlm index add", "distlm index search", "distlm index info", "distlm knn search", "distlm knn evaluate",
        "distlm generate",
    )  # fmt: skip
    MEND: ClassVar[str] = "delete it and run `distlm index build` again"

    fingerprint: str
    """Identifies the index, merged or not: hash of the store, the template and the parts' checksums."""
    datastore: str
    """Fingerprint of the store that it was built from."""
    template: str
    """Template of its parts."""
    factory: str
    """As in template.json."""
    metric: str
    """L2: squared distances."""
    width: int
    """D, numbers of a key."""
    nlist: int
    """Inverted lists."""
    code_size: int
    """Bytes of a key's code, without its id."""
    rows: int
    """N, keys."""
    parts: int
    """Parts that it was made of."""
    merged: bool = True
    """It is one file; false: the parts are searched where they lie (index.merge=false)."""
    bytes: int
    """Size of merged.index, or of all parts."""
    xxh3: str
    """Checksum of merged.index: `BYTES_HASH`, hash of the xxh3-128 of its pieces of so many bytes (in old files
    xxh3-128 of the whole); or hash of the parts' checksums."""
    self_found: float
    """Share, from 0 to 1, of sampled keys of the store that find themselves among 64 neighbours of their list."""


class JoinedPart(Part):
    """A file that was merged."""

    path: str
    """Absolute."""
    rows: int
    """Keys."""
    first_id: int | UnsetType = UNSET
    """Least of its ids in the merged file, where each file's ids are one range: then it can be dropped by name."""


class JoinRecord(Record, kw_only=True):
    """What `distlm index merge --parts … --out MERGED.index` wrote."""

    FILE: ClassVar[str] = "MERGED.index.json"
    WHAT: ClassVar[str] = "record of a merge"
    WRITER: ClassVar[str] = "distlm index merge --parts"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index drop",)
    MEND: ClassVar[str] = "drop keys by --ids, or merge again"

    rows: int
    """Keys."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """Checksum of the file, as in index.json."""
    trained: str
    """xxh3-128 of the trained index that all parts have in common."""
    ids: str
    """--ids: keep or shift."""
    self_found: float
    """Share, from 0 to 1, of sampled keys that find themselves in their list."""
    parts: list[JoinedPart]
    """In the order of their ids."""


class AddedKeys(Part):
    """A file of keys."""

    path: str
    """Absolute, .npy."""
    rows: int
    """Keys."""


class ExtendRecord(Record, kw_only=True):
    """What `distlm index extend --out PART.index` wrote."""

    FILE: ClassVar[str] = "PART.index.json"
    WHAT: ClassVar[str] = "description of a part"
    WRITER: ClassVar[str] = "distlm index extend"
    READERS: ClassVar[tuple[str, ...]] = ()

    rows: int
    """Keys."""
    first_id: int
    """Id of the first key; the others follow."""
    xxh3: str
    """xxh3-128 of the part."""
    extends: str
    """The index that has its trained state, absolute."""
    keys: list[AddedKeys]
    """Where its keys are from, in order."""


class DropRecord(Record, kw_only=True):
    """What `distlm index drop --out SMALLER.index` wrote."""

    FILE: ClassVar[str] = "SMALLER.index.json"
    WHAT: ClassVar[str] = "description of a smaller index"
    WRITER: ClassVar[str] = "distlm index drop"
    READERS: ClassVar[tuple[str, ...]] = ()

    rows: int
    """Keys that stayed."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """xxh3-128 of the file."""
    from_index: str = field(name="of")
    """The index that it was made from, absolute."""
    dropped: list[tuple[int, int]]
    """Ids that are gone, ranges [low, high)."""


class MergeJournal(Record, kw_only=True):
    """What is written of an unfinished merge, so that one that was killed goes on from there."""

    FILE: ClassVar[str] = "RUN/index/NAME/.merged.index.tmp.json"
    WHAT: ClassVar[str] = "journal of a merge"
    WRITER: ClassVar[str] = "distlm index merge"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index merge",)

    key: str
    """Hash of what the merged file is made of; a journal of another merge counts for nothing."""
    units: dict[str, str]
    """Number of a unit (a range of bytes) → xxh3-128 of what was written of it."""


class Candidate(Part):
    """One factory at one nprobe and one number of candidates, as `distlm index tune` measured it."""

    factory: str
    """With the lists of the whole store."""
    nprobe: int
    """Lists searched per query."""
    candidates: int
    """Neighbours that the index is asked for, of which exact distances choose k."""
    key_bytes: int
    """Bytes of a key in the index, 8 of id included."""
    keys: int
    """Keys that were indexed for it."""
    lists: int
    """Inverted lists in which they lay."""
    recall: float
    """Share, from 0 to 1, of the exact nearest that are among the candidates, in the sample."""
    query_ms: float
    """Milliseconds per query in the sample, without exact distances."""
    store_recall: float
    """The share in the whole store, extrapolated from two samples; as measured where the sample was all of it."""
    store_ms: float
    """Milliseconds per query of the whole store, likewise."""
    rescore_ms: float
    """Milliseconds per query of the exact distances of the candidates, from keys in memory; 0 without."""
    add_keys_s: float
    """Keys encoded and added per second."""
    train_s: float
    """Seconds of training on the sample, without centroids that an earlier factory had found."""
    perplexity: float | None = None
    """Perplexity per token of the interpolated model with the sample; null where no neighbours were kept."""

    @property
    def whole_ms(self) -> float:
        """Milliseconds per query of the whole store, exact distances included."""
        return self.store_ms + self.rescore_ms


class TunedIndex(Record, kw_only=True):
    """What `distlm index tune` has measured, and its pick."""

    FILE: ClassVar[str] = "RUN/index-tune/pick.json"
    WHAT: ClassVar[str] = "pick of an index"
    WRITER: ClassVar[str] = "distlm index tune"
    READERS: ClassVar[tuple[str, ...]] = ()
    MEND: ClassVar[str] = "run `distlm index tune` again"

    datastore: str
    """Fingerprint of the store."""
    rows: int
    """Its keys."""
    k: int
    """knn.k."""
    queries: int
    """Keys that were looked for."""
    threads: int
    """Threads that searched."""
    most_bytes: float
    """--most-bytes; 0: no limit."""
    most_ms: float
    """--most-ms; 0: no limit."""
    least_recall: float
    """--least-recall; 0: any."""
    pick: Candidate | None
    """The pick within the limits; null where nothing measured is."""
    measured: list[Candidate]
    """Everything that was measured."""


class ChosenFactory(Record, kw_only=True):
    """What index.factory=auto stands for in this index; written before it is trained."""

    FILE: ClassVar[str] = "RUN/index/NAME/choice.json"
    WHAT: ClassVar[str] = "choice of an index factory"
    WRITER: ClassVar[str] = "distlm index train"
    READERS: ClassVar[tuple[str, ...]] = ("distlm index train", "distlm index build")
    MEND: ClassVar[str] = "remove it, and it is chosen anew"

    rows: int
    """Keys of the store."""
    width: int
    """D, numbers of a key."""
    sample: int
    """index.sample."""
    max_bytes_per_key: int
    """index.max_bytes_per_key."""
    max_memory: float
    """index.max_memory, in GB."""
    factory: str
    """The factory that was chosen."""
    why: list[str]
    """The reasons, in words."""


class Rates(Part):
    """Measured on one rank with `threads` threads."""

    threads: int
    """Of a rank."""
    add_keys_s: float
    """Keys encoded and added per second."""
    kmeans_keys_s: float
    """Keys through one iteration of coarse k-means per second."""
    pq_s: float
    """Seconds of training all codebooks; 0 without a product quantiser."""
    transform_keys_s: float | None
    """Keys per second through training of the transforms; null without."""
    transform_fixed_s: float
    """Seconds that training the transforms takes besides (eigenvectors)."""
    write_bytes_s: float
    """Bytes per second to the folder, fsync included."""
    read_bytes_s: float
    """Bytes per second from the folder, as far as the page cache can be left out."""
    merge_bytes_s: float
    """Bytes per second of the merged file: parts read, copied and flushed."""


class RatesFile(Record, kw_only=True):
    """How fast a machine builds one kind of index."""

    FILE: ClassVar[str] = "--rates FILE"
    WHAT: ClassVar[str] = "measured rates"
    WRITER: ClassVar[str] = "distlm plan"
    READERS: ClassVar[tuple[str, ...]] = ("distlm plan",)
    FORMAT: ClassVar[int] = 2
    MEND: ClassVar[str] = "remove it to measure again"

    factory: str
    """Measured for this one."""
    width: int
    """D, numbers of a key."""
    sample: int
    """Keys that an index would be trained on."""
    rates: Rates
    """What was measured."""

    @classmethod
    def upgraded(cls, tree: dict[str, Any]) -> dict[str, Any]:
        # Format 1 had Infinity there, which is no JSON.
        rates = tree.get("rates")
        if isinstance(rates, dict) and rates.get("transform_keys_s") == math.inf:
            tree = {**tree, "rates": {**rates, "transform_keys_s": None}}
        return tree
