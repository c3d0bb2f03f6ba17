"""report.html of a run: one file without external parts, derived from results.json, knn.json and metrics.jsonl."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from msgspec import UNSET, structs

from distlm.analysis import plots
from distlm.analysis.mixtures import DifferenceRow, ResultRow, bootstrap_words, difference_rows, result_rows
from distlm.analysis.pages import environment
from distlm.analysis.questions import Answer, answers, table_rows
from distlm.config.yaml_files import recorded_settings
from distlm.errors import DistlmError
from distlm.finetune.finished.state import all_results
from distlm.finetune.records import FinetuneResults
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.table import cache_words
from distlm.knnlm.tune.records import Tuned
from distlm.runtime import metrics
from distlm.runtime.files import atomic_path
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT
from distlm.training.records import LmResults


@dataclass(frozen=True)
class Figure:
    """A plot of the page."""

    title: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Headline:
    """What the page calls the run, and which of its mixtures it leads with: the one with the most parts."""

    parts: list[str]
    """Mixtures that every split has."""
    headline: str
    """The one it leads with."""
    title: str
    lead: str
    without: str
    """What it is compared with, in words."""
    cache: str
    """The cache's settings in words; empty without one."""
    rows: list[ResultRow]
    differences: list[DifferenceRow]
    intervals: str
    """How the intervals were made, in words; empty without any."""


def write_report(run: RunDir) -> Path:
    """Write report.html and give its path: of results.json, else of lm.json and what was fine-tuned. Raises DistlmError
    when the run was not evaluated."""
    alone, tasks = run.root / RESULT, all_results(run)
    if run.results.exists():
        found = Results.read(run.results)
        others = answers(run) if len(run.all_results()) > 1 else []
        figures = _of_run(run) + _of_mixtures(run, found) + _of_questions(others)
        _render(run, "report.html", found, figures, found.hashes, told=_headline(found), questions=table_rows(others))
    elif alone.exists():
        results = LmResults.read(alone)
        hashes = {"model": results.model.fingerprint}
        _render(run, "lm.html", results, _of_run(run), hashes, tasks=tasks, **_alone(results))
    elif tasks:
        named = structs.replace(tasks[-1], name=run.root.name)
        _render(run, "finetuned.html", named, _of_run(run), {"model": named.source}, tasks=tasks)
    else:
        raise DistlmError(f"{run.results}: nothing was evaluated yet; run `distlm knn evaluate` or `distlm evaluate`")
    return run.report


def _render(
    run: RunDir,
    name: str,
    results: Results | LmResults | FinetuneResults,
    figures: Sequence[Figure],
    hashes: Mapping[str, str],
    **more: object,
) -> None:
    page = environment().get_template(name).render(
        results=results, figures=figures, hashes=hashes, config=_config(run), **more
    )  # fmt: skip
    with atomic_path(run.report) as temporary:
        temporary.write_text(page, "utf-8")


def _alone(results: LmResults) -> dict[str, str]:
    """What the page calls a model that was evaluated without neighbours and cache."""
    memory = results.model.memory_values
    if memory is not UNSET:
        lead = "Masked language model with product-key memory" if memory else "Masked language model"
        return {"title": "masked LM report", "lead": lead, "of": "masked tokens", "per": "masked token"}
    return {"title": "LM report", "lead": "Language model", "of": "tokens", "per": "word"}


def _headline(results: Results) -> Headline:
    parts = results.mixtures()
    # λ by distance and the gate are variants of kNN: the page leads with what is comparable from run to run.
    last = next(name for name in ("both", "knn", "cache", "lm") if name in parts)
    kinds = {
        "lm": ("LM report", "Language model", ""), "cache": ("LM with neural cache", "Language model with a neural "
        "cache", "without the cache"), "knn": ("kNN-LM report", "kNN language model", "without neighbours"),
        "both": ("kNN-LM report", "kNN language model with a neural cache", "without neighbours and cache"),
    }  # fmt: skip
    title, lead, without = kinds[last]
    cache = cache_words(results.settings.cache) if "cache" in parts and results.settings.cache else ""
    return Headline(
        parts, last, title, lead, without, cache, result_rows(results.splits, parts), difference_rows(results.splits),
        bootstrap_words(results.splits),
    )  # fmt: skip


def _of_run(run: RunDir) -> list[Figure]:
    """Plots of the training, as far as metrics.jsonl has data for them."""
    lines = list(run.metrics.read("train"))
    train, valid = metrics.points(lines, metrics.TRAIN_LOSS), metrics.points(lines, metrics.VALID_LOSS)
    rates = metrics.points(lines, metrics.LEARNING_RATE)
    drawn = []
    if train or valid:
        drawn.append(Figure("Training", "Loss in nats per token. Steep first updates may lie above the picture.",
                            plots.loss_curve(train, valid)))  # fmt: skip
    if rates:
        drawn.append(Figure("Learning rate", "Rate of the logged updates.", plots.learning_rate(rates)))
    layers = sorted(
        {name.split("/")[1] for line in lines for name in line.values if name.startswith("memory/")}, key=int
    )
    if layers:
        use = {f"layer {layer}": metrics.points(lines, f"memory/{layer}/top1_mu") for layer in layers}
        drawn.append(Figure("Use of the memory", "Share of the slots that some token and head reads first (top-1 MU), "
                            "in the updates between two lines of metrics.", plots.shares(use, "top-1 MU")))  # fmt: skip
    return drawn


def _of_questions(found: Sequence[Answer]) -> list[Figure]:
    measured = [one for one in found if one.recall is not None]
    if len(measured) < 2:
        return []
    split = list(measured[0].perplexity)[-1]
    points: dict[str, list[tuple[float, float]]] = {}
    for one in measured:
        points.setdefault(one.index, []).append((one.recall or 0.0, one.perplexity[split]))
    return [Figure("Questions", f"Perplexity of {split} over recall, a point for each question of one index.",
                   plots.perplexity_over_recall(points, split))]  # fmt: skip


def _of_mixtures(run: RunDir, results: Results) -> list[Figure]:
    """Plots of tuning and evaluation, as far as knn.json and results.json have data for them."""
    drawn = []
    if run.tuned.exists():
        tuned = Tuned.read(run.tuned)
        if tuned.grid:
            where = f"on {tuned.split}, with k = {tuned.k}"
            drawn.append(Figure("Interpolation weight", f"Perplexity over λ {where}; the dot is the frozen choice.",
                                plots.perplexity_over_weight(tuned)))  # fmt: skip
            if len(tuned.grid.ks) > 1:
                drawn.append(Figure("Number of neighbours", f"Best perplexity on {tuned.split} at each k.",
                                    plots.perplexity_over_k(tuned)))  # fmt: skip
        if tuned.cache:
            where = f"on {tuned.split}, at the best λ of each"
            drawn.append(Figure("Neural cache", f"Perplexity with the cache over θ {where}; one line per window.",
                                plots.perplexity_over_theta(tuned)))  # fmt: skip
    curves = {name: split.gate_curve for name, split in results.splits.items() if split.gate_curve}
    if curves:
        drawn.append(Figure("Skipped searches", "Perplexity when the gate leaves out the searches with the lowest λ; "
                            "dashed: as many left out at random.", plots.perplexity_over_skips(curves)))  # fmt: skip
    if results.seconds:
        drawn.append(Figure("Time", "Wall time of each stage, all starts added.", plots.stage_bars(results.seconds)))
    return drawn


def _config(run: RunDir) -> list[tuple[str, str]]:
    """Section and its YAML of the run's resolved configuration."""
    path = run.root / "config.yaml"
    if not path.exists():
        return []
    tree = recorded_settings(path)
    return [(name, yaml.safe_dump(part, sort_keys=False, allow_unicode=True)) for name, part in tree.items()
            if isinstance(part, dict)]  # fmt: skip
