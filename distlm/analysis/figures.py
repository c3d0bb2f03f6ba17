"""The figures of report.html, each with a sentence that says what there is to see."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from distlm.analysis import sentences
from distlm.analysis.plots import mixtures, training
from distlm.analysis.questions import Answer
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.tune.records import Tuned
from distlm.runtime import metrics
from distlm.runtime.rundir import RunDir


@dataclass(frozen=True)
class Figure:
    """A plot of the page."""

    title: str
    caption: str
    """What is drawn."""
    seen: str
    """What there is to see, computed from the data."""
    png: bytes

    @property
    def source(self) -> str:
        """The picture as data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def of_run(run: RunDir) -> list[Figure]:
    """Plots of the training, as far as metrics.jsonl has data for them."""
    lines = list(run.metrics.read("train"))
    train, valid = metrics.points(lines, metrics.TRAIN_LOSS), metrics.points(lines, metrics.VALID_LOSS)
    rates = metrics.points(lines, metrics.LEARNING_RATE)
    found = []
    if train or valid:
        found.append(Figure("Training", "Loss in nats per token; steep first updates may lie above the picture.",
                            sentences.of_training(train, valid), training.loss_curve(train, valid)))  # fmt: skip
    if rates:
        found.append(Figure("Learning rate", "Rate of the logged updates.", sentences.of_learning_rate(rates),
                            training.learning_rate(rates)))  # fmt: skip
    layers = sorted(
        {name.split("/")[1] for line in lines for name in line.values if name.startswith("memory/")}, key=int
    )
    if layers:
        points = {f"layer {layer}": metrics.points(lines, f"memory/{layer}/top1_mu") for layer in layers}
        use = {name: curve for name, curve in points.items() if curve}
        caption = (
            "Share of the slots that some token and head reads first, in the updates between two lines of metrics."
        )
        if use:
            found.append(Figure("Use of the memory", caption, sentences.of_memory_use(use),
                                training.shares(use, "top-1 MU, share of the slots")))  # fmt: skip
    return found


def of_questions(found: Sequence[Answer]) -> list[Figure]:
    """Perplexity over recall, where the recall of two questions was measured."""
    measured = [one for one in found if one.recall is not None]
    if len(measured) < 2:
        return []
    split = list(measured[0].perplexity)[-1]
    points: dict[str, list[tuple[float, float]]] = {}
    for one in measured:
        points.setdefault(one.index, []).append((one.recall or 0.0, one.perplexity[split]))
    return [Figure("Questions", "A point for each question; a line joins those of one index.",
                   sentences.of_recall(points, split), mixtures.perplexity_over_recall(points, split))]  # fmt: skip


def of_mixtures(run: RunDir, results: Results) -> list[Figure]:
    """Plots of tuning and evaluation, as far as knn.json and results.json have data for them."""
    found = []
    if run.tuned.exists():
        tuned = Tuned.read(run.tuned)
        if tuned.grid:
            found.append(Figure("Interpolation weight", f"A line for each temperature T, with k = {tuned.k}; the dot "
                                "is the frozen choice.", sentences.of_weight(tuned),
                                mixtures.perplexity_over_weight(tuned)))  # fmt: skip
            if len(tuned.grid.ks) > 1:
                found.append(Figure("Number of neighbours", "Each k with the λ and T that are best for it.",
                                    sentences.of_k(tuned), mixtures.perplexity_over_k(tuned)))  # fmt: skip
        if tuned.cache:
            found.append(Figure("Neural cache", "A line for each window, at the best λ of each point.",
                                sentences.of_theta(tuned), mixtures.perplexity_over_theta(tuned)))  # fmt: skip
    curves = {name: split.gate_curve for name, split in results.splits.items() if split.gate_curve}
    if curves:
        found.append(Figure("Skipped searches", "The gate leaves out the searches with the lowest λ; dashed: as many "
                            "are left out at random.", sentences.of_skips(curves),
                            mixtures.perplexity_over_skips(curves)))  # fmt: skip
    if results.seconds:
        found.append(Figure("Time", "Wall time of each stage, all starts added.", sentences.of_time(results.seconds),
                            training.stage_bars(results.seconds)))  # fmt: skip
    return found
