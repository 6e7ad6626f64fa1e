"""Pictures of the report, at their limits."""

from types import SimpleNamespace

import torch
from PIL import Image

from capivara_common.image_files import BadImage
from eval.records import plots
from eval.records.plots import plot_bars, plot_retrieval_sheet
from eval.retrieval import RetrievalEmbeddings


def bar(label: str, baseline: tuple | None, model: tuple | None, chance: float | None = None) -> dict:
    """A row of `pairs_of`, of (mean, deviation)."""
    roles = {"baseline": baseline, "capivara": model}
    of_roles = {role: of and SimpleNamespace(mean=of[0], deviation=of[1]) for role, of in roles.items()}
    return {"short": label, "chance": chance, **of_roles}


def test_bars_of_any_rows(tmp_path):
    """A label that is no formula, and rows where one of the two is missing or zero."""
    plot_bars([bar("$a_", (0.0, None), None), bar("b", None, (1.0, 0.1), 0.5)], tmp_path / "bars.png")
    assert len(Image.open(tmp_path / "bars.png").convert("RGB").getcolors(1 << 24)) > 5


def test_chance_is_on_the_axis_however_low_the_bars(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plot_bars([bar("a", (0.05, None), (0.1, 0.01), 0.5)], tmp_path / "bars.png")
    (axis,) = drawn[0].axes
    assert axis.get_xlim()[1] > 50


def test_a_sheet_holds_small_pictures_and_none_of_a_file_that_has_gone(tmp_path, monkeypatch):
    """The measurement is finished by then."""

    def image(index: int) -> Image.Image:
        if index == 3:
            raise BadImage("unreadable image", "it has gone")
        return Image.new("L", (1200, 900))

    rows = []
    monkeypatch.setattr(plots, "plot_gallery", lambda of_sheet, *_: rows.extend(of_sheet))
    embeds = torch.eye(6)
    found = {"capivara": RetrievalEmbeddings(embeds, embeds, torch.arange(6))}
    plot_retrieval_sheet(tmp_path / "sheet.png", image, list("abcdef"), found)
    pictures = [picture for ((_, shown),) in rows for picture, _ in shown]
    assert {(picture.mode, *picture.size) for picture in pictures if picture} == {("RGB", 400, 300)}
    assert None in pictures
