"""Captions from a bank: the most similar sentences, with the model's cosine similarity."""

import csv
import io

import pytest
from datasets import load_from_disk
from PIL import Image

from examples import caption
from modeling_capivara.two_towers import embed_images, embed_texts


def printed_rows(capsys) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_test_images_get_captions_of_the_train_split(
    tiny_folder, tiny_dataset_folder, tiny_model, tiny_processor, capsys
):
    """The best caption comes first, with the model's cosine similarity."""
    caption.main(["--model", str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--top_k", "2"])
    rows, data = printed_rows(capsys), load_from_disk(tiny_dataset_folder)
    assert [row["picture"] for row in rows] == [f"test/{number // 2}" for number in range(16)]
    bank = list(dict.fromkeys(text for texts in data["train"]["captions-pt"] for text in texts))
    images = embed_images(tiny_model, tiny_processor, data["test"]["image"])
    best = (images @ embed_texts(tiny_model, tiny_processor, bank).T).topk(2)
    assert [row["caption"] for row in rows] == [bank[index] for index in best.indices.flatten()]
    assert [float(row["score"]) for row in rows] == pytest.approx(best.values.flatten().tolist(), abs=1e-4)


def test_a_folder_of_images_with_a_bank_file(tiny_folder, tmp_path, capsys):
    """A bank written on Windows works, unreadable images are named, and control characters are not printed."""
    (tmp_path / "fotos" / "praia").mkdir(parents=True)
    for number, name in enumerate(["a\x1b[31m.png", "praia/b, c.png"]):
        Image.new("RGB", (40, 30), (90 * number, 0, 200)).save(tmp_path / "fotos" / name)
    (tmp_path / "fotos" / "broken.jpg").write_bytes(b"not an image")
    bank = "\ufeffum céu azul\r\n\r\num \x1b]0;gato\x07\r\num céu azul\r\n  a casa  "
    (tmp_path / "frases.txt").write_bytes(bank.encode())
    flags = ["--model", str(tiny_folder), "--pictures", str(tmp_path / "fotos"), "--bank", str(tmp_path / "frases.txt")]
    caption.main(flags)
    output = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out)))
    assert [row["picture"][-5:] for row in rows] == ["m.png"] * 3 + ["c.png"] * 3 and "broken.jpg" in output.err
    assert {row["caption"] for row in rows} >= {"um céu azul", "a casa"} and "\x1b" not in output.out + output.err
