"""Pictures of the report, at their limits."""

from PIL import Image

from eval.records import plots
from eval.records.plots import BarRow, plot_bars


def test_bars_of_any_rows(tmp_path):
    """A label that is no formula, and rows where one of the two is missing or zero."""
    rows = [BarRow("$a_", (0.0, None), None), BarRow("b", None, (1.0, 0.1), 0.5), BarRow("c", None, None)]
    plot_bars(rows, tmp_path / "bars.png")
    assert len(Image.open(tmp_path / "bars.png").convert("RGB").getcolors(1 << 24)) > 5


def test_chance_is_on_the_axis_however_low_the_bars(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plot_bars([BarRow("a", (0.05, None), (0.1, 0.01), 0.5)], tmp_path / "bars.png")
    (axis,) = drawn[0].axes
    assert axis.get_xlim()[1] > 50
