"""Every kind of model keeps its digests, embeddings and exports. What is special about a kind is in one table."""

import ast
import hashlib
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sampling import one_in
from test_layout import sources, tree
from test_text_tower import change
from towers import LETTERS, MAKERS, dual_encoder, gemma_like, other_texts, siglip2
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, VisionTextDualEncoderModel

from capivara_common.hub_cache import is_complete_model
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.model_kinds import ADDING_PAGE, KINDS, ModelKind, find_kind
from capivara_search.index import PictureIndex
from capivara_search.models import find_model
from hub_upload.export import export_model
from hub_upload.formats import onnx
from modeling_capivara.loading import load_processor
from modeling_capivara.trim_vocabulary import trim
from modeling_capivara.two_towers import load_embedder, random_images

GOLDEN = Path(__file__).parent / "golden" / "kinds.json"
TEXTS = ["uma foto de um gato", "pão", "A Casa VERDE, são joão"]
WORDS = ["de que", "uma para o a"]  # among the most frequent
FROZEN = ("siglip", "clip", "chinese_clip", "altclip", "metaclip_2")
REPOSITORY_FORMATS = ["transformers", "open_clip", "sentence_transformers", "transformers_js"]


@pytest.fixture
def make_kind(saved_tiny_folder, tmp_path):
    """Function that returns a folder with a toy model of a kind."""

    def make(kind: str) -> Path:
        if kind == "capivara":
            return saved_tiny_folder
        folder = tmp_path / kind
        siglip2(folder, gemma_like(TEXTS * 3, 400)) if kind == "siglip2" else MAKERS[kind](folder)
        return folder

    return make


def compute_embeddings(folder: Path) -> dict[str, Any]:
    """Return what a model computes: the digest of its image encoder, and embeddings of texts and of random images."""
    embedder = load_embedder(str(folder), "cpu")
    images = [image.convert("RGB") for image in random_images()[:2]]
    rounded = {"texts": embedder.embed_texts(TEXTS), "images": embedder.embed_images(images)}
    embeds = {name: [[round(number, 6) for number in row] for row in rows.tolist()] for name, rows in rounded.items()}
    return {"image_digest": image_encoder_digest(folder), **embeds}


def compute_exports(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return the files of all exports of a model, with a digest of the tensors in each weight file; null if refused.

    ONNX graphs have no digest, and writing them takes minutes, so only empty files with their names are written.
    """
    other = other_texts(folder, scratch / "other")
    exports = {"repository": (folder, REPOSITORY_FORMATS, None), "immich": (folder, ["immich"], None)}
    exports["drop_in"] = other, ["drop_in"], str(folder)
    outputs = {}
    for name, (model, formats, base) in exports.items():
        try:
            files = export_model(model, scratch / name, formats, base=base)
        except ValueError:
            outputs[name] = None
            continue
        outputs[name] = {file: digest_tensors(scratch / name / file) for file, _ in files}
    return outputs


def write_empty_graphs(folder, source=None, graphs=onnx.TOWER_GRAPHS, precisions=("float32", "int8")) -> None:
    """Stand in for `onnx.write_onnx`."""
    (folder / "onnx").mkdir()
    for name in (f"{graph}{onnx.PRECISION_SUFFIXES[precision]}" for graph in graphs for precision in precisions):
        for ending in ("onnx", "onnx_data"):
            (folder / "onnx" / f"{name}.{ending}").touch()
    (folder / "onnx" / "quantisation.json").write_text('{"graphs": {}}')


def digest_tensors(path: Path) -> str | None:
    """Return a digest of the names, shapes and numbers in a safetensors file; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    digest = hashlib.blake2b(digest_size=16)
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["capivara", "siglip2", *FROZEN])
def test_digest_and_embeddings_are_unchanged(kind, make_kind):
    expected, actual = json.loads(GOLDEN.read_text())[kind], compute_embeddings(make_kind(kind))
    assert actual["image_digest"] == expected["image_digest"]
    for name in ("texts", "images"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capivara", "siglip2", *FROZEN])
def test_exports_are_unchanged(kind, make_kind, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "write_onnx", write_empty_graphs)
    assert compute_exports(make_kind(kind), tmp_path) == json.loads(GOLDEN.read_text())[kind]["exports"]


# --- The table -------------------------------------------------------------------------------------------------------

TABLE = Path("capivara_common/model_kinds.py")
AMBIGUOUS = {"capivara", "clip"}  # also the name of this project, tags of cards and values of flags


def find_dispatches(path: Path) -> list[str]:
    """Return the expressions of a file that name a model type, or decide by the start of a class name."""
    prefixes = tuple({kind.class_name.removesuffix("Model") for kind in KINDS.values()})
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and node.value in KINDS.keys() - AMBIGUOUS:
            found.append(repr(node.value))
        if not isinstance(node, ast.Compare | ast.Subscript | ast.Match | ast.Call):
            continue
        constants = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)]
        is_prefix_test = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "startswith"
        if is_prefix_test and any(str(value).startswith(prefixes) for value in constants):
            found.append(ast.unparse(node))
        elif not isinstance(node, ast.Call) and AMBIGUOUS.intersection(constants):
            found += [ast.unparse(node)] * ("model_type" in ast.unparse(node))
    return found


def test_no_file_but_the_table_distinguishes_kinds():
    """The files that travel with a model can't import the table."""
    files = [path for path in sources().values() if path != TABLE and not path.name.endswith("_capivara.py")]
    assert len(files) > 80 and len(find_dispatches(TABLE)) == len(KINDS.keys() - AMBIGUOUS)
    found = {path.as_posix(): find_dispatches(path) for path in files}
    assert not {path: expressions for path, expressions in found.items() if expressions}


class ToyConfig(CLIPConfig):
    model_type = "toy_clip"


class ToyModel(CLIPModel):
    config_class = ToyConfig


def test_a_kind_that_is_built_like_clip_takes_one_entry(tmp_path, monkeypatch):
    """It can be loaded, embedded, digested, indexed, searched and exported."""
    MAKERS["clip"](tmp_path / "clip")
    toy = shutil.copytree(tmp_path / "clip", tmp_path / "toy")
    change(toy / "config.json", model_type="toy_clip")
    AutoConfig.register("toy_clip", ToyConfig)
    AutoModel.register(ToyConfig, ToyModel)
    with pytest.raises(ValueError, match=f"^[^\n]*'toy_clip'[^\n]*{ADDING_PAGE}[^\n]*$"):
        find_model(str(toy))

    monkeypatch.setitem(KINDS, "toy_clip", ModelKind(model_type="toy_clip", title="Toy", class_name="ToyModel"))

    embedder, original = (load_embedder(str(folder), "cpu") for folder in (toy, tmp_path / "clip"))
    assert embedder.metadata["model_class"] == "ToyModel"
    assert torch.equal(embedder.embed_texts(TEXTS), original.embed_texts(TEXTS))
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "blue.png")
    index = PictureIndex.open(tmp_path / "toy.lance", model=str(toy))
    assert index.add(tmp_path).embedded == 1 and len(index.search("um gato", k=3)) == 1
    assert index.model.image_digest == image_encoder_digest(toy) != image_encoder_digest(tmp_path / "clip")
    files = export_model(toy, tmp_path / "exported", ["transformers"])
    assert "model.safetensors" in dict(files) and is_complete_model(tmp_path / "exported")


# --- VisionTextDualEncoder -------------------------------------------------------------------------------------------

DUAL = KINDS["vision-text-dual-encoder"]


@pytest.mark.parametrize(("vision", "text"), one_in(5, [*product(DUAL.vision_towers, DUAL.text_towers)]))
def test_any_two_towers_embed_as_transformers_does(vision, text, tmp_path):
    dual_encoder(tmp_path / "model", vision, text)
    embedder, found = load_embedder(str(tmp_path / "model"), "cpu"), find_model(str(tmp_path / "model"), device="cpu")
    images = [image.convert("RGB") for image in random_images()[:2]]
    processor, model = load_processor(tmp_path / "model"), AutoModel.from_pretrained(tmp_path / "model").eval()
    assert type(model) is VisionTextDualEncoderModel and found.image_size == 32
    with torch.no_grad():
        expected = model(**processor(text=TEXTS, images=images, padding=True, return_tensors="pt"))
    for actual, name in ((embedder.embed_texts(TEXTS), "text_embeds"), (embedder.embed_images(images), "image_embeds")):
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.embed_texts(TEXTS), expected.text_embeds, rtol=0, atol=1e-5)
    assert found.embed_images(images).shape == (2, found.width)


@pytest.mark.slow
def test_a_dual_encoder_is_exported_and_its_export_searches_the_index_of_the_model(tmp_path):
    dual_encoder(tmp_path / "model", "dinov2", "xlm-roberta")
    export_model(tmp_path / "model", tmp_path / "exported", ["transformers", "sentence_transformers"])
    original, exported = (compute_embeddings(tmp_path / name) for name in ("model", "exported"))
    assert original == exported
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "blue.png")
    assert PictureIndex.open(tmp_path / "i.lance", model=str(tmp_path / "model")).add(tmp_path).embedded == 1
    assert len(PictureIndex.open(tmp_path / "i.lance", model=str(tmp_path / "exported")).search("um gato", k=3)) == 1


@pytest.mark.slow
def test_a_model_whose_files_have_other_names_than_its_weights_can_be_trimmed(tmp_path):
    """transformers renames weights of ViT when it loads and saves them."""
    dual_encoder(tmp_path / "model", "vit", "xlm-roberta")
    trim(tmp_path / "model", tmp_path / "small", ["pt"], words=[50])
    processors = [load_processor(tmp_path / name) for name in ("model", "small")]
    assert len(processors[1].tokenizer) < len(processors[0].tokenizer)
    expected, actual = (load_embedder(str(tmp_path / name), "cpu").embed_texts(WORDS) for name in ("model", "small"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# --- Bad input -------------------------------------------------------------------------------------------------------


def without_mask(folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_input_names=["input_ids"])


def too_many_tokens(folder: Path) -> None:
    processor = load_processor(folder)
    processor.tokenizer.add_tokens([f"<{letter}{number}>" for letter in LETTERS for number in range(20)])
    processor.save_pretrained(folder)


def processor_of(kind: str) -> Any:
    def replace(folder: Path) -> None:
        MAKERS[kind](folder.parent / "other")
        load_processor(folder.parent / "other").save_pretrained(folder)

    return replace


def in_config(section: str, **fields: Any) -> Any:
    def replace(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        change(folder / "config.json", **{section: settings[section] | fields})

    return replace


FAULTS = {  # name -> (kind, change of the folder, words of the message)
    "no mask": ("clip", without_mask, "attention mask"),
    "no mask of a dual encoder": ("dual_encoder", without_mask, "attention mask"),
    "vocabulary": ("chinese_clip", too_many_tokens, "id .* has 57 tokens"),
    "vocabulary of a dual encoder": ("dual_encoder", too_many_tokens, "id .* has 57 tokens"),
    "widths": ("siglip", in_config("text_config", projection_size=16), "projection_size is 16 .*hidden_size is 32"),
    "processor": ("clip", processor_of("siglip"), "SiglipProcessor.*clip"),
    "processor of CLIP": ("siglip", processor_of("clip"), "CLIPProcessor.*siglip"),
    "ModernBERT": ("dual_encoder", in_config("text_config", model_type="modernbert"), "'modernbert'.*bert, roberta"),
    "image tower": ("dual_encoder", in_config("vision_config", model_type="swin"), "'swin'.*vit, clip_vision_model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_whose_parts_do_not_fit_is_refused_in_one_line_before_anything_is_embedded(fault, tmp_path):
    kind, damage, message = FAULTS[fault]
    folder = tmp_path / "model"
    MAKERS[kind](folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_embedder(str(folder), "cpu")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "blue.png")
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        PictureIndex.open(tmp_path / "i.lance", model=str(folder)).add(tmp_path / "blue.png")


@pytest.mark.parametrize("config", [{}, {"model_type": "flava"}, {"model_type": "siglip2"}])
def test_an_unknown_kind_names_the_supported_kinds_and_the_page_on_adding_one(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=ADDING_PAGE) as caught:
        find_kind(config)
    assert all(model_type in str(caught.value) for model_type in KINDS) and "\n" not in str(caught.value)
    assert (Path(__file__).parents[1] / ADDING_PAGE).is_file()
    if config:
        with pytest.raises(ValueError, match=ADDING_PAGE):
            find_model(str(tmp_path))
