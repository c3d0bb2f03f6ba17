"""Where pictures look alike, their difference is drawn."""

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from distlm.analysis.plots import groups, losses
from distlm.analysis.plots.groups import paired_histograms
from distlm.analysis.plots.losses import losses_and_differences
from distlm.analysis.plots.style import BLUE, ORANGE


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, before it is a picture."""
    found: list[Figure] = []
    for module in (groups, losses):
        make = module.png

        def kept(figure: Figure, *args: Any, make: Any = make, **kwargs: Any) -> bytes:
            found.append(figure)
            return bytes(make(figure, *args, **kwargs))

        monkeypatch.setattr(module, "png", kept)
    return found


def test_losses_differ_from_the_first_ones(figures: list[Figure]) -> None:
    differences = {"b": [-0.5, 0.25], "c": [0.0, 1.0]}
    losses_and_differences(["rare", "frequent"], [10, 90], ("a", [4.0, 2.0]), differences, "count", "seen")
    first, *panels = figures[0].axes[:3]
    assert [bar.get_height() for bar in first.patches] == [10, 90]  # type: ignore[attr-defined]
    assert [panel.get_title(loc="left") for panel in panels] == ["b, less a", "c, less a"]
    heights = [[bar.get_height() for bar in panel.patches] for panel in panels]  # type: ignore[attr-defined]
    assert heights == list(differences.values()) and panels[0].get_ylim() == panels[1].get_ylim()
    # What is better is blue.
    assert [to_hex(bar.get_facecolor()) for bar in panels[0].patches] == [BLUE, ORANGE]
    losses_and_differences(["rare", "frequent"], [10, 90], ("a", [4.0, 2.0]), {}, "count", "seen")
    assert len(figures[1].axes) == 2


def test_two_runs_have_a_panel_of_differences_and_one_has_none(figures: list[Figure]) -> None:
    run = {"low": [(0.0, 1.0, 3, 0.75), (1.0, 2.0, 1, 0.25)], "high": [(0.0, 1.0, 2, 0.5), (1.0, 2.0, 2, 0.5)]}
    other = {"low": run["high"], "high": run["low"]}
    paired_histograms({"a": run, "b": other}, "x", "y", "seen")
    paired_histograms({"a": run}, "x", "y", "seen")
    assert [len(figure.axes) for figure in figures] == [3, 1]
    lines = [patch for patch in figures[0].axes[2].patches if isinstance(patch, StepPatch)]
    assert [line.get_label() for line in lines] == ["a: difference", "b: difference"]
    assert np.array_equal([line.get_data()[0] for line in lines], [[0.25, -0.25], [-0.25, 0.25]])
    assert figures[0].axes[2].get_title(loc="left") == "low loss less high loss"
