"""Plots that compare groups: shares as stacked bars, bars side by side, error bars over a setting, densities."""

from collections.abc import Mapping, Sequence

import numpy as np

from distlm.analysis.plots.style import BLUE, GREY, ORANGE, SMALL, axes_of, colours, drawn, panels_of, png

Histogram = Sequence[tuple[float, float, int, float]]
"""Of each bin from, to, count and density."""


@drawn
def stacked_shares(parts: Mapping[str, Sequence[float]], names: Sequence[str], label: str, caption: str) -> bytes:
    """One bar per name of `parts`, its shares of 1 stacked from the left; `names` are those of the shares."""
    figure, axes = axes_of(label, "", height=0.7 + 0.28 * len(parts))
    rows, left = list(parts), np.zeros(len(parts))
    for place, (name, colour) in enumerate(zip(names, [GREY, *colours(len(names) - 1)], strict=True)):
        width = np.array([parts[row][place] for row in rows])
        axes.barh(rows, width, left=left, color=colour, height=0.7, label=name)
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False)
    return png(figure, [axes], caption)


@drawn
def grouped_bars(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]], caption: str) -> bytes:
    """One panel per label below each other, all with the same groups: the bars of a group side by side, of the same
    names in every group. None has no bar."""
    figure, drawn_on = panels_of(len(panels), 1.2 + 1.9 * len(panels), share_x=True)
    for axes, (label, groups) in zip(drawn_on, panels.items(), strict=True):
        names = list(next(iter(groups.values())))
        places, width = np.arange(len(groups)), 0.8 / len(names)
        for number, (name, colour) in enumerate(zip(names, (GREY, BLUE, ORANGE), strict=False)):
            heights = np.array([group[name] for group in groups.values()], float)
            axes.bar(places + (number - (len(names) - 1) / 2) * width, heights, width, color=colour, label=name)
        axes.set_xticks(places, list(groups), rotation=60, ha="right", fontsize=SMALL)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
    return png(figure, drawn_on[-1:], caption)


@drawn
def perplexity_with_errors(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], label: str, caption: str
) -> bytes:
    """Perplexity on valid over a setting, one line per name; points are (setting, mean, half an error bar). The
    settings stand side by side at equal distances."""
    places = {x: place for place, x in enumerate(sorted({x for points in curves.values() for x, _, _ in points}))}
    figure, axes = axes_of(label, "perplexity per word (valid)")
    for number, ((name, points), colour) in enumerate(zip(curves.items(), colours(len(curves)), strict=True)):
        x, y, error = (np.array(column) for column in zip(*points, strict=True))
        # Moved apart, so that error bars of two lines do not hide each other.
        at = np.array([places[value] for value in x]) + 0.04 * (number - (len(curves) - 1) / 2)
        axes.errorbar(at, y, yerr=error, color=colour, marker="o", markersize=3.5, linewidth=1.2, capsize=3, label=name)
    axes.set_xticks(list(places.values()), [f"{x:g}" for x in places])
    return png(figure, [axes], caption)


@drawn
def paired_histograms(histograms: Mapping[str, Mapping[str, Histogram]], x: str, y: str, caption: str) -> bytes:
    """One panel per name below each other, in each the densities of its two groups laid over one another, on one scale.
    Of several names such panels look alike: below them a line for each is its first group's density less the second's.
    """
    several = len(histograms) > 1
    figure, panels = panels_of(len(histograms) + several, 0.6 + 1.9 * (len(histograms) + several), share_x=True)
    highest = max(one[3] for groups in histograms.values() for bins in groups.values() for one in bins)
    for axes, (name, groups) in zip(panels, histograms.items(), strict=False):
        for (group, bins), colour in zip(groups.items(), (ORANGE, BLUE), strict=True):
            edges = [bins[0][0], *(one[1] for one in bins)]
            axes.stairs([one[3] for one in bins], edges, fill=True, color=colour, alpha=0.5, label=f"{group} loss")
        axes.set_ylim(0, 1.05 * highest)
        axes.set_title(name, loc="left")
        axes.set_ylabel(y)
    if several:
        for (name, groups), colour in zip(histograms.items(), colours(len(histograms)), strict=True):
            first, second = groups.values()
            apart = [one[3] - other[3] for one, other in zip(first, second, strict=True)]
            edges = [first[0][0], *(one[1] for one in first)]
            panels[-1].stairs(apart, edges, color=colour, linewidth=1.2, baseline=None, label=f"{name}: difference")
        panels[-1].axhline(0, color=GREY, linewidth=0.8)
        panels[-1].set_title(" less ".join(f"{group} loss" for group in groups), loc="left")
        panels[-1].set_ylabel("Δ density")
    panels[-1].set_xlabel(x)
    return png(figure, [panels[0], *panels[len(histograms) :]], caption)
