"""Whether tuning and evaluation are done for the configuration at hand: their grids may change in a run directory."""

from pathlib import Path
from typing import Any

from distlm.config.schema import RunConfig
from distlm.runtime.files import json_hash, read_json
from distlm.runtime.rundir import RunDir


def cached_as_configured(config: RunConfig, run: RunDir) -> bool:
    """The neural cache of every split is there, with the windows and θ that the configuration names."""
    wanted = {"windows": config.cache.windows, "thetas": config.cache.thetas, "fill": config.cache.fill}
    for split in config.knn.splits:
        path = run.cache(split) / "manifest.json"
        if not path.exists():
            return False
        manifest = read_json(path, "description of a cache")
        if any(manifest.get(name) != value for name, value in wanted.items()):
            return False
    return True


def tuned_as_configured(config: RunConfig, run: RunDir) -> bool:
    """knn.json was chosen from the grids and on the neighbours and cache that the configuration names."""
    split = config.knn.splits[0]
    neighbours, cache = _fingerprint(run.neighbours(split)), _fingerprint(run.cache(split))
    if not run.tuned.exists() or (neighbours is None and cache is None):
        return False
    if config.cache.use and not cached_as_configured(config, run):
        return False
    tuned = read_json(run.tuned, "frozen kNN settings")
    if tuned["split"] != split or tuned.get("neighbours") != neighbours:
        return False
    knn = config.knn
    grid: dict[str, Any] = {"lambdas": knn.lambdas, "temperatures": knn.temperatures, "ks": knn.ks}
    if neighbours is not None:
        stores = tuned.get("stores", {"stores": [{}]})["stores"]
        if [store["run"] for store in stores[1:]] != knn.extra_runs:
            return False
        fitted = {"buckets": tuned["grid"].get("buckets", 0), "gate": "gate" in tuned}
        if fitted != {"buckets": knn.buckets, "gate": knn.gate}:
            return False
        if any(tuned["grid"][name] != values for name, values in grid.items()):
            return False
    of_cache = tuned.get("cache", {"cache": None, "grid": {"lambdas": config.cache.lambdas}})
    return bool(of_cache["cache"] == cache and of_cache["grid"]["lambdas"] == config.cache.lambdas)


def evaluated_as_tuned(config: RunConfig, run: RunDir) -> bool:
    """results.json holds the configured splits, evaluated with the settings of knn.json on the files there are."""
    if not (run.results.exists() and tuned_as_configured(config, run)):
        return False
    results = read_json(run.results, "evaluation results")
    splits = results["splits"]
    return (
        list(splits) == config.knn.splits
        and results["hashes"].get("settings") == json_hash(read_json(run.tuned, "frozen kNN settings"))
        and all(
            figures.get("neighbours") == _fingerprint(run.neighbours(split))
            and figures.get("cache_files") == _fingerprint(run.cache(split))
            for split, figures in splits.items()
        )
    )


def _fingerprint(folder: Path) -> str | None:
    """Of the finished results in a folder, None without."""
    manifest = folder / "manifest.json"
    return json_hash(read_json(manifest, "description of a folder of results")) if manifest.exists() else None
