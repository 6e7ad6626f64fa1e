"""Captions out of a bank: the nearest sentences, with the model's own cosine."""

import csv
import io

import pytest
from datasets import load_from_disk
from PIL import Image

from examples import caption
from modeling_capivara.two_towers import embed_images, embed_texts


def printed(capsys) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_a_split_with_the_captions_of_another(tiny_folder, tiny_dataset_folder, tiny_model, tiny_processor, capsys):
    """The best first, with the cosine that the model gives."""
    caption.main(["--model", str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--top_k", "2"])
    rows, data = printed(capsys), load_from_disk(tiny_dataset_folder)
    assert [row["picture"] for row in rows] == [f"test/{number // 2}" for number in range(16)]
    bank = list(dict.fromkeys(text for texts in data["train"]["captions-pt"] for text in texts))
    images = embed_images(tiny_model, tiny_processor, data["test"]["image"])
    best = (images @ embed_texts(tiny_model, tiny_processor, bank).T).topk(2)
    assert [row["caption"] for row in rows] == [bank[place] for place in best.indices.flatten()]
    assert [float(row["score"]) for row in rows] == pytest.approx(best.values.flatten().tolist(), abs=1e-4)


def test_a_folder_with_a_bank(tiny_folder, tmp_path, capsys):
    """Out of Windows, too; what can't be read is named, and nothing that is printed steers the terminal."""
    (tmp_path / "fotos" / "praia").mkdir(parents=True)
    for number, name in enumerate(["a\x1b[31m.png", "praia/b, c.png"]):
        Image.new("RGB", (40, 30), (90 * number, 0, 200)).save(tmp_path / "fotos" / name)
    (tmp_path / "fotos" / "broken.jpg").write_bytes(b"no picture")
    bank = "\ufeffum céu azul\r\n\r\num \x1b]0;gato\x07\r\num céu azul\r\n  a casa  "
    (tmp_path / "frases.txt").write_bytes(bank.encode())
    words = ["--model", str(tiny_folder), "--pictures", str(tmp_path / "fotos"), "--bank", str(tmp_path / "frases.txt")]
    caption.main(words)
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [row["picture"][-5:] for row in rows] == ["m.png"] * 3 + ["c.png"] * 3 and "broken.jpg" in said.err
    assert {row["caption"] for row in rows} >= {"um céu azul", "a casa"} and "\x1b" not in said.out + said.err
