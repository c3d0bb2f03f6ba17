"""Whether tuning and evaluation are done for the configuration at hand: their grids may change in a run directory."""

from msgspec import UNSET, UnsetType

from distlm.config.schema import KnnConfig, RunConfig
from distlm.knnlm.cache.records import CacheManifest
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.search.neighbours import first_of
from distlm.knnlm.search.records import NeighboursManifest
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.files import json_hash
from distlm.runtime.rundir import RunDir


def cached_as_configured(config: RunConfig, run: RunDir) -> bool:
    """The neural cache of every split is there, with the windows and θ that the configuration names."""
    wanted = config.cache
    for split in config.knn.splits:
        manifest = _read_cache(run, split)
        if manifest is None:
            return False
        if (manifest.windows, manifest.thetas, manifest.fill) != (wanted.windows, wanted.thetas, wanted.fill):
            return False
    return True


def tuned_as_configured(config: RunConfig, run: RunDir) -> bool:
    """knn.json was chosen from the grids and on the neighbours and cache that the configuration names."""
    split = config.knn.splits[0]
    neighbours, cache = _fingerprint(_read_neighbours(run, split, config.knn)), _fingerprint(_read_cache(run, split))
    if not run.tuned.exists() or (neighbours is UNSET and cache is UNSET):
        return False
    if config.cache.use and not cached_as_configured(config, run):
        return False
    tuned = Tuned.read(run.tuned)
    if tuned.split != split or tuned.neighbours != neighbours:
        return False
    knn = config.knn
    if tuned.grid:
        others = tuned.stores.stores[1:] if tuned.stores else []
        if [store.run for store in others] != knn.extra_runs:
            return False
        if (tuned.grid.buckets or 0, bool(tuned.gate)) != (knn.buckets, knn.gate):
            return False
        grid = tuned.grid.lambdas, tuned.grid.temperatures, tuned.grid.ks
        if grid != (knn.lambdas, knn.temperatures, knn.tried_ks):
            return False
    if not tuned.cache:
        return cache is UNSET
    return tuned.cache.cache == cache and tuned.cache.grid.lambdas == config.cache.lambdas


def evaluated_as_tuned(config: RunConfig, run: RunDir) -> bool:
    """results.json holds the configured splits, evaluated with the settings of knn.json on the files there are."""
    if not (run.results.exists() and tuned_as_configured(config, run)):
        return False
    results = Results.read(run.results)
    return (
        list(results.splits) == config.knn.splits
        and results.hashes.get("settings") == Tuned.read(run.tuned).fingerprint
        and all(
            found.neighbours == _fingerprint(_read_neighbours(run, split, config.knn))
            and found.cache_files == _fingerprint(_read_cache(run, split))
            for split, found in results.splits.items()
        )
    )


def _read_neighbours(run: RunDir, split: str, knn: KnnConfig) -> NeighboursManifest | None:
    folder = run.kept_neighbours(split)
    path = folder / "manifest.json"
    return first_of(NeighboursManifest.read(path), folder, knn) if path.exists() else None


def _read_cache(run: RunDir, split: str) -> CacheManifest | None:
    path = run.cache(split) / "manifest.json"
    return CacheManifest.read(path) if path.exists() else None


def _fingerprint(manifest: NeighboursManifest | CacheManifest | None) -> str | UnsetType:
    """As a record says it that was made from these results; UNSET without."""
    return UNSET if manifest is None else json_hash(manifest.tree())
