"""Whether tuning and evaluation are done for the configuration at hand: their grids may change in a run directory."""

from distlm.config.schema import RunConfig
from distlm.runtime.files import json_hash, read_json
from distlm.runtime.rundir import RunDir


def tuned_as_configured(config: RunConfig, run: RunDir) -> bool:
    """knn.json was chosen from the grid and on the neighbours that the configuration names."""
    manifest = run.neighbours(config.knn.splits[0]) / "manifest.json"
    if not (run.tuned.exists() and manifest.exists()):
        return False
    tuned, knn = read_json(run.tuned, "frozen kNN settings"), config.knn
    grid = {"lambdas": knn.lambdas, "temperatures": knn.temperatures, "ks": knn.ks}
    return (
        tuned["split"] == knn.splits[0]
        and all(tuned["grid"][name] == values for name, values in grid.items())
        and tuned["neighbours"] == json_hash(read_json(manifest, "description of neighbours"))
    )


def evaluated_as_tuned(config: RunConfig, run: RunDir) -> bool:
    """results.json holds the configured splits, evaluated with the settings of knn.json on the neighbours there are."""
    if not (run.results.exists() and tuned_as_configured(config, run)):
        return False
    results, tuned = read_json(run.results, "evaluation results"), read_json(run.tuned, "frozen kNN settings")
    manifests = {split: run.neighbours(split) / "manifest.json" for split in config.knn.splits}
    return (
        list(results["splits"]) == config.knn.splits
        and all(results["settings"][name] == tuned[name] for name in ("lambda", "temperature", "k"))
        and all(path.exists() for path in manifests.values())
        and all(
            results["splits"][split]["neighbours"] == json_hash(read_json(path, "description of neighbours"))
            for split, path in manifests.items()
        )
    )
