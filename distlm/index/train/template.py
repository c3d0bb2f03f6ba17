"""A template's bytes from a sample: transforms, coarse centroids and codes, each trained by all ranks together."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from distlm.index.build.encode import transforms_of
from distlm.index.factory import MOST_KEYS_PER_LIST, Factory, inverted_file
from distlm.index.faiss_module import faiss_threads, require_faiss
from distlm.index.layout import Array, Header, serialise
from distlm.index.train.codes import needed_rows, residuals, train_codes
from distlm.index.train.kept import Kept
from distlm.index.train.kmeans import kmeans
from distlm.index.train.sample import ArraySample, Held, Sample, held_by, some_of
from distlm.index.train.team import Team
from distlm.index.train.transforms import train_transforms, transformed
from distlm.runtime.files import json_hash
from distlm.runtime.ranks.collective import rank0_first, together

LISTS, CODES = 3, 4
"""Draws of what the centroids and the codes are trained on (sample.some_of)."""


Known = dict[tuple[str, int], Array]
"""(Transforms and lists of a factory, keys) → centroids, for factories that are trained on the same sample."""


def train_template(plan: Factory, keys: Array, seed: int, threads: int, known: Known | None = None) -> bytes:
    """`trained` on keys [n, D] in memory, by this process alone; centroids that are `known` are taken from there."""
    return trained(plan, ArraySample(keys), seed, Team(threads=threads), known=known)


def trained(
    plan: Factory, sample: Sample, seed: int, team: Team, folder: Path | None = None, store: str = "",
    known: Known | None = None,
) -> bytes:  # fmt: skip
    """Train a factory on a sample; the bytes of the empty index, on every rank. Collective.

    They are the same for any number of ranks and threads, except behind an OPQ or ITQ, which faiss trains with the
    cores of rank 0's node. With a `folder` the state of k-means is kept there, for the sample of that `store`.

    Memory of a rank: its share of the sample in the keys' type, and behind a transform as fp32; nlist × d fp64 for the
    sums. Raises DistlmError when faiss cannot train it, or its file cannot be merged, and as Sample.read.
    """
    comm = team.comm
    index = plan.build()
    if not all(part.is_trained for part in transforms_of(index)):
        every = together(comm, lambda: held_by(comm.rank, comm.size, sample, np.arange(sample.rows)))
        index = train_transforms(index, every, seed, team, plan.used)
        del every
    inner = inverted_file(index)
    kept = None
    if folder:
        made_of = [store, plan.used, plan.width, sample.rows, seed, require_faiss().__version__]
        kept = Kept(folder, json_hash(made_of))
    name = coarse_part(plan.used), sample.rows
    if known is not None and name in known:
        centroids = known[name]
    else:
        held = _behind(index, sample, min(sample.rows, MOST_KEYS_PER_LIST * plan.nlist), seed, LISTS, team)
        centroids = kmeans(held, plan.nlist, int(inner.cp.niter), seed, team, kept)
        del held
    if known is not None:
        known[name] = centroids
    team.check()
    if isinstance(inner, require_faiss().IndexIVFPQ):
        inner.pq.cp.seed = seed
        # Few keys were already reported once, in words; faiss would print a line for each of M sub-quantisers.
        inner.pq.cp.min_points_per_centroid = 1
    held = _behind(index, sample, needed_rows(inner), seed, CODES, team)
    train_codes(inner, *residuals(held, centroids if inner.by_residual else None, team), team, plan.used)
    return rank0_first(comm, lambda: _whole(index, inner, centroids))


def coarse_part(factory: str) -> str:
    """What decides a factory's centroids: its transforms and the number of its lists."""
    found = re.match(r".*?IVF\d+", factory)
    return found[0] if found else factory


def _behind(index: Any, sample: Sample, count: int, seed: int, use: int, team: Team) -> Held:
    """`count` of the sample, this rank's share, behind the transforms of an index. Collective."""
    comm = team.comm
    places = some_of(sample.rows, count, seed, use)
    held = together(comm, lambda: held_by(comm.rank, comm.size, sample, places))
    transforms = transforms_of(index)
    if not transforms:
        return held
    with team.workers() as workers:
        return transformed(held, transforms, workers)


def _whole(index: Any, inner: Any, centroids: Array) -> bytes:
    quantizer = require_faiss().downcast_index(inner.quantizer)
    # A graph of centroids (HNSW) depends on the order in which threads add to it.
    with faiss_threads(1):
        quantizer.reset()
        quantizer.add(centroids)
    inner.is_trained = index.is_trained = True
    data = serialise(index)
    Header(data)
    return data
