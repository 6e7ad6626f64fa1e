"""A selection keeps the captions that training would use with the same flags, and reports its counts."""

import html
import json
import re

import PIL.Image
import pytest
from caption_tars import picture, rows_of, saved_train, training_of
from datasets import Image
from sampling import one_in

from caption_data.rows import CAPTIONS_FEATURE, SIMILARITIES_FEATURE, STRATEGIES
from captions.select import SelectArguments, main
from training.arguments import RunArguments

# Original captions, generated captions, similarities: below, at and above 0.2; a repeated caption; no caption.
ROWS = [
    (["um gato"], ["uma foto de um gato", "um cachorro", "um gato"], [0.30, 0.35, 0.05, 0.30]),
    (["uma casa"], ["a casa azul", "um gato preto"], [0.19, 0.40, 0.21]),
    (["céu $x_1$ \\frac"], [], [0.2]),
    (["<b>água</b> | *verde*"], ["rio"], [0.1, None]),
    ([], ["só gerada", "outra"], [0.5, 0.1]),
    (["longa " * 2000], ["curta"], [0.6, 0.22]),
    ([""], [" "], [None, None]),
    (["sem número"], ["x"], [0.3]),
    (["árvore"], [], [float("nan")]),
]
FLAGS = [
    {"caption_strategy": strategy, **pair} for strategy in STRATEGIES for pair in ({}, {"min_pair_similarity": 0.2})
]


def saved(folder, rows=ROWS, scored=True) -> str:
    features = {"image": Image(), "captions-pt": CAPTIONS_FEATURE, "generated-captions-pt": CAPTIONS_FEATURE}
    features |= {"similarities-pt": SIMILARITIES_FEATURE} if scored else {}
    columns = list(zip(*rows, strict=True))[: len(features) - 1]
    return saved_train(folder, features, map(picture, range(len(rows))), *columns)


def select(args):
    """Run the whole stage: write its rows and the report."""
    rows = args.write_rows()
    args.report()
    return rows


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("scored") / "data")


def read_selection(output):
    return json.loads((output / "report" / "selection.json").read_text(encoding="utf-8"))


def table_rows(output) -> list[list[str]]:
    """Return the cells of all tables of the report page."""
    page = (output / "report" / "index.html").read_text(encoding="utf-8")
    rows = (re.findall(r"(?s)<td[^>]*>(.*?)</td>", row) for row in re.findall(r"(?s)<tr>(.*?)</tr>", page))
    return [[html.unescape(cell) for cell in row] for row in rows if len(row) > 1]


@pytest.mark.parametrize("flags", one_in(3, FLAGS), ids=lambda flags: "-".join(map(str, flags.values())))
def test_a_selection_keeps_what_training_would_use(scored, tmp_path, flags, monkeypatch):
    monkeypatch.setattr("captions.select.draw_similarity_histogram", lambda *_: None)  # other tests check the plot
    select(SelectArguments(scored, tmp_path / "out", **flags))
    skipped = []
    (split,) = training_of(RunArguments(model="m", dataset=[scored], **flags), skipped)
    rows = rows_of(tmp_path / "out")
    assert [row["captions-pt"] for row in rows] == split.captions() and rows
    # Training on the output without these flags uses the same captions.
    (again,) = training_of(RunArguments(model="m", dataset=[str(tmp_path / "out")]), [])
    assert again.captions() == split.captions() and again.table["digest"][:] == split.table["digest"][:]


@pytest.mark.slow
def test_similarities_stay_with_their_captions(scored, tmp_path):
    report = select(SelectArguments(scored, tmp_path / "out", caption_strategy="rank", caption_count=2))
    rows = rows_of(tmp_path / "out")
    assert report.skipped == {"no caption": 2} and report.rows == len(rows) == 7
    assert [row["captions-pt"] for row in rows[:2]] == [
        ["uma foto de um gato", "um gato"],
        ["a casa azul", "um gato preto"],
    ]
    assert rows[0]["similarities-pt"] == pytest.approx([0.35, 0.30]) and rows[0]["generated-captions-pt"] == []
    assert [row["image"]["bytes"] for row in rows[:2]] == [picture(0), picture(1)]


@pytest.mark.slow
def test_the_report_counts_each_image_and_caption(scored, tmp_path):
    args = SelectArguments(scored, tmp_path / "out", caption_strategy="threshold", min_pair_similarity=0.2)
    select(args)
    selection = read_selection(tmp_path / "out")
    assert selection["images"] == {"kept": 3, "not chosen": 4, "can't be used": {"no caption": 2}}
    assert selection["captions"] == {"of these images": 14, "kept": 5}, (
        "a caption that occurs twice in a row counts once"
    )
    assert selection["similarities"]["kept"]["count"] == 5 and selection["similarities"]["kept"][
        "min"
    ] == pytest.approx(0.2)
    assert selection["similarities"]["dropped"]["max"] == pytest.approx(0.5), (
        "from the image without an original caption"
    )
    assert selection["images_passing"]["0.2"] == 3 and selection["images_passing"]["0.1"] == 5
    kept = [example for example in selection["examples"] if example["kept"]]
    dropped = [example["similarity"] for example in selection["examples"] if not example["kept"]]
    assert [example["row"] for example in kept] == [2, 5, 0, 0, 5], "ordered by similarity, the least similar first"
    assert dropped == sorted(dropped, reverse=True) and dropped[0] == pytest.approx(0.5)
    size = PIL.Image.open(tmp_path / "out" / "report" / "similarities.png").size
    assert size[0] >= 900 and size[1] >= 300
    page = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert {f'<img src="row-{row}.jpg"' in page for row in (0, 2, 5)} == {True}
    assert PIL.Image.open(tmp_path / "out" / "report" / "row-2.jpg").size == (9, 12)
    rows = table_rows(tmp_path / "out")
    assert ["images", "7", "3", "42.9"] in rows and ["images that can't be used: no caption", "2", "0", "0.0"] in rows
    assert "céu $x_1$ \\frac" in [row[1] for row in rows] and max(len(row[1]) for row in rows) <= 300


@pytest.mark.slow
def test_the_report_shows_the_cutoff_of_the_pair_filter_with_rank(tmp_path):
    """`rank` drops captions that are more similar than captions it keeps; they must not hide the cutoff."""
    rows = [([f"foto {i}"], [f"melhor {i}", f"boa {i}"], [0.05 * i, 0.9, 0.8]) for i in range(8)]
    flags = {"caption_strategy": "rank", "caption_count": 1, "min_pair_similarity": 0.2}
    select(SelectArguments(saved(tmp_path / "data", rows), tmp_path / "out", **flags))
    shown = {True: [], False: []}
    for example in read_selection(tmp_path / "out")["examples"]:
        shown[example["kept"]].append(example["caption"])
    assert shown[False] == ["foto 3", "foto 2", "foto 1", "foto 0"]
    assert shown[True] == ["foto 4", "foto 5", "foto 6", "foto 7"]


@pytest.mark.slow
def test_texts_are_escaped_in_the_report(tmp_path):
    texts = ["$\\frac{1}$", "$x_1", "a\nb\tc", "<script>alert(1)</script>", "हिन्दी में", "\u202eabc"]
    texts.append("[x](http://y) | `code`")
    rows = [([text], [], [0.1 * number]) for number, text in enumerate(texts)]
    select(SelectArguments(saved(tmp_path / "data", rows), tmp_path / "out", min_pair_similarity=0.35))
    page = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "\u202e" not in page
    captions = [row[1] for row in table_rows(tmp_path / "out")]
    assert {"<script>alert(1)</script>", "हिन्दी में", "a b c", "[x](http://y) | `code`"} <= set(captions)


@pytest.mark.slow
def test_without_similarities(tmp_path):
    dataset = saved(tmp_path / "data", scored=False)
    report = select(SelectArguments(dataset, tmp_path / "out", caption_strategy="all"))
    assert report.rows == 8
    assert "<code>python -m captions.score</code>" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out" / "report").iterdir()) == ["index.html", "selection.json"]
    with pytest.raises(ValueError, match="similarities-pt"):
        select(SelectArguments(dataset, tmp_path / "x", caption_strategy="rank"))


@pytest.mark.slow
def test_several_tasks_write_the_same_report(scored, tmp_path):
    flags = {"caption_strategy": "rank", "min_pair_similarity": 0.2, "rows_per_part": 2}
    select(SelectArguments(scored, tmp_path / "one", **flags))
    args = SelectArguments(scored, tmp_path / "three", **flags)
    for rank in (2, 0, 1):
        args.write_rows(rank, 3)
    args.report()
    for path in (tmp_path / "one" / "report").iterdir():
        assert (tmp_path / "three" / "report" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_the_command_and_invalid_flags(scored, tmp_path, capsys):
    flags = ["--dataset", scored, "--output", str(tmp_path / "out"), "--min_pair_similarity", "0.2"]
    main(flags)
    output_text = capsys.readouterr().out
    assert "3 rows written, 6 skipped" in output_text and "report/index.html" in output_text
    for more, message in (
        (["--min_pair_similarity", "2"], r"min_pair_similarity.*\b2\b"),
        (["--caption_count", "0"], r"caption_count.*\b0\b"),
        (["--split", "nada"], r"'nada'.*'train'"),
        (["--language", "xh"], "similarities-xh"),
        (["--min_pair_similarity", "0.3"], r"settings\.min_pair_similarity: 0\.2 .*0\.3"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*flags, *more])


def test_errors_of_sbatch_are_reported(scored, tmp_path, monkeypatch):
    flags = ["--dataset", scored, "--output", str(tmp_path / "out"), "--executor", "slurm", "--tasks", "2"]
    flags += ["--partition", "gpu", "--time", "1"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch"):
        main(flags)
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match=r"select: rows.*--partition"):
        main(flags)
