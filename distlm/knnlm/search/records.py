"""What lies beside the arrays of neighbours and states: plans, manifests, units, and the self-test's figures."""

from typing import ClassVar, Literal

from msgspec import UNSET, UnsetType

from distlm.runtime.records import Part, Record, all_or_none


class UnitFacts(Part):
    """The arrays of one unit of work."""

    rows: int
    """Tokens: rows of each array."""
    hashes: dict[str, str]
    """Array → xxh3-128 of its .npy file."""


class UnitFile(Record):
    """The arrays beside it. The folder of a unit is whole or absent, and so is this file."""

    FILE = "RUN/{neighbours/LABEL,states,cache}/SPLIT/unit-NNNNN/unit.json"
    WHAT = "description of a unit"
    WRITER = "distlm knn search, distlm knn cache"
    READERS = ("distlm knn search", "distlm knn cache")
    MEND = "remove its folder and run the same command again"

    rows: int
    """Tokens: rows of each array."""
    hashes: dict[str, str]
    """Array → xxh3-128 of its .npy file."""


class SelfTest(Part):
    """How many of the store's own keys a search finds (search/selftest.py)."""

    run: bool | UnsetType = UNSET
    """False: left out with knn.self_test=false, and then all else is absent. Absent in old files: true."""
    keys: int | UnsetType = UNSET
    """Stored keys that were looked up."""
    k: int | UnsetType = UNSET
    """Neighbours of each."""
    nprobe: int | UnsetType | None = UNSET
    """Lists that were searched, as read back from the index; null for brute force."""
    expected: float | UnsetType = UNSET
    """Share that must find its own row among the k; absent in old files."""
    found: float | UnsetType = UNSET
    """Share that does."""
    first: float | UnsetType = UNSET
    """Share whose nearest neighbour is its own row."""
    checked: int | UnsetType = UNSET
    """Evaluated tokens whose kept neighbours were checked against the store; in results.json only."""

    def __post_init__(self) -> None:
        all_or_none(self, "keys", "k", "nprobe", "found", "first")
        if self.run is not False and self.keys is UNSET:
            raise ValueError("Object missing field `keys` of a self-test that was run")


class SplitPlan(Record):
    """How a split is cut into blocks and units: what every evaluation of it begins with."""

    kind: str
    """What the folder holds."""
    split: str
    """Name of the split."""
    tokens: int
    """Evaluated tokens Q."""
    blocks: int
    """Evaluation blocks."""
    blocks_per_unit: int
    """Blocks in one unit of work (knn.blocks_per_unit)."""
    batch_blocks: int
    """Blocks in one forward pass (knn.batch_blocks); last bits depend on it."""
    context_window: int
    """Previous tokens given to each block."""
    block: int
    """Longest block, in tokens."""
    context_rule: str
    """The same in words, to be shown beside every perplexity."""


class StatesPlan(SplitPlan):
    """Which hidden states are being computed; a start with other inputs is refused."""

    FILE = "RUN/states/SPLIT/plan.json"
    WHAT = "plan of hidden states"
    WRITER = "distlm knn cache"
    READERS: ClassVar[tuple[str, ...]] = ("distlm knn cache",)
    MEND = "remove its folder and run `distlm knn cache` again"

    kind: Literal["states"]
    """What the folder holds."""
    tap: str
    """Name of the hidden state."""
    key_dtype: str
    """numpy dtype of the states."""
    model: str
    """Fingerprint of the model."""
    dictionary: str
    """Hash of the dictionary."""
    token_files: str
    """Fingerprint of the token files."""


class StatesManifest(StatesPlan):
    """Finished hidden states, targets and log-probabilities of a split; written last. Its hash is their fingerprint."""

    FILE = "RUN/states/SPLIT/manifest.json"
    WHAT = "description of hidden states"
    READERS = ("distlm knn cache", "distlm knn tune", "distlm knn evaluate")

    units: list[UnitFacts]
    """Units in order of the split's tokens."""


class NeighboursPlan(SplitPlan):
    """What is being searched for; a start with other inputs is refused."""

    FILE = "RUN/neighbours/LABEL/SPLIT/plan.json"
    WHAT = "plan of neighbours"
    WRITER = "distlm knn search"
    READERS: ClassVar[tuple[str, ...]] = ("distlm knn search",)
    MEND = "remove its folder and run `distlm knn search` again"

    kind: Literal["neighbours"]
    """What the folder holds."""
    k: int
    """Neighbours of each token."""
    nprobe: int | None
    """Lists searched per query; null for brute force."""
    search: Literal["index", "brute"]
    """index: the faiss index; brute: every key."""
    distances: Literal["exact", "quantised"]
    """exact: over the true keys; quantised: as the index gives them."""
    tap: str
    """Name of the hidden state that is query and key."""
    width: int
    """Numbers in a key, D."""
    key_dtype: str
    """numpy dtype of keys and queries."""
    model: str
    """Fingerprint of the model."""
    dictionary: str
    """Hash of the dictionary."""
    token_files: str
    """Fingerprint of the token files."""
    datastore: str
    """Fingerprint of the datastore."""
    index: str
    """Fingerprint of the index, or brute."""
    self_test: SelfTest
    """Of the search before this split; no input: another start may find other figures."""
    candidates: int | UnsetType = UNSET
    """Neighbours that the index was asked for, of which the exact distances chose k; absent: k."""
    similarity: Literal["dot"] | UnsetType = UNSET
    """dot: the distances are dot products, each row's greatest less its own; absent: squared L2."""
    fast_scan: bool | UnsetType = UNSET
    """Of 4-bit product codes: true where they were compared by FastScan's tables of 8 bits, which finds slightly other
    neighbours than the codes as they are; absent for other codes and in old files."""


class NeighboursManifest(NeighboursPlan, kw_only=True):
    """Finished neighbours of a split; written last. Its hash is their fingerprint."""

    FILE = "RUN/neighbours/LABEL/SPLIT/manifest.json"
    WHAT = "description of neighbours"
    READERS = ("distlm knn tune", "distlm knn evaluate", "distlm knn cache", "distlm index tune", "distlm report")

    units: list[UnitFacts]
    """Units in order of the split's tokens."""
