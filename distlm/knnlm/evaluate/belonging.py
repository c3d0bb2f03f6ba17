"""Refusing what does not belong together: knn.json, neighbours, cache, datastore, index, model and token files."""

from collections.abc import Mapping
from pathlib import Path

from msgspec import UNSET

from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.layout import IndexFolder
from distlm.index.state import finished_record
from distlm.knnlm.evaluate.parts import Frozen, FrozenCache, Parts, read_frozen
from distlm.knnlm.evaluate.records import IndexFacts
from distlm.knnlm.tune.records import Tuned
from distlm.models.card import model_fingerprint
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage


def check_tuned(
    path: Path, opened: Mapping[str, Parts], frozen: Frozen | None, frozen_cache: FrozenCache | None
) -> None:
    """DistlmError when knn.json (`path`) is not of the first split's files, or another split lacks some of them."""
    first, *others = opened.values()
    neighbours, cache = first.neighbours, first.cache
    pairs = (
        ("neighbours", "neighbours", neighbours, frozen and frozen.neighbours, "knn search"),
        ("cache", "files of the cache", cache, frozen_cache and frozen_cache.cache, "knn cache"),
    )
    for name, files, part, tuned, verb in pairs:
        if part is None and tuned is not None:
            raise DistlmError(f"{path}: tuned with {name}, and {first.split} has none; run `distlm {verb}` again")
        if part is not None and tuned is None:
            raise DistlmError(f"{path}: tuned before {part.folder} was made; run `distlm knn tune` again")
        if part is not None and part.fingerprint != tuned:
            raise DistlmError(
                f"{path}: tuned on other {files} ({tuned}; {part.folder} is {part.fingerprint}); "
                "run `distlm knn tune` again"
            )
        for other in others:
            if (part is None) != (getattr(other, name) is None):
                which = other if part is not None else first
                raise DistlmError(f"split {which.split} has no {name}; run `distlm {verb}` for all splits")


def frozen_for(run: RunDir, datastore: Datastore) -> Frozen:
    """λ, temperature and k that were tuned for the question of the run directory.

    Raises DistlmError when nothing is tuned, or without neighbours, or on another store than `datastore`.
    """
    if not run.tuned.exists():
        raise DistlmError(f"{run.tuned}: λ, temperature and k are not chosen yet; run `distlm knn tune`")
    tuned = Tuned.read(run.tuned)
    frozen = read_frozen(tuned)
    if frozen is None:
        raise DistlmError(f"{run.tuned}: tuned without neighbours; run `distlm knn search` and `knn tune`")
    if tuned.datastore != datastore.fingerprint:
        raise DistlmError(
            f"{run.tuned}: tuned on another datastore ({tuned.datastore}; {datastore.folder} is "
            f"{datastore.fingerprint}); run `distlm knn search` and `knn tune` again"
        )
    return frozen


def open_rest(stage: Stage, tokens: TokenFiles, opened: dict[str, Parts]) -> tuple[Datastore | None, IndexFacts | None]:
    """Open the store where there are neighbours, and refuse what does not belong together."""
    run, knn = stage.run, stage.config.knn
    fingerprint = model_fingerprint(run.model_checkpoint(stage.config))
    first = opened[knn.splits[0]]
    for parts in opened.values():
        if parts.cache is not None and first.cache is not None:
            parts.cache.require("the checkpoint", model=fingerprint)
            parts.cache.require(str(tokens.folder), token_files=tokens.fingerprint)
            alike = ("windows", "thetas", "fill", "tap", "context_rule")
            parts.cache.require(
                str(first.cache.folder), **{key: getattr(first.cache.manifest, key) for key in alike}
            )  # fmt: skip
    if first.neighbours is None:
        return None, None
    store = Datastore.open(run.datastore)
    index = finished_record(IndexFolder(run.index)) if knn.search == "index" else None
    for parts in opened.values():
        neighbours = parts.neighbours
        assert neighbours is not None
        neighbours.require(str(store.folder), datastore=store.fingerprint)
        neighbours.require("the checkpoint", model=fingerprint)
        neighbours.require(str(tokens.folder), token_files=tokens.fingerprint)
        neighbours.require(str(run.index), index=index.fingerprint if index else "brute")
        same = ["k", "nprobe", "search", "distances", "context_rule", "tap", "key_dtype"]
        if UNSET not in (neighbours.manifest.fast_scan, first.neighbours.manifest.fast_scan):
            same.append("fast_scan")
        neighbours.require(
            str(first.neighbours.folder), **{key: getattr(first.neighbours.manifest, key) for key in same}
        )  # fmt: skip
    if index is None:
        return store, None
    return store, IndexFacts(index.factory, index.nlist, index.bytes, index.fingerprint)
