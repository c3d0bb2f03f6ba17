"""k-means and the lists of added keys, found on the device and on the processor from the same keys."""

import time
from typing import Any

import numpy as np
from shared.store import clustered_keys, settings, write_store

from distlm.datastore.reader import Datastore
from distlm.index.build.encode import Encoder
from distlm.index.build.torch_lists import gpu_device
from distlm.index.factory import fit_factory, inverted_file
from distlm.index.layout import Array, deserialise
from distlm.index.train.sample import StoreSample
from distlm.index.train.team import Team
from distlm.index.train.template import trained
from distlm.runtime.ranks.cores import usable_cores
from gpu.part import Outcome, Place

SAME_LISTS, AS_NEAR = 0.999, 1e-3


def run(place: Place) -> Outcome:
    """Correctness anywhere, speed on a GPU."""
    rows, width, factory = (
        (262_144, 256, "IVF2048,PQ32") if place.is_gpu and not place.quick else (6_000, 32, "IVF32,PQ8")
    )
    folder = place.folder / "datastore"
    write_store(folder, rows, settings(width, 97, 65_536), clustered_keys(rows, width, 97))
    store = Datastore.open(folder)
    keys = np.concatenate([np.asarray(store.keys(shard.index), np.float32) for shard in store.shards])
    plan = fit_factory(factory, width, rows, min(rows, 131_072))
    sample, threads = StoreSample(store, plan.sample, 1), usable_cores()
    out = Outcome({"keys": rows, "factory": plan.used})
    templates: dict[str, bytes] = {}
    lists: dict[str, Array] = {}
    seconds: dict[str, float] = {}
    for name, device in (("processor", ""), ("device", gpu_device())):
        began = time.perf_counter()
        templates[name] = trained(plan, sample, 1, Team(threads=threads, device=device))
        seconds[f"training s, {name}"] = time.perf_counter() - began
        began = time.perf_counter()
        # The template of the processor: lists are compared key by key.
        lists[name] = _lists(templates["processor"], keys, threads, device)
        seconds[f"adding s, {name}"] = time.perf_counter() - began
    same = float(np.mean(lists["processor"] == lists["device"]))
    out.figures["same lists"] = round(same, 5)
    out.must(
        same >= SAME_LISTS, f"{same:.3%} of the keys are in the processor's list, {SAME_LISTS:.1%} at least is right"
    )
    distances = {name: _distance(template, keys) for name, template in templates.items()}
    apart = distances["device"] / distances["processor"] - 1
    out.figures["distance to centroids, over the processor's"] = float(f"{apart:.2e}")
    out.must(apart < AS_NEAR, f"centroids of the device are {apart:.2%} farther from the keys, {AS_NEAR:.1%} is right")
    if place.measures:
        out.figures |= {name: round(value, 2) for name, value in seconds.items()}
        for what in ("training", "adding"):
            ratio = seconds[f"{what} s, processor"] / seconds[f"{what} s, device"]
            out.figures[f"{what}: times as fast"] = round(ratio, 2)
    return out


def _lists(template: bytes, keys: Array, threads: int, device: str) -> Array:
    """The list of each key, as `distlm index add` finds it."""
    index = deserialise(template)
    coarse = inverted_file(index).coarse_code_size()
    with Encoder(index, threads, device=device, keys=len(keys)) as encoder:
        codes = [
            block[:, :coarse].copy()
            for start in range(0, len(keys), encoder.batch)
            for block in encoder.codes(keys[start : start + encoder.batch])
        ]
    found = np.zeros((len(keys), 8), np.uint8)
    found[:, :coarse] = np.concatenate(codes)
    return found.view("<i8")[:, 0]


def _distance(template: bytes, keys: Array) -> float:
    """Sum of squared distances of the keys to their centroids."""
    import faiss

    index: Any = inverted_file(deserialise(template))
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    return float(faiss.knn(keys, centroids, 1)[0].sum(dtype=np.float64))
