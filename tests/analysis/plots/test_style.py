"""What all plots share: the legend stands outside of the axes, the caption below both, and it is in the file."""

import io

import pytest
from PIL import Image

from distlm.analysis.plots.style import WIDTH, axes_of, png


@pytest.mark.parametrize(
    "names", [["LM alone"], [f"temperature {number}" for number in range(9)], ["x" * 60, "y" * 60]]
)
@pytest.mark.parametrize("caption", ["", "One sentence.", "A long sentence, over several lines. " * 6])
def test_no_line_runs_through_the_legend_or_the_caption(names: list[str], caption: str) -> None:
    figure, axes = axes_of("update", "loss, nats per token")
    for number, name in enumerate(names):
        axes.plot([0, 1], [number, 1], label=name)
    picture = Image.open(io.BytesIO(png(figure, [axes], caption)))
    assert picture.info.get("Description", "") == caption
    (legend,) = figure.legends
    labels, below = legend.get_window_extent(), axes.xaxis.label.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert labels.y1 <= below.y0 + 1 and labels.x0 >= 0 and labels.x1 <= WIDTH * figure.dpi
    (text,) = figure.texts
    if caption:
        written = text.get_window_extent()
        assert written.y0 >= 0 and written.y1 <= labels.y0 + 1 and written.x1 <= WIDTH * figure.dpi
    assert text.get_text().replace("\n", " ") == caption.strip()
    # The axes are no smaller for what stands below them.
    alone, same = axes_of("update", "loss, nats per token")
    png(alone)
    assert axes.get_window_extent().height == pytest.approx(same.get_window_extent().height, rel=0.1)
