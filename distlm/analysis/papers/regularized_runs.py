"""What `distlm reproduce regularized-knnlm` reads of its finished runs (Ton et al. 2021)."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.scoring import interpolate, mean_loss
from distlm.knnlm.search.neighbours import MANIFEST, Neighbours
from distlm.knnlm.tune.grid import split_knn_log_probs
from distlm.knnlm.tune.records import Tuned
from distlm.models.perplexity import perplexity
from distlm.runtime import metrics
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir

LAMBDA, TEMPERATURE = 0.3, 1.0
"""Of the paper, for every ω; the temperature is not mentioned there and 1 in the code it builds upon."""
FORMS = {"": "L2", "queue-": "queues", "mean-": "running means"}
"""Beginning of a run's name → its penalty."""
MEASURES = {
    "train": "train", "lm": "valid LM", "ratio": "valid / train", "fixed": "+ kNN, λ 0.3, T 1",
    "lambda_tuned": "+ kNN, λ tuned, T 1", "tuned": "+ kNN, all tuned", "lm_test": "test LM",
    "fixed_test": "+ kNN, λ 0.3, T 1, test", "lambda_tuned_test": "+ kNN, λ tuned, T 1, test",
    "tuned_test": "+ kNN, all tuned, test",
}  # fmt: skip
"""Measure → head of its column."""
_NAME = re.compile(r"(queue-|mean-|)w([\d.]+(?:e-?\d+)?)-s(\d+)")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    form: str
    """Of FORMS."""
    weight: float
    """ω."""
    seed: int
    measures: dict[str, float | None]
    """Of MEASURES: perplexities, and valid's over train's. The training split's is with dropout, over the tenth of the
    updates before the checkpoint."""
    settings: tuple[float, float, int]
    """λ, T and k as tuned."""
    lambda_t1: float | None
    """λ as tuned at T = 1."""
    norm: float | None
    """Mean ‖r‖ in the same updates as the training split's perplexity."""
    processor_s: float | None
    """Processor seconds of all starts of its stages; None where they were not recorded."""
    edges: list[str]
    """Tuned settings that are the last of their grid, in words."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.form}w{self.weight:g}-s{self.seed}"


def read_runs(root: Path) -> list[Run]:
    """The finished runs below the experiment's folder, by form, ω and seed."""
    found = filter(None, map(_read, sorted(root.iterdir())))
    return sorted(found, key=lambda run: (run.form, run.weight, run.seed))


def fixed_perplexity(tuned: Tuned) -> float | None:
    """Perplexity on the tuning split at the paper's λ and T and the largest k; None when the grid of knn.json has no
    such point."""
    return dict(_at_temperature_one(tuned)).get(LAMBDA)


def lambda_tuned(tuned: Tuned) -> tuple[float, float] | None:
    """The paper's protocol: λ that is best on the tuning split at T = 1 and the largest k, and its perplexity there;
    None when the grid of knn.json has no T = 1."""
    return min(_at_temperature_one(tuned), key=lambda point: point[1], default=None)


def perplexities_at_one(neighbours: Neighbours, k: int, weights: Sequence[float]) -> list[float]:
    """Perplexities of a split at T = 1 with k neighbours, for each λ: of a split that is not tuned on there is no grid.
    Memory: two fp64 numbers for each token."""
    scores, log_lm = split_knn_log_probs(neighbours, TEMPERATURE, [k])[0], neighbours.log_probs()
    return [perplexity(mean_loss(interpolate(log_lm, scores, weight))) for weight in weights]


def _at_temperature_one(tuned: Tuned) -> list[tuple[float, float]]:
    """λ and perplexity at the largest k."""
    grid = tuned.grid
    if not grid or TEMPERATURE not in grid.temperatures:
        return []
    losses = grid.loss_nats[grid.ks.index(max(grid.ks))][grid.temperatures.index(TEMPERATURE)]
    return [(weight, perplexity(loss)) for weight, loss in zip(grid.lambdas, losses, strict=True)]


def _read(folder: Path) -> Run | None:
    match, run = _NAME.fullmatch(folder.name), RunDir(folder)
    if not match or not (run.results.exists() and run.tuned.exists()):
        return None
    results, tuned = Results.read(run.results), Tuned.read(run.tuned)
    if not results.splits["valid"].knn or not tuned.grid:
        return None
    weight, at_one = lambda_tuned(tuned) or (None, None)
    found: dict[str, float | None] = {"fixed": fixed_perplexity(tuned), "lambda_tuned": at_one}
    for split, suffix in (("valid", ""), ("test", "_test")):
        of_split = results.splits.get(split)
        for part, name in (("lm", "lm"), ("knn", "tuned")):
            figures = of_split and of_split.of(part)
            found[name + suffix] = figures.perplexity if figures else None
    found |= _at_one_on_test(run, max(tuned.grid.ks), weight)
    lines = list(run.metrics.read())
    loss, norm = (
        _at_the_end(metrics.points([line for line in lines if line.stage == "train"], name), results.model.step)
        for name in (metrics.TRAIN_LOSS, metrics.TRAIN_NORM)
    )
    train, valid = None if loss is None else perplexity(loss), found["lm"]
    found |= {"train": train, "ratio": valid / train if valid and train else None}
    spent = [seconds for line in lines if (seconds := line.number(metrics.PROCESSOR_SECONDS)) is not None]
    return Run(
        match[1], float(match[2]), int(match[3]), {name: found[name] for name in MEASURES},
        (given(tuned.weight), given(tuned.temperature), given(tuned.k)), weight, norm, sum(spent) if spent else None,
        tuned.edges or [],
    )  # fmt: skip


def _at_one_on_test(run: RunDir, k: int, tuned: float | None) -> dict[str, float | None]:
    """At the paper's λ and at the one tuned on valid; null where the neighbours of test are not there."""
    folder = run.kept_neighbours("test")
    if not (folder / MANIFEST).exists():
        return {"fixed_test": None, "lambda_tuned_test": None}
    fixed, best = perplexities_at_one(Neighbours.open(folder), k, [LAMBDA, LAMBDA if tuned is None else tuned])
    return {"fixed_test": fixed, "lambda_tuned_test": None if tuned is None else best}


def _at_the_end(points: Sequence[tuple[int, float]], step: int | None) -> float | None:
    """Mean over the last tenth of the updates up to the checkpoint's."""
    until = [point for point in points if step is None or point[0] <= step] or points[:1]
    return statistics.fmean(value for at, value in until if at > 0.9 * until[-1][0]) if until else None
