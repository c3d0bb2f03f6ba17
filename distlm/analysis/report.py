"""report.html of a run: one file without external parts, derived from results.json, knn.json and metrics.jsonl."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distlm.analysis import plots
from distlm.analysis.mixtures import bootstrap_words, difference_rows, result_rows
from distlm.analysis.pages import environment
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.table import PART_WORDS, cache_words
from distlm.runtime import metrics
from distlm.runtime.files import atomic_path, read_json
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT


def write_report(run: RunDir) -> Path:
    """Write report.html and give its path: of results.json, else of lm.json. Raises DistlmError when the run was not
    evaluated."""
    alone = run.root / RESULT
    if run.results.exists():
        name, results = "report.html", read_json(run.results, "evaluation results")
        told = {"hashes": results["hashes"], **_headline(results)}
    elif alone.exists():
        name, results = "lm.html", read_json(alone, "evaluation results")
        told = {"hashes": {"model": results["model"]["fingerprint"]}, **_alone(results)}
    else:
        raise DistlmError(f"{run.results}: nothing was evaluated yet; run `distlm knn evaluate` or `distlm evaluate`")
    page = (
        environment()
        .get_template(name)
        .render(results=results, figures=_figures(run, results), config=_config(run), **told)
    )
    with atomic_path(run.report) as temporary:
        temporary.write_text(page, "utf-8")
    return run.report


def _alone(results: dict[str, Any]) -> dict[str, Any]:
    """What the page calls a model that was evaluated without neighbours and cache."""
    if results["model"]["kind"] == "plm":
        memory = results["model"]["memory_values"]
        lead = "Masked language model with product-key memory" if memory else "Masked language model"
        return {"title": "masked LM report", "lead": lead, "of": "masked tokens"}
    return {"title": "LM report", "lead": "Language model", "of": "tokens"}


def _headline(results: dict[str, Any]) -> dict[str, Any]:
    """What the page calls the run, and which of its mixtures it leads with: the one with the most parts."""
    splits = results["splits"].values()
    parts = [name for name in PART_WORDS if all(name in split for split in splits)]
    # λ by distance and the gate are variants of kNN: the page leads with what is comparable from run to run.
    last = next(name for name in ("both", "knn", "cache", "lm") if name in parts)
    kinds = {
        "lm": ("LM report", "Language model", ""), "cache": ("LM with neural cache", "Language model with a neural "
        "cache", "without the cache"), "knn": ("kNN-LM report", "kNN language model", "without neighbours"),
        "both": ("kNN-LM report", "kNN language model with a neural cache", "without neighbours and cache"),
    }  # fmt: skip
    title, lead, without = kinds[last]
    cache = cache_words(results["settings"]["cache"]) if "cache" in parts else ""
    return {
        "parts": parts, "headline": last, "title": title, "lead": lead, "without": without, "cache": cache,
        "rows": result_rows(results["splits"], parts), "differences": difference_rows(results["splits"]),
        "intervals": bootstrap_words(results["splits"]),
    }  # fmt: skip


def _figures(run: RunDir, results: dict[str, Any]) -> list[dict[str, str]]:
    """Title, caption and picture (data URL) of every plot there is data for."""
    lines = list(run.metrics.read("train"))
    train, valid = _points(lines, metrics.TRAIN_LOSS), _points(lines, metrics.VALID_LOSS)
    rates = _points(lines, metrics.LEARNING_RATE)
    drawn = []
    if train or valid:
        drawn.append(("Training", "Loss in nats per token. Steep first updates may lie above the picture.",
                      plots.loss_curve(train, valid)))  # fmt: skip
    if rates:
        drawn.append(("Learning rate", "Rate of the logged updates.", plots.learning_rate(rates)))
    layers = sorted({name.split("/")[1] for line in lines for name in line if name.startswith("memory/")}, key=int)
    if layers:
        use = {f"layer {layer}": _points(lines, f"memory/{layer}/top1_mu") for layer in layers}
        drawn.append(("Use of the memory", "Share of the slots that some token and head reads first (top-1 MU), in the "
                      "updates between two lines of metrics.", plots.shares(use, "top-1 MU")))  # fmt: skip
    if run.tuned.exists():
        tuned = read_json(run.tuned, "frozen kNN settings")
        if "temperature" in tuned:
            where = f"on {tuned['split']}, with k = {tuned['k']}"
            drawn.append(("Interpolation weight", f"Perplexity over λ {where}; the dot is the frozen choice.",
                          plots.perplexity_over_weight(tuned)))  # fmt: skip
            if len(tuned["grid"]["ks"]) > 1:
                drawn.append(("Number of neighbours", f"Best perplexity on {tuned['split']} at each k.",
                              plots.perplexity_over_k(tuned)))  # fmt: skip
        if "cache" in tuned:
            where = f"on {tuned['split']}, at the best λ of each"
            drawn.append(("Neural cache", f"Perplexity with the cache over θ {where}; one line per window.",
                          plots.perplexity_over_theta(tuned)))  # fmt: skip
    curves = {name: split["gate_curve"] for name, split in results["splits"].items() if "gate_curve" in split}
    if curves:
        drawn.append(("Skipped searches", "Perplexity when the gate leaves out the searches with the lowest λ; dashed: "
                      "as many left out at random.", plots.perplexity_over_skips(curves)))  # fmt: skip
    if seconds := results.get("seconds", {}):
        drawn.append(("Time", "Wall time of each stage, all starts added.", plots.stage_bars(seconds)))
    return [
        {"title": title, "caption": caption, "source": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        for title, caption, png in drawn
    ]


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(update, value) of every line that holds `name`, by rising update."""
    return sorted((float(line["step"]), float(line[name])) for line in lines if name in line and "step" in line)


def _config(run: RunDir) -> list[tuple[str, str]]:
    """Section and its YAML of the run's resolved configuration."""
    path = run.root / "config.yaml"
    if not path.exists():
        return []
    tree = yaml.safe_load(path.read_text("utf-8"))
    return [(name, yaml.safe_dump(part, sort_keys=False, allow_unicode=True)) for name, part in tree.items()
            if isinstance(part, dict)]  # fmt: skip
