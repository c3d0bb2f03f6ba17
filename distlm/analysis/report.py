"""report.html of a run: one file without external parts, derived from results.json, knn.json and metrics.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from msgspec import UNSET, structs

from distlm.analysis import figures
from distlm.analysis.against_recipe import against_recipe
from distlm.analysis.mixtures import bootstrap_words, differences_of, results_of
from distlm.analysis.pages import environment
from distlm.analysis.questions import answers, html_table
from distlm.analysis.tables import Table
from distlm.config.yaml_files import recorded_settings
from distlm.errors import DistlmError
from distlm.finetune.finished.state import all_results
from distlm.finetune.records import FinetuneResults
from distlm.knnlm.evaluate.records import Ladder, Results
from distlm.knnlm.evaluate.table import cache_words
from distlm.runtime.files import atomic_path
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT
from distlm.training.records import LmResults


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
    table: Table
    """Perplexities."""
    compared: bool
    """Whether the table has several rows."""
    differences: Table
    """What each part adds; without rows where there are no intervals."""
    ladder: Table | None
    """What approximation costs; None where it was not measured."""
    intervals: str
    """How the intervals were made, in words; empty without any."""


def write_report(run: RunDir) -> Path:
    """Write report.html and give its path: of results.json, else of lm.json and what was fine-tuned. Raises DistlmError
    when the run was not evaluated."""
    alone, tasks = run.root / RESULT, all_results(run)
    if run.results.exists():
        found = Results.read(run.results)
        others = answers(run) if len(run.all_results()) > 1 else []
        drawn = figures.of_run(run) + figures.of_mixtures(run, found) + figures.of_questions(others)
        _render(run, "report.html", found, drawn, found.hashes, told=_headline(found), questions=html_table(others))
    elif alone.exists():
        results = LmResults.read(alone)
        hashes = {"model": results.model.fingerprint}
        _render(run, "lm.html", results, figures.of_run(run), hashes, tasks=_tasks(tasks), **_alone(results))
    elif tasks:
        named = structs.replace(tasks[-1], name=run.root.name)
        drawn = figures.of_run(run)
        _render(run, "finetuned.html", named, drawn, {"model": named.source}, tasks=_tasks(tasks))
    else:
        raise DistlmError(f"{run.results}: nothing was evaluated yet; run `distlm knn evaluate` or `distlm evaluate`")
    return run.report


def _render(
    run: RunDir,
    name: str,
    results: Results | LmResults | FinetuneResults,
    drawn: Sequence[figures.Figure],
    hashes: Mapping[str, str],
    **more: object,
) -> None:
    page = environment().get_template(name).render(
        results=results, figures=drawn, hashes=hashes, **_configuration(run), **more
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
    intervals = bootstrap_words(results.splits)
    return Headline(
        parts, last, title, lead, without, cache, results_of(results.splits, parts, bool(intervals)), len(parts) > 1,
        differences_of(results.splits), _ladder(results.ladder) if results.ladder else None, intervals,
    )  # fmt: skip


def _tasks(found: Sequence[FinetuneResults]) -> Table:
    """A row for each fine-tuning and metric, those of one task and metric together; their best median is marked."""
    head = ["name", "task", "metric", "seeds", "median", "lowest to highest", "majority"]
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for one in found:
        for metric, median in one.median.items():
            scores = [seed.last[metric] for seed in one.seeds.values()]
            row = [one.name, one.task, metric, str(len(scores)), f"{median:.4f}",
                   f"{min(scores):.4f} to {max(scores):.4f}", f"{one.majority[metric]:.4f}"]  # fmt: skip
            groups.setdefault((one.task, metric), []).append(row)
    median_at = [head.index("median")]
    return Table(head, [row for rows in groups.values() for row in Table.of(head, rows, highest=median_at).rows])


def _ladder(found: Ladder) -> Table:
    rungs = (
        ("exact: every key compared", found.exact),
        ("rescored: the index's neighbours, true distances", found.rescored),
        ("quantised: neighbours and distances of the index", found.quantised),
    )
    rows = [
        [
            words,
            f"{100 * rung.recall:.1f} %",
            f"{rung.perplexity:.3f}",
            f"{rung.perplexity - found.exact.perplexity:+.3f}",
        ]
        for words, rung in rungs
    ]
    return Table.of(["distances", f"recall@{found.k}", "perplexity per token", "against exact"], rows, [2], [1])


def _configuration(run: RunDir) -> dict[str, object]:
    """Section and its YAML of the run's resolved configuration, and what of it differs from a recipe."""
    settings = recorded_settings(run.root / "config.yaml")
    against = against_recipe(str(settings.get("name", run.root.name)), settings)
    sections = [(name, yaml.safe_dump(part, sort_keys=False, allow_unicode=True)) for name, part in settings.items()
                if isinstance(part, dict)]  # fmt: skip
    rows = [[one.setting, one.run, one.recipe] for one in against.changes]
    changes = Table.of(["setting", "this run", against.recipe or "default"], rows)
    return {"config": sections, "recipe": against.recipe, "changes": changes}
