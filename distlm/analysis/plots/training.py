"""Plots over the updates of a training, and of its time."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from distlm.analysis.plots.style import BLUE, GREY, ORANGE, Points, axes_of, colours, drawn, png


@drawn
def loss_curve(train: Points, valid: Points) -> bytes:
    """Loss in nats per token over updates; each point is (update, loss)."""
    figure, axes = axes_of("update", "loss, nats per token")
    if train:
        axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.2, label="train")
    if valid:
        axes.plot(*zip(*valid, strict=True), color=ORANGE, marker="o", markersize=3.5, linewidth=1.2, label="valid")
    _clip_start(axes, [y for _, y in [*train, *valid]])
    return png(figure, [axes])


@drawn
def learning_rate(points: Points) -> bytes:
    """Learning rate over updates."""
    figure, axes = axes_of("update", "learning rate")
    axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    return png(figure)


@drawn
def shares(curves: Mapping[str, Points], label: str) -> bytes:
    """Shares between 0 and 1 over updates, one line per name."""
    figure, axes = axes_of("update", label)
    for (name, points), colour in zip(curves.items(), colours(len(curves), 0.3, 0.85), strict=True):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=name)
    axes.set_ylim(0, 1.02)
    return png(figure, [axes])


@drawn
def perplexity_curves(curves: Mapping[str, Points], top: float, per: str, caption: str) -> bytes:
    """Perplexity on valid over updates, one line per model (Kim & Jung, figure 3). The line that ends lowest is bold;
    what lies above `top` is cut off. per: token, or masked token."""
    figure, axes = axes_of("update", f"perplexity per {per} (valid)")
    last = {name: points[-1][1] for name, points in curves.items()}
    for (name, points), colour in zip(curves.items(), colours(len(curves)), strict=True):
        best = last[name] == min(last.values())
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=2.5, linewidth=2.6 if best else 1.2,
                  label=f"{name} (ends lowest)" if best else name)  # fmt: skip
    lowest = min(y for points in curves.values() for _, y in points)
    axes.set_ylim(lowest - 0.05 * (top - lowest), top)
    return png(figure, [axes], caption)


@drawn
def stage_bars(seconds: Mapping[str, float]) -> bytes:
    """Time of each stage as horizontal bars, in minutes where any stage took more than five."""
    minutes = max(seconds.values(), default=0) > 300
    values = [value / 60 if minutes else value for value in seconds.values()]
    figure, axes = axes_of("wall time, minutes" if minutes else "wall time, seconds", "", 0.6 + 0.3 * len(values))
    axes.barh(list(seconds), values, color=BLUE, height=0.62)
    axes.bar_label(axes.containers[0], fmt="%.1f", padding=3, color=GREY)  # type: ignore[arg-type]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    return png(figure)


def _clip_start(axes: Axes, losses: Sequence[float]) -> None:
    """Leave the steep first updates above the picture when they would flatten the rest."""
    if len(losses) >= 10:
        low, high = float(np.min(losses)), float(np.quantile(losses, 0.97))
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
