"""What all plots share: fonts and colours, axes, the legend outside of the axes, and the finished picture."""

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend

P = ParamSpec("P")
BLUE, ORANGE, GREY = "#3b6fb6", "#d1772e", "#808890"
# Greys that are readable on a white and on a near-black page: the pictures have no ground of their own.
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "text.color": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.titlesize": 10, "axes.grid": True, "grid.color": GREY,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9, "figure.dpi": 144,
}  # fmt: skip
WIDTH = 5.8
"""Of every picture, in inches."""
SMALL = 8.5
"""Points: captions, and names that stand slanted below an axis."""
_CAPTION_CHARACTERS, _CAPTION_LINE = 92, 0.17
"""That fit into a line of the caption; height of a line in inches."""
_PAD = 0.06
"""Inches between axes, legend and caption."""
Points = Sequence[tuple[float, float]]


def drawn(plot: Callable[P, bytes]) -> Callable[P, bytes]:
    """A plot that is drawn in STYLE, whatever the settings of matplotlib are."""

    @wraps(plot)
    def styled(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with rc_context(STYLE):
            return plot(*args, **kwargs)

    return styled


def axes_of(x: str, y: str, height: float = 2.9) -> tuple[Figure, Axes]:
    """One pair of axes with its labels; `height` in inches, without the legend."""
    figure, (axes,) = panels_of(1, height)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def panels_of(count: int, height: float, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    """So many axes below each other."""
    # Without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=share_x, squeeze=False)[:, 0])


def colours(count: int, first: float = 0.1, last: float = 0.9) -> Any:
    """So many colours, from a dark to a light one."""
    return colormaps["viridis"](np.linspace(first, last, count))


def png(figure: Figure, legend: Sequence[Axes] = (), caption: str = "") -> bytes:
    """The finished picture.

    legend: axes whose names are shown below all axes, so that no line runs through them. caption: what there is to see,
    below the picture, for pictures that stand alone; it is the PNG's Description, too.
    """
    canvas = FigureCanvasAgg(figure)
    lines = textwrap.wrap(caption, _CAPTION_CHARACTERS)
    names = _legend_of(figure, legend)
    below = _CAPTION_LINE * len(lines) + _PAD * bool(lines)
    beside = names.get_window_extent(canvas.get_renderer()).height / figure.dpi + _PAD if names is not None else 0.0
    # The axes keep their height, whatever stands below them.
    height = figure.get_figheight() + below + beside
    figure.set_figheight(height)
    if names is not None:
        names.set_bbox_to_anchor((0.5, below / height), figure.transFigure)
    figure.text(0.01, _PAD / 2 / height, "\n".join(lines), fontsize=SMALL, va="bottom", in_layout=False)
    engine, taken = figure.get_layout_engine(), (below + beside) / height
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, taken, 1, 1 - taken))
    stream = io.BytesIO()
    facts = {"Software": None, **({"Description": caption} if caption else {})}
    figure.savefig(stream, format="png", transparent=True, metadata=facts)
    return stream.getvalue()


def _legend_of(figure: Figure, named: Sequence[Axes]) -> Legend | None:
    """The names of what is drawn on the axes in as many columns as the figure is wide; None without names."""
    found = [axes.get_legend_handles_labels() for axes in named]
    handles = [handle for part, _ in found for handle in part]
    names = [name for _, part in found for name in part]
    for columns in range(len(names), 0, -1):
        legend = figure.legend(handles, names, ncols=columns, loc="lower center", borderaxespad=0, borderpad=0)
        legend.set_in_layout(False)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:  # type: ignore[attr-defined]
            return legend
        legend.remove()
    return None
