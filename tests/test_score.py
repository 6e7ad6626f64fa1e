"""Similarities of images and captions: in the order of the captions, with each caption and image embedded once."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caption_tars import PICTURES, rows_of, saved_train
from datasets import Image

from capivara_common.image_files import decode_image
from caption_data.parquet_split import open_in_place
from caption_data.rows import CAPTIONS_FEATURE, SIMILARITIES_FEATURE
from captions.score import ScoreArguments, main
from captions.stages import read_stage_record
from modeling_capivara import two_towers
from modeling_capivara.two_towers import load_embedder

LONG = "uma foto de " + "gato " * 2000  # 10,000 characters
ROWS = [
    (PICTURES[0], ["uma foto de um gato", "um cachorro azul"], ["casa", "uma foto de um gato"]),
    (PICTURES[1], ["uma foto de um gato"], []),
    (PICTURES[2], [LONG, ""], [" ", "carro"]),
    (b"no image", ["um carro"], []),
    (PICTURES[4], ["", " "], []),
    (PICTURES[5], [], ["água"]),
]


def saved(folder, rows=ROWS, names=("captions-pt", "generated-captions-pt")):
    return saved_train(
        folder, {"image": Image(), names[0]: CAPTIONS_FEATURE, names[1]: CAPTIONS_FEATURE}, *zip(*rows, strict=True)
    )


@pytest.fixture
def arguments(tmp_path, tiny_folder):
    return ScoreArguments(
        saved(tmp_path / "data"), tmp_path / "out", model=str(tiny_folder), device="cpu", batch_rows=4
    )


def test_similarities_follow_the_order_of_original_and_generated_captions(arguments):
    report = arguments.write_rows()
    assert (report.rows, report.skipped) == (4, {"unreadable image": 1, "no caption": 1})
    embedder = load_embedder(arguments.model, "cpu")
    rows = rows_of(arguments.output)
    assert [row["captions-pt"] for row in rows] == [ROWS[i][1] for i in (0, 1, 2, 5)], "captions stay as they were"
    for row in rows:
        texts = [*row["captions-pt"], *row["generated-captions-pt"]]
        assert len(row["similarities-pt"]) == len(texts)
        image = embedder.embed_images([decode_image(row["image"])])
        for text, similarity in zip(texts, row["similarities-pt"], strict=True):
            if text.strip():
                torch.testing.assert_close(
                    similarity, (embedder.embed_texts([text]) @ image[0]).item(), rtol=1e-4, atol=1e-5
                )
            else:
                assert similarity is None
    first = rows[0]["similarities-pt"]
    assert first[0] == first[3] and len(set(first)) == 3, "otherwise the order would not matter"
    source = open_in_place(str(arguments.output), "train", "image")
    assert source.features["similarities-pt"] == SIMILARITIES_FEATURE


def test_damage_in_the_first_rows_is_reported_before_the_model_is_loaded(arguments, tmp_path):
    path = tmp_path / "rot" / "train-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [PICTURES[0]], "captions-pt": [["uma foto"]]}), path, use_dictionary=False)
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    path.write_bytes(path.read_bytes()[:start] + b"\xff" * 40 + path.read_bytes()[start + 40 :])
    with pytest.raises(ValueError, match=r"train-0\.parquet"):
        replace(arguments, dataset=str(path.parent), model="no/such").write_rows()


def test_an_image_that_the_model_refuses_is_left_out(arguments, monkeypatch):
    embed = two_towers.embed_images

    def refuses(model, processor, images, *args, **options):
        if any(image.size == (9, 12) and image.format == "PNG" for image in images):
            raise ValueError("no such picture")
        return embed(model, processor, images, *args, **options)

    monkeypatch.setattr("modeling_capivara.two_towers.embed_images", refuses)
    report = arguments.write_rows()
    assert report.rows == 2 and report.skipped == {"unreadable image": 3, "no caption": 1}
    assert [row["image"]["bytes"] for row in rows_of(arguments.output)] == [PICTURES[0], PICTURES[2]], "the JPEGs stay"


@pytest.mark.slow
def test_another_model_needs_another_output_folder(arguments, tiny_model):
    arguments.write_rows()
    assert read_stage_record(arguments.output)["settings"]["model"] == arguments.model
    with torch.no_grad():
        tiny_model.text_projection[0].weight.mul_(1.5)
    tiny_model.save_pretrained(arguments.model)
    assert arguments.write_rows().rows == 4, "what is done is not done again"
    next(arguments.output.glob("*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"settings\.fingerprint"):
        arguments.write_rows()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--language", "xh"], r"captions-xh.*generated-captions-xh.*\['image'"),
        (["--model", ""], r"--model"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "no/such/folder", "--dry_run"], "no/such/folder"),
        (["--image_column", "picture"], "'picture'"),
    ],
)
def test_invalid_flags_are_refused(tmp_path, tiny_folder, flags, message, capsys):
    required = ["--dataset", saved(tmp_path / "data"), "--output", str(tmp_path / "out"), "--model", str(tiny_folder)]
    with pytest.raises(ValueError, match=message):
        main([*required, "--device", "cpu", *flags])
    assert not list(tmp_path.glob("out/*.parquet"))
