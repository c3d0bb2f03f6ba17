"""Loss by groups of tokens: how many there are, the loss of one model, and by how much others differ from it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from distlm.analysis.plots.style import BLUE, GREY, ORANGE, SMALL, drawn, panels_of, png


@drawn
def losses_and_differences(
    labels: Sequence[str], tokens: Sequence[int], first: tuple[str, Sequence[float]],
    differences: Mapping[str, Sequence[float]], x: str, caption: str,
) -> bytes:  # fmt: skip
    """Above, bars of so many `tokens` per group, coloured by the mean loss of the `first` model in nats, lighter where
    it is lower (Ton et al., figure 2). Below, a panel for each other model: its mean loss less the first one's, in nats
    per token, on one scale; pictures of the losses themselves look alike."""
    name, losses = first
    figure, panels = panels_of(1 + len(differences), 1.0 + 1.9 * (1 + len(differences)), share_x=True)
    scale = ScalarMappable(Normalize(min(losses), max(losses)), "viridis_r")
    panels[0].bar(range(len(labels)), tokens, color=scale.to_rgba(np.asarray(losses)), width=0.9)
    panels[0].set_title(name, loc="left")
    panels[0].set_ylabel("tokens")
    figure.colorbar(scale, ax=panels[0], label="mean loss, nats")
    for axes, (other, values) in zip(panels[1:], differences.items(), strict=True):
        colours = [BLUE if value < 0 else ORANGE for value in values]
        axes.bar(range(len(labels)), values, color=colours, width=0.9)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_title(f"{other}, less {name}", loc="left")
        axes.set_ylabel("Δ loss, nats")
    every = [0.0, *(value for values in differences.values() for value in values)]
    margin = 0.06 * (max(every) - min(every)) or 0.01
    for axes in panels[1:]:
        axes.set_ylim(min(every) - margin, max(every) + margin)
    for axes in panels:
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=SMALL)
    panels[-1].set_xlabel(x)
    return png(figure, caption=caption)
