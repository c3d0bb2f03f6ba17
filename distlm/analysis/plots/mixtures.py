"""Plots of what was tuned and searched: perplexity over λ, k, θ, skipped searches and recall; recall over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distlm.analysis.plots.style import BLUE, GREY, ORANGE, Points, axes_of, colours, drawn, png
from distlm.knnlm.tune.records import GateCurve, Tuned
from distlm.models.perplexity import perplexities
from distlm.runtime.records import given


@drawn
def perplexity_over_weight(tuned: Tuned) -> bytes:
    """Perplexity over λ on the tuning split for every temperature, at the best k; tuned with neighbours."""
    grid = given(tuned.grid)
    lambdas = np.array(grid.lambdas)
    losses = np.array(grid.loss_nats)[grid.ks.index(given(tuned.k))]
    order = np.argsort(lambdas)
    figure, axes = axes_of("λ, weight of the neighbours", f"perplexity per token ({tuned.split})")
    for temperature, row, colour in zip(grid.temperatures, losses, colours(len(losses), 0.3, 0.85), strict=True):
        best = temperature == tuned.temperature
        axes.plot(
            lambdas[order], perplexities(row[order]), color=ORANGE if best else colour, linewidth=2.2 if best else 1.0,
            zorder=3 if best else 2, label=f"T = {temperature:g}{' (best)' if best else ''}",
        )  # fmt: skip
    axes.plot(given(tuned.weight), given(tuned.perplexity), "o", color=ORANGE, markersize=6, zorder=4)
    axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
    # Curves near λ = 1 rise without bound: show what lies around the LM.
    lowest = float(perplexities(losses.min()))
    axes.set_ylim(lowest - 0.15 * (tuned.lm_perplexity - lowest) - 0.01 * lowest, 1.25 * tuned.lm_perplexity)
    return png(figure, [axes])


@drawn
def perplexity_over_k(tuned: Tuned) -> bytes:
    """The best perplexity on the tuning split for every number of neighbours; tuned with neighbours."""
    grid = given(tuned.grid)
    best = perplexities(np.array(grid.loss_nats).min(axis=(1, 2)))
    order = np.argsort(grid.ks)
    figure, axes = axes_of("neighbours used, k", f"best perplexity per token ({tuned.split})")
    axes.plot(np.array(grid.ks)[order], best[order], color=BLUE, marker="o", markersize=3.5, linewidth=1.2,
              label="+ kNN")  # fmt: skip
    axes.plot(given(tuned.k), best[grid.ks.index(given(tuned.k))], "o", color=ORANGE, markersize=6, zorder=4,
              label="the frozen k")  # fmt: skip
    axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
    axes.set_xscale("log", base=2)
    axes.set_xticks(grid.ks, [str(k) for k in grid.ks])
    return png(figure, [axes])


@drawn
def perplexity_over_skips(curves: Mapping[str, GateCurve]) -> bytes:
    """Perplexity over the share of skipped searches, a line per split."""
    figure, axes = axes_of("share of searches skipped", "perplexity per token")
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREY), strict=False):
        axes.plot(curve.skipped, curve.perplexity, color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
        axes.plot(curve.skipped, skipped_at_random(curve), color=colour, linewidth=1, linestyle="--",
                  label=f"{name}, skipped at random")  # fmt: skip
    return png(figure, [axes])


def skipped_at_random(curve: GateCurve) -> list[float]:
    """Perplexity where as many searches are left out at random: that mixes the two losses in proportion."""
    with_all, with_none = curve.loss_nats[0], curve.loss_nats[-1]
    return [float(perplexities(with_all + share * (with_none - with_all))) for share in curve.skipped]


@drawn
def perplexity_over_theta(tuned: Tuned) -> bytes:
    """Perplexity with the neural cache over θ for every window, at the best λ of each; tuned with a cache."""
    cache = given(tuned.cache)
    grid = cache.grid
    lowest = perplexities(np.array(grid.loss_nats).min(axis=2))
    order = np.argsort(grid.thetas)
    figure, axes = axes_of("θ, sharpness of the cache", f"perplexity per token ({tuned.split})")
    for window, row, colour in zip(grid.windows, lowest, colours(len(lowest), 0.3, 0.85), strict=True):
        best = window == cache.window
        axes.plot(
            np.array(grid.thetas)[order], row[order], color=ORANGE if best else colour, marker="o", markersize=3,
            linewidth=2.2 if best else 1.0, label=f"window {window}{' (best)' if best else ''}",
        )  # fmt: skip
    axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
    axes.set_xscale("log")
    return png(figure, [axes])


@drawn
def perplexity_over_recall(points: Mapping[str, Points], split: str) -> bytes:
    """Perplexity over recall; index → (recall, perplexity) of each question."""
    figure, axes = axes_of("recall, share of the true k nearest", f"perplexity per word ({split})")
    for (name, own), colour in zip(points.items(), colours(len(points), 0.05), strict=True):
        axes.plot(*zip(*sorted(own), strict=True), color=colour, marker="o", markersize=3.5, linewidth=1, label=name)
    return png(figure, [axes])


@drawn
def recall_over_time(measured: Sequence[Any], front: Sequence[Any], picked: Any, label: str, caption: str) -> bytes:
    """Recall over milliseconds per query of index.records.Candidate: a line per factory with something on the
    front, which is ringed; grey dots for the others, a full dot for what was picked, if anything was."""
    figure, axes = axes_of("ms per query, exact distances included", label, height=3.6)
    names = list(dict.fromkeys(one.factory for one in front))
    others = [one for one in measured if one.factory not in names]
    if others:
        axes.scatter(*_time_and_recall(others), s=8, color=GREY, label="never on the front")
    for name, colour in zip(names, colours(len(names), 0.05), strict=True):
        own = sorted((one for one in measured if one.factory == name), key=lambda one: one.whole_ms)
        axes.plot(
            *_time_and_recall(own), color=colour, marker="o", markersize=3.5, linewidth=1.2,
            label=f"{name}, {own[0].key_bytes} bytes/key",
        )  # fmt: skip
    axes.scatter(*_time_and_recall(front), s=60, facecolors="none", edgecolors=ORANGE, label="front")
    if picked is not None:
        axes.scatter(*_time_and_recall([picked]), s=60, color=ORANGE, zorder=4, label="pick")
    axes.set_xscale("log")
    return png(figure, [axes], caption)


def _time_and_recall(measured: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [one.whole_ms for one in measured], [one.store_recall for one in measured]
