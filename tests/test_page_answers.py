"""The page's pictures, index and answers, without the page: what is kept, found, refused and said."""

import io
import json
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import made_space
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from capivara_search.common.privacy import short_name
from eval import embeddings
from hub_upload.space import index as index_module
from hub_upload.space.answers import MAX_LABELS, MAX_UPLOAD_BYTES, Demo
from hub_upload.space.collection import open_pictures
from hub_upload.space.index import build_index, is_album, open_album, read_album, thumbnail_file
from hub_upload.space.page import decimal, thousands
from modeling_capivara.embedder import CapivaraEmbedder

ATTACK = "<img src=x onerror=alert(1)>\"'${alert(1)}"


@pytest.fixture
def embedder(tiny_model, tiny_processor):
    return CapivaraEmbedder("tiny", tiny_model, tiny_processor, "float32")


@pytest.fixture
def folder(tmp_path):
    """A plain folder of thirteen pictures, of which three can't be read."""
    generator = np.random.default_rng(0)
    made = tmp_path / "fotos"
    (made / "férias").mkdir(parents=True)
    for i in range(10):
        pixels = (generator.random((40, 48, 3)) * 80 + generator.random(3) * 170).astype(np.uint8)
        Image.fromarray(pixels).save(made / ("férias" if i % 2 else ".") / f"foto {i:02d}.PNG")
    (made / "a_cortada.png").write_bytes((made / "foto 00.PNG").read_bytes()[:200])
    (made / "b_texto.jpg").write_text("não sou imagem", encoding="utf-8")
    (made / "c_bomba.png").write_bytes(bomb())
    return made


@pytest.fixture
def demo(embedder, folder, tmp_path):
    return Demo([build_index(open_album(open_pictures(str(folder)), tmp_path / "cache"), embedder, tmp_path / "cache")])


def bomb() -> bytes:
    """A PNG file of 29,000 x 29,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 29_000, 29_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def embedded_pictures(embedder, monkeypatch) -> list[int]:
    """Sizes of the batches of pictures that go through the model from now on."""
    seen, embed = [], CapivaraEmbedder.images

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return embed(self, images, *args, **kwargs)

    monkeypatch.setattr(CapivaraEmbedder, "images", counted)
    return seen


class Shown(HTMLParser):
    """Tags, and texts of an answer."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_a_plain_folder(folder, tmp_path):
    outside = tmp_path / "fora.png"
    shutil.copy(folder / "foto 00.PNG", outside)
    (folder / "liga.png").symlink_to(outside)
    (folder / ".oculta.png").write_bytes(outside.read_bytes())
    (folder / "notas.txt").write_text("nada", encoding="utf-8")
    pictures = open_pictures(str(folder))
    assert len(pictures) == 13 and sorted(pictures.titles)[-1] == "foto 09"
    assert not [title for title in pictures.titles if title in ("liga", ".oculta", "notas")]
    assert pictures.credit.name == "fotos" and not any(pictures.captions)


def test_a_data_set_of_several_splits(tmp_path):
    made_space.save_dataset(tmp_path / "d", "pretty_name: Áreas\nlicense: cc-by-sa-4.0\nattribution: feitas aqui\n")
    pictures = open_pictures(str(tmp_path / "d"))
    assert [captions[0] for captions in pictures.captions] == made_space.CAPTIONS
    assert (pictures.credit.name, pictures.credit.licence) == ("Áreas", "cc-by-sa-4.0")
    assert [len(open_pictures(str(tmp_path / "d"), [split])) for split in ("train", "test")] == [20, 10]
    first_of_test = open_pictures(str(tmp_path / "d"), ["test"]).row_image(0)["bytes"]
    assert pictures.row_image(20)["bytes"] == first_of_test != pictures.row_image(19)["bytes"]


def test_a_folder_with_metadata_and_a_plain_caption_column(tmp_path):
    (tmp_path / "validation").mkdir()
    for i, picture in enumerate(made_space.made_pictures()[:3]):
        picture.save(tmp_path / "validation" / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "caption": ["um", " ", None][i]} for i in range(3)]
    (tmp_path / "validation" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    pictures = open_pictures(str(tmp_path))
    assert pictures.captions == [["um"], [], []] and pictures.titles == ["0", "1", "2"]
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")  # no YAML
    assert open_pictures(str(tmp_path)).credit.licence == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": ["tests"]}, "no split 'tests'"),
        ({"caption_column": "captions-xx"}, "no column 'captions-xx'"),
        ({"image_column": "foto"}, "no column 'foto'"),
    ],
)
def test_what_a_data_set_lacks(tiny_dataset_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_pictures(str(tiny_dataset_folder), **arguments)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        open_pictures(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        open_pictures(str(tmp_path / "missing" / "folder"))


# --- Index -----------------------------------------------------------------------------------------------------------


def test_index_is_built_once_and_kept(embedder, folder, tmp_path, monkeypatch):
    cache, seen = tmp_path / "cache", embedded_pictures(embedder, monkeypatch)
    first = build_index(open_album(open_pictures(str(folder)), cache), embedder, cache)
    assert sum(seen) == 10
    written = {path: path.stat().st_mtime_ns for path in first.album.folder.iterdir()}
    seen.clear()
    again = build_index(open_album(open_pictures(str(folder)), cache), embedder, cache)
    kept = build_index(read_album(first.album.folder), embedder, cache)  # which has no pictures
    assert not seen and {path: path.stat().st_mtime_ns for path in first.album.folder.iterdir()} == written
    for index in (again, kept):
        assert torch.equal(index.image_embeds, first.image_embeds) and index.album.skipped == first.album.skipped
        assert index.album.thumbnail(5) == first.album.thumbnail(5)
    assert is_album(first.album.folder) and not is_album(folder)


def test_another_picture_or_caption_is_another_index(embedder, folder, tmp_path):
    first = open_album(open_pictures(str(folder)), tmp_path / "cache")
    Image.new("RGB", (40, 40), "red").save(folder / "foto 00.PNG")
    changed = open_album(open_pictures(str(folder)), tmp_path / "cache")
    (folder / "foto 00.PNG").rename(folder / "outro 00.PNG")
    renamed = open_album(open_pictures(str(folder)), tmp_path / "cache")
    assert len({album.folder for album in (first, changed, renamed)}) == 3


def test_an_interrupted_build_goes_on(embedder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "ROWS_PER_SHARD", 4)
    monkeypatch.setattr(embeddings, "IMAGES_PER_SHARD", 4)
    cache, read = tmp_path / "cache", []
    whole = build_index(open_album(open_pictures(str(folder)), tmp_path / "other"), embedder, tmp_path / "other")
    make, pictures = thumbnail_file, open_pictures(str(folder))

    def stops_at_sixth(image):
        read.append(image)
        if len(read) == 6:
            raise KeyboardInterrupt
        return make(image)

    monkeypatch.setattr(index_module, "thumbnail_file", stops_at_sixth)
    with pytest.raises(KeyboardInterrupt):
        open_album(pictures, cache)
    album = open_album(pictures, cache)
    assert len(read) < 6 + 10, "the first shard was made again"
    seen = embedded_pictures(embedder, monkeypatch)
    counted = CapivaraEmbedder.images

    def stops_at_third(self, images, *args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return counted(self, images, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CapivaraEmbedder, "images", stops_at_third)
        with pytest.raises(KeyboardInterrupt):
            build_index(album, embedder, cache)
    before = sum(seen)
    index = build_index(album, embedder, cache)
    assert 0 < before < 10 and sum(seen) == 10, "what was embedded before the interruption was embedded again"
    assert torch.equal(index.image_embeds, whole.image_embeds)
    assert [index.album.thumbnail(row) for row in range(13)] == [whole.album.thumbnail(row) for row in range(13)]


def test_broken_pictures_are_counted_and_listed(demo, folder, tmp_path):
    skipped = demo.album.skipped
    assert sorted(skipped) == [0, 1, 2] and demo.indexes[0].rows.tolist() == list(range(3, 13))
    assert "a_cortada.png" in skipped[0] and "b_texto.jpg" in skipped[1] and "absurd image size" in skipped[2]
    kept = (demo.album.folder / "index.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in kept and json.loads(kept)["skipped"] == {str(row): why for row, why in skipped.items()}
    assert demo.album.thumbnail(1) == b"" and demo.album.thumbnail(3)


def test_no_picture_can_be_read(embedder, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(b"nada")
    with pytest.raises(ValueError, match="None of the 1 images can be read"):
        build_index(open_album(open_pictures(str(tmp_path / "f")), tmp_path / "c"), embedder, tmp_path / "c")


def test_a_kept_index_knows_its_models_and_version(demo, embedder, tmp_path):
    other = CapivaraEmbedder("other", embedder.model, embedder.processor, "bf16")
    with pytest.raises(ValueError, match="was not built with the model other"):
        build_index(read_album(demo.album.folder), other, tmp_path / "cache")
    about = json.loads((demo.album.folder / "index.json").read_text(encoding="utf-8"))
    (demo.album.folder / "index.json").write_text(json.dumps({**about, "version": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="of version 0"):
        read_album(demo.album.folder)


def test_search_is_that_of_a_plain_computation(demo):
    index = demo.indexes[0]
    query = index.embed_text("um gato azul")
    stored = load_file(next(index.album.folder.glob("embeddings-*.safetensors")))
    scores = stored["images"].double().numpy() @ query.double().numpy()
    expected = sorted(range(len(scores)), key=lambda place: -scores[place])
    hits = index.search(query, 7)
    assert [hit.row for hit in hits] == [int(stored["rows"][place]) for place in expected[:7]]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(scores, reverse=True)[:7], atol=1e-6)
    assert len(index.search(query, 1000)) == 10
    picture = Image.open(index.album.images.row_image(5)["path"])
    assert index.search(index.embed_image(picture), 1)[0].row == 5


def test_equal_scores_keep_the_order_of_the_rows(demo):
    index = demo.indexes[0]
    equal = type(index)(index.album, index.embedder, index.rows, index.image_embeds[:1].repeat(10, 1), index.rows[:0])
    assert [hit.row for hit in equal.search(index.image_embeds[0], 10)] == list(range(3, 13))


def test_shares_are_the_models_own(demo, tiny_model, tiny_processor):
    index, image = demo.indexes[0], made_space.made_pictures()[3]
    prompts = ["uma foto azul", "um gato", "o pão"]
    inputs = tiny_processor(text=prompts, images=[image], return_tensors="pt")
    with torch.inference_mode():
        expected = tiny_model(**inputs).logits_per_image.softmax(dim=1)[0]
        torch.testing.assert_close(index.classify(index.embed_image(image), prompts), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_thumbnails_of_every_mode(mode):
    image = Image.new("RGB", (600, 300), (200, 30, 30))
    image = Image.new(mode, image.size) if mode == "I;16" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    thumbnail = Image.open(io.BytesIO(thumbnail_file(image)))
    assert thumbnail.format == "WEBP" and thumbnail.size == (256, 128)
    if mode == "RGBA":
        assert min(thumbnail.convert("L").getextrema()) > 250, "what is transparent is white"


# --- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_captions_and_two_models(embedder, tmp_path):
    made_space.save_dataset(tmp_path / "d")
    album = open_album(open_pictures(str(tmp_path / "d")), tmp_path / "cache")
    other = CapivaraEmbedder("segundo", embedder.model, embedder.processor, "bf16")
    demo = Demo([build_index(album, e, tmp_path / "cache") for e in (embedder, other)])
    assert len({path.name for path in album.folder.glob("embeddings-*")}) == 2
    upload = thumbnail_file(made_space.made_pictures()[4])
    shown = Shown(demo.similar_captions(upload, 6))
    assert shown.tags.count("h3") == 2 and shown.tags.count("li") == 12 and "segundo" in shown.texts
    query = demo.indexes[0].embed_image(made_space.made_pictures()[4])
    best = demo.indexes[0].similar_captions(query, 6)
    assert [text for text, _ in best] == sorted(
        made_space.CAPTIONS, key=lambda text: -float(demo.indexes[0].embed_text(text) @ query)
    )[:6]
    assert Shown(demo.search_by_text("azul", 4)).tags.count("img") == 8
    assert Shown(demo.search_by_image(upload, 4)).tags.count("img") == 8


@pytest.mark.parametrize("text", ["", "   ", None, "\n\t", "&#32;"])
def test_an_empty_question(demo, text):
    answer = demo.search_by_text(text, 12)
    assert 'role="alert"' in answer and ("Escreva o que você procura" in answer) and "<img" not in answer


def test_a_long_text_is_cut_and_said_so(demo, embedder):
    sentence = "um gato azul e uma casa verde "
    answer, short = demo.search_by_text(sentence * 40_000, 3), demo.search_by_text(sentence, 3)
    assert "só os primeiros 77 tokens" in answer and answer.count("<img") == 3
    assert "77 tokens" not in short
    fits = "a " * 75  # and begin and end
    assert "77 tokens" not in demo.search_by_text(fits, 3) and "77 tokens" in demo.search_by_text(fits + "a", 3)
    beginning = embedder.texts([sentence * 40])[0]
    assert [hit.row for hit in demo.indexes[0].search(beginning, 3)] == [
        hit.row for hit in demo.indexes[0].search(embedder.texts([sentence * 400])[0], 3)
    ]


@pytest.mark.parametrize(
    ("upload", "said"),
    [
        (None, "Envie uma imagem"),
        (b"", "Envie uma imagem"),
        (b"isto nao e uma imagem", "Não foi possível ler"),
        (bytes(MAX_UPLOAD_BYTES + 1), "o limite é de 20 MB"),
        (bomb(), "pixels demais"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Não foi possível ler"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "Não foi possível ler"),
    ],
)
def test_uploads_that_are_refused(demo, upload, said):
    for answer in (
        demo.search_by_image(upload, 3),
        demo.similar_captions(upload, 3),
        demo.classify(upload, "gato\ncasa", "uma foto de {}"),
    ):
        assert said in answer and 'role="alert"' in answer and "<img" not in answer


@pytest.mark.parametrize(
    ("labels", "template", "said"),
    [
        ("", "uma foto de {}", "pelo menos dois"),
        ("gato, gato", "uma foto de {}", "pelo menos dois"),
        ("\n".join(f"casa {i}" for i in range(MAX_LABELS + 1)), "{}", "O limite é de 50"),
        ("gato\ncasa", "uma foto", "precisa ter {}"),
        ("gato\ncasa", "{} e {}", "precisa ter {}"),
    ],
)
def test_labels_that_are_refused(demo, labels, template, said):
    assert said in demo.classify(thumbnail_file(made_space.made_pictures()[0]), labels, template)


def test_labels_of_ones_own(demo):
    shown = Shown(demo.classify(thumbnail_file(made_space.made_pictures()[0]), "gato, casa; céu\ngato\n\n", ""))
    assert shown.tags.count("li") == 3
    shares = [float(text.removesuffix(" %").replace(",", ".")) for text in shown.texts if text.endswith(" %")]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)


def test_text_of_visitors_and_data_is_text(embedder, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for i, picture in enumerate(made_space.made_pictures()[:2]):
        picture.save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "caption": f"{ATTACK} {i}"} for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    index = build_index(open_album(open_pictures(str(folder)), tmp_path / "c"), embedder, tmp_path / "c")
    demo, upload = Demo([index]), thumbnail_file(made_space.made_pictures()[0])
    for answer in (
        demo.search_by_text(ATTACK, 2),
        demo.similar_captions(upload, 2),
        demo.classify(upload, f"{ATTACK}\ngato", "{}"),
    ):
        shown = Shown(answer)
        assert "onerror" not in shown.attributes and not set(shown.tags) & {"script", "iframe"}
        assert all("data:image/webp" in part for part in answer.split("<img ")[1:])


def test_a_random_picture_is_one_of_the_collection(demo):
    assert demo.random_picture().size == (48, 40)
    assert demo.search_by_image(thumbnail_file(demo.random_picture()), 1).count("<img") == 1


def test_a_models_name_is_none_of_a_person(tmp_path, monkeypatch):
    home = tmp_path / "home" / "ana"
    (home / "runs" / "mine").mkdir(parents=True)
    assert short_name(str(home / "runs" / "mine")) == "mine"
    monkeypatch.setattr(Path, "home", lambda: home / "runs")
    assert short_name(str(home / "runs" / "mine")) == "mine"
    monkeypatch.chdir(home / "runs")
    assert (short_name("mine"), short_name("org/model")) == ("mine", "org/model")


def test_numbers_are_written_as_in_portuguese():
    assert decimal(-0.0314) == "−0,031" and decimal(25.26, 1) == "25,3" and thousands(1_234_567) == "1.234.567"
