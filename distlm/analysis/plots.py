"""Plots of a run as PNG bytes, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from distlm.knnlm.tune.records import GateCurve, Tuned
from distlm.runtime.records import given

BLUE, ORANGE, GREY = "#3b6fb6", "#d1772e", "#808890"
# Greys that are readable on a white and on a near-black page: the pictures have no ground of their own.
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "text.color": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.titlesize": 10, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "figure.dpi": 144,
}  # fmt: skip
Points = Sequence[tuple[float, float]]


def loss_curve(train: Points, valid: Points) -> bytes:
    """Loss in nats per token over updates; each point is (update, loss)."""
    with rc_context(STYLE):
        figure, axes = _axes("update", "loss, nats per token")
        if train:
            axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.2, label="train")
        if valid:
            axes.plot(*zip(*valid, strict=True), color=ORANGE, marker="o", markersize=3.5, linewidth=1.2, label="valid")
        _clip_start(axes, [y for _, y in [*train, *valid]])
        axes.legend()
        return _png(figure)


def learning_rate(points: Points) -> bytes:
    """Learning rate over updates."""
    with rc_context(STYLE):
        figure, axes = _axes("update", "learning rate")
        axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.2)
        axes.set_ylim(bottom=0)
        return _png(figure)


def shares(curves: Mapping[str, Points], label: str) -> bytes:
    """Shares between 0 and 1 over updates, one line per name."""
    with rc_context(STYLE):
        figure, axes = _axes("update", label)
        for (name, points), colour in zip(
            curves.items(), colormaps["viridis"](np.linspace(0.3, 0.85, len(curves))), strict=True
        ):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=name)
        axes.set_ylim(0, 1.02)
        axes.legend()
        return _png(figure)


def perplexity_curves(curves: Mapping[str, Points], top: float) -> bytes:
    """Perplexity on valid over updates, one line per model; what lies above `top` is cut off (Kim & Jung, figure 3)."""
    with rc_context(STYLE):
        figure, axes = _axes("update", "perplexity (valid)")
        for (name, points), colour in zip(
            curves.items(), colormaps["viridis"](np.linspace(0.1, 0.9, len(curves))), strict=True
        ):
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=2.5, linewidth=1.2, label=name)
        lowest = min(y for points in curves.values() for _, y in points)
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
        axes.legend(fontsize=7)
        return _png(figure)


def stacked_shares(parts: Mapping[str, Sequence[float]], names: Sequence[str], label: str) -> bytes:
    """One bar per name of `parts`, its shares of 1 stacked from the left; `names` are those of the shares."""
    with rc_context(STYLE):
        figure, axes = _axes(label, "", height=1.0 + 0.28 * len(parts))
        colours = [GREY, *colormaps["viridis"](np.linspace(0.1, 0.9, len(names) - 1))]
        rows, left = list(parts), np.zeros(len(parts))
        for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
            width = np.array([parts[row][place] for row in rows])
            axes.barh(rows, width, left=left, color=colour, height=0.7, label=name)
            left += width
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside lower center")
        return _png(figure)


def grouped_bars(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> bytes:
    """One panel per label below each other, all with the same groups: the bars of a group side by side, of the same
    names in every group. None has no bar."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 1.4 + 1.9 * len(panels)), layout="constrained")
        for axes, (label, groups) in zip(
            figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            names = list(next(iter(groups.values())))
            places, width = np.arange(len(groups)), 0.8 / len(names)
            for number, (name, colour) in enumerate(zip(names, (GREY, BLUE, ORANGE), strict=False)):
                heights = np.array([group[name] for group in groups.values()], float)
                axes.bar(places + (number - (len(names) - 1) / 2) * width, heights, width, color=colour, label=name)
            axes.set_xticks(places, list(groups), rotation=60, ha="right", fontsize=7)
            axes.set_ylabel(label)
            axes.grid(axis="x", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside lower center")
        return _png(figure)


def perplexity_with_errors(curves: Mapping[str, Sequence[tuple[float, float, float]]], label: str) -> bytes:
    """Perplexity on valid over a setting, one line per name; points are (setting, mean, half an error bar). The
    settings stand side by side at equal distances."""
    places = {x: place for place, x in enumerate(sorted({x for points in curves.values() for x, _, _ in points}))}
    with rc_context(STYLE):
        figure, axes = _axes(label, "perplexity (valid)")
        colours = colormaps["viridis"](np.linspace(0.1, 0.9, len(curves)))
        for number, ((name, points), colour) in enumerate(zip(curves.items(), colours, strict=True)):
            x, y, error = (np.array(column) for column in zip(*points, strict=True))
            # Moved apart, so that error bars of two lines do not hide each other.
            at = np.array([places[value] for value in x]) + 0.04 * (number - (len(curves) - 1) / 2)
            axes.errorbar(at, y, yerr=error, color=colour, marker="o", markersize=3.5, linewidth=1.2, capsize=3,
                          label=name)  # fmt: skip
        axes.set_xticks(list(places.values()), [f"{x:g}" for x in places])
        axes.legend(fontsize=7)
        return _png(figure)


def loss_histograms(
    labels: Sequence[str], heights: Sequence[int], losses: Mapping[str, Sequence[float]], x: str
) -> bytes:
    """One panel per name below each other: bars of `heights` tokens, coloured by their mean loss in nats, lighter where
    it is lower (Ton et al., figure 2). All panels have one scale of colours."""
    every = [value for values in losses.values() for value in values]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.8 + 1.9 * len(losses)), layout="constrained")
        panels = figure.subplots(len(losses), 1, sharex=True, squeeze=False)[:, 0]
        colours = ScalarMappable(Normalize(min(every), max(every)), "viridis_r")
        for axes, (name, values) in zip(panels, losses.items(), strict=True):
            axes.bar(range(len(labels)), heights, color=colours.to_rgba(np.asarray(values)), width=0.9)
            axes.set_title(name, loc="left")
            axes.set_ylabel("tokens")
            axes.grid(axis="x", visible=False)
        panels[-1].set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
        panels[-1].set_xlabel(x)
        figure.colorbar(colours, ax=list(panels), label="mean loss, nats")
        return _png(figure)


def paired_histograms(
    histograms: Mapping[str, Mapping[str, Sequence[tuple[float, float, int, float]]]], x: str
) -> bytes:
    """One panel per name below each other, in each the densities of its groups laid over one another; a bin is (from,
    to, count, density)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.6 + 1.9 * len(histograms)), layout="constrained")
        panels = figure.subplots(len(histograms), 1, squeeze=False)[:, 0]
        for axes, (name, groups) in zip(panels, histograms.items(), strict=True):
            for (group, bins), colour in zip(groups.items(), (ORANGE, BLUE), strict=True):
                edges = [bins[0][0], *(bin[1] for bin in bins)]
                axes.stairs([bin[3] for bin in bins], edges, fill=True, color=colour, alpha=0.5, label=f"{group} loss")
            axes.set_title(name, loc="left")
            axes.set_ylabel("density")
            axes.legend(fontsize=7)
        panels[-1].set_xlabel(x)
        return _png(figure)


def perplexity_over_weight(tuned: Tuned) -> bytes:
    """Perplexity over λ on the tuning split for every temperature, at the best k; tuned with neighbours."""
    grid = given(tuned.grid)
    lambdas = np.array(grid.lambdas)
    losses = np.array(grid.loss_nats)[grid.ks.index(given(tuned.k))]
    order = np.argsort(lambdas)
    with rc_context(STYLE):
        figure, axes = _axes("λ", f"perplexity per token ({tuned.split})")
        colours = colormaps["viridis"](np.linspace(0.3, 0.85, len(losses)))
        for temperature, row, colour in zip(grid.temperatures, losses, colours, strict=True):
            best = temperature == tuned.temperature
            axes.plot(
                lambdas[order], np.exp(row[order]), color=ORANGE if best else colour, linewidth=2.2 if best else 1.0,
                zorder=3 if best else 2, label=f"T = {temperature:g}{' (best)' if best else ''}",
            )  # fmt: skip
        axes.plot(given(tuned.weight), given(tuned.perplexity), "o", color=ORANGE, markersize=6, zorder=4)
        axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
        # Curves near λ = 1 rise without bound: show what lies around the LM.
        lowest = float(np.exp(losses.min()))
        axes.set_ylim(lowest - 0.15 * (tuned.lm_perplexity - lowest) - 0.01 * lowest, 1.25 * tuned.lm_perplexity)
        axes.legend(fontsize=7, ncols=2)
        return _png(figure)


def perplexity_over_k(tuned: Tuned) -> bytes:
    """The best perplexity on the tuning split for every number of neighbours; tuned with neighbours."""
    grid = given(tuned.grid)
    best = np.exp(np.array(grid.loss_nats).min(axis=(1, 2)))
    order = np.argsort(grid.ks)
    with rc_context(STYLE):
        figure, axes = _axes("neighbours k", f"best perplexity per token ({tuned.split})")
        axes.plot(np.array(grid.ks)[order], best[order], color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
        axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
        axes.set_xscale("log", base=2)
        axes.set_xticks(grid.ks, [str(k) for k in grid.ks])
        axes.legend()
        return _png(figure)


def perplexity_over_skips(curves: Mapping[str, GateCurve]) -> bytes:
    """Perplexity over the share of skipped searches, a line per split."""
    with rc_context(STYLE):
        figure, axes = _axes("share of searches skipped", "perplexity per token")
        for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREY), strict=False):
            axes.plot(
                curve.skipped, curve.perplexity, color=colour, marker="o", markersize=3, linewidth=1.2, label=name
            )
            # Skipping at random mixes the two losses in proportion.
            ends = np.array([curve.loss_nats[0], curve.loss_nats[-1]])
            shares = np.linspace(0, 1, 21)
            axes.plot(shares, np.exp(ends[0] + shares * (ends[1] - ends[0])), color=colour, linewidth=1, linestyle="--")
        axes.legend()
        return _png(figure)


def perplexity_over_theta(tuned: Tuned) -> bytes:
    """Perplexity with the neural cache over θ for every window, at the best λ of each; tuned with a cache."""
    cache = given(tuned.cache)
    grid = cache.grid
    best = np.exp(np.array(grid.loss_nats).min(axis=2))
    order = np.argsort(grid.thetas)
    with rc_context(STYLE):
        figure, axes = _axes("θ", f"perplexity ({tuned.split})")
        colours = colormaps["viridis"](np.linspace(0.3, 0.85, len(best)))
        for window, row, colour in zip(grid.windows, best, colours, strict=True):
            axes.plot(
                np.array(grid.thetas)[order], row[order], color=ORANGE if window == cache.window else colour,
                marker="o", markersize=3, linewidth=1.2, label=f"window {window}",
            )  # fmt: skip
        axes.axhline(tuned.lm_perplexity, color=GREY, linewidth=1, linestyle="--", label="LM alone")
        axes.set_xscale("log")
        axes.legend(fontsize=7, ncols=2)
        return _png(figure)


def recall_over_time(measured: Sequence[Any], front: Sequence[Any], label: str) -> bytes:
    """Recall over milliseconds per query of index.records.Candidate: a line per factory with something on the
    front, which is ringed; grey dots for the others."""
    with rc_context(STYLE):
        figure, axes = _axes("ms per query, exact distances included", label, height=3.6)
        names = list(dict.fromkeys(one.factory for one in front))
        others = [one for one in measured if one.factory not in names]
        axes.scatter(*_time_and_recall(others), s=8, color=GREY)
        for name, colour in zip(names, colormaps["viridis"](np.linspace(0.05, 0.9, len(names))), strict=True):
            own = sorted((one for one in measured if one.factory == name), key=lambda one: one.whole_ms)
            axes.plot(
                *_time_and_recall(own), color=colour, marker="o", markersize=3.5, linewidth=1.2,
                label=f"{name}, {own[0].key_bytes} bytes/key",
            )  # fmt: skip
        axes.scatter(*_time_and_recall(front), s=60, facecolors="none", edgecolors=ORANGE)
        axes.set_xscale("log")
        axes.legend(fontsize=7)
        return _png(figure)


def _time_and_recall(measured: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [one.whole_ms for one in measured], [one.store_recall for one in measured]


def perplexity_over_recall(points: Mapping[str, Points], split: str) -> bytes:
    """Perplexity over recall; index → (recall, perplexity) of each question."""
    with rc_context(STYLE):
        figure, axes = _axes("recall", f"perplexity ({split})")
        colours = colormaps["viridis"](np.linspace(0.05, 0.9, len(points)))
        for (name, own), colour in zip(points.items(), colours, strict=True):
            axes.plot(
                *zip(*sorted(own), strict=True), color=colour, marker="o", markersize=3.5, linewidth=1, label=name
            )
        axes.legend(fontsize=7)
        return _png(figure)


def stage_bars(seconds: Mapping[str, float]) -> bytes:
    """Time of each stage as horizontal bars, in minutes where any stage took more than five."""
    minutes = max(seconds.values(), default=0) > 300
    values = [value / 60 if minutes else value for value in seconds.values()]
    with rc_context(STYLE):
        figure, axes = _axes("minutes" if minutes else "seconds", "", height=0.6 + 0.3 * len(values))
        axes.barh(list(seconds), values, color=BLUE, height=0.62)
        axes.bar_label(axes.containers[0], fmt="%.1f", padding=3, color=GREY)  # type: ignore[arg-type]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        return _png(figure)


def _axes(x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    # Without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _clip_start(axes: Axes, losses: Sequence[float]) -> None:
    """Leave the steep first updates above the picture when they would flatten the rest."""
    if len(losses) >= 10:
        low, high = float(np.min(losses)), float(np.quantile(losses, 0.97))
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()
