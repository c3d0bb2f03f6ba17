"""A datastore in memory: read as one on disk is, by the index and the search alike."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import structs

from distlm.datastore.extract import batches_of_hidden_states
from distlm.datastore.manifest import VALUE_DTYPE
from distlm.datastore.plan import StorePlan
from distlm.datastore.reader import Datastore
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.errors import DistlmError
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import bytes_hash

PLACE = Path("(in memory)")
"""Folder of such a store, in messages."""


@dataclass(frozen=True)
class HeldDatastore(Datastore):
    """Its arrays are in memory; `keys` and `values` give them as they are."""

    arrays: Sequence[tuple[npt.NDArray[np.floating], npt.NDArray[np.int32]]] = field(default=(), repr=False)
    """Keys [rows, D] and values int32 [rows] of each shard."""

    def keys(self, shard: int) -> Any:
        """Keys of a shard: key_dtype [rows of the shard, D]."""
        return self.arrays[shard][0]

    def values(self, shard: int) -> Any:
        """Values of a shard: int32 [rows of the shard]."""
        return self.arrays[shard][1]


def hold_store(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    plan: StorePlan,
    settings: Settings,
    before: HeldDatastore | None = None,
) -> HeldDatastore:
    """Compute the keys of the tokens `ids` [tokens] into memory: rows × (D numbers of key_dtype + 4) bytes.

    The rows of `before`, whose settings but for the tokens are the same, come first; its arrays are shared, not copied.
    Raises DistlmError for keys that are not finite or do not fit key_dtype.
    """
    arrays = [] if before is None else list(before.arrays)
    shards = [] if before is None else list(before.shards)
    for planned in plan.shards:
        keys = np.empty((planned.rows, settings.width), settings.key_dtype)
        values = np.empty(planned.rows, VALUE_DTYPE)
        filled = 0
        with closing(batches_of_hidden_states(model, ids, plan.blocks, plan.batches(planned), settings.tap)) as batches:
            for found, targets, _ in batches:
                rows = slice(filled, filled + len(targets))
                with np.errstate(over="ignore"):
                    keys[rows], values[rows] = found.cpu().numpy(), targets.numpy()
                _check(keys[rows], settings)
                filled = rows.stop
        first = sum(shard.rows for shard in shards)
        hashes = bytes_hash(keys.tobytes()), bytes_hash(values.tobytes())
        shard = Shard(len(shards), first, planned.rows, planned.token_start, planned.token_end)
        shards.append(structs.replace(shard, keys_hash=hashes[0], values_hash=hashes[1], done=True))
        arrays.append((keys, values))
    manifest = Manifest.of_store(settings, sum(shard.rows for shard in shards), shards, complete=True)
    return HeldDatastore(PLACE, manifest, arrays)


def _check(keys: npt.NDArray[np.floating], settings: Settings) -> None:
    if not np.isfinite(keys).all():
        raise DistlmError(
            f"tap={settings.tap!r}: the model gives keys that are not finite or do not fit key_dtype="
            f"{settings.key_dtype}; use key_dtype='float32', or another tap"
        )
