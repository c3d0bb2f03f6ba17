"""Reads keys of scattered rows."""

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.datastore.rows import gathered
from distlm.index.layout import Array


def gather_keys(datastore: Datastore, ids: Array) -> Array:
    """Keys fp32 [n, D] of global rows `ids` int64 [n], in their order; each row is read once, in ascending order."""
    return gathered(datastore, ids, "keys", np.float32)
