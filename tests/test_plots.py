"""Pictures of the report, at their limits."""

import torch
from PIL import Image

from records import plots
from records.plots import BarRow, plot_bars, plot_confusion


def test_pictures_of_any_size(tmp_path):
    """A thousand classes, a gap, and rows where one of the two is missing or zero."""
    confusion = torch.eye(1000, dtype=torch.double)
    plot_confusion(confusion, [f"classe $x_{i}$" for i in range(1000)], "", tmp_path / "large.png")
    plot_confusion(torch.tensor([[1.0, 1], [0, 0]]), ["$a_", "b"], "$", tmp_path / "small.png")
    rows = [BarRow("$a_", (0.0, None), None), None, BarRow("b", None, (1.0, 0.1), 0.5), BarRow("c", None, None)]
    plot_bars(rows, "", tmp_path / "bars.png")
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 5, path


def test_chance_is_on_the_axis_however_low_the_bars(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plot_bars([BarRow("a", (0.05, None), (0.1, 0.01), 0.5), None], "", tmp_path / "bars.png")
    (axis,) = drawn[0].axes
    assert axis.get_xlim()[1] > 50
