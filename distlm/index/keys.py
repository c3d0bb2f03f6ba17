"""Reads keys of scattered rows."""

from itertools import pairwise

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.index.layout import Array


def gather_keys(datastore: Datastore, ids: Array) -> Array:
    """Keys fp32 [n, D] of global rows `ids` int64 [n], in their order; each row is read once, in ascending order."""
    wanted, places = np.unique(ids, return_inverse=True)
    keys = np.empty((len(wanted), datastore.width), np.float32)
    firsts = np.array([shard.first_row for shard in datastore.shards] + [datastore.rows])
    edges = np.searchsorted(wanted, firsts)
    for shard, (start, stop) in enumerate(pairwise(edges.tolist())):
        if start < stop:
            keys[start:stop] = datastore.keys(shard)[wanted[start:stop] - firsts[shard]]
    return keys[places.reshape(-1)]
