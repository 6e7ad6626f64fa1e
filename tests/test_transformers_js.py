"""transformers.js from npm loads an export in Node.js and Chromium, and computes the scores of the model."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import in_browser
import onnx
import pytest
import torch
from browser import require_chromium
from ftfy.fixes import uncurl_quotes
from in_browser import LABELS, NAME, TEMPLATE, compared, inputs_and_outputs, served
from test_drop_in import TYPED
from test_text_tower import AWKWARD, PLAIN
from test_tokenization_capivara import LONG
from tiny import TINY_VISION, randomize, tiny_config
from tokenizers import Tokenizer, normalizers
from transformers import AutoProcessor, pipeline

from hub_upload.export import export_model, main
from hub_upload.formats.transformers_js import convert_tokenizer_files_in_place
from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor, clean_text

pytestmark = pytest.mark.slow
VISION = {**TINY_VISION, "hidden_size": 128, "intermediate_size": 256, "image_size": 224, "patch_size": 32}
ENDS = ("", "_fp16", "_quantized")
# Precision -> largest allowed difference of a score (scores are up to 19 here), lowest allowed cosine of embeddings.
BOUNDS = {"fp32": (1e-3, 1 - 1e-6), "fp16": (0.02, 1 - 1e-5), "q8": (0.3, 0.999)}
PROBABILITIES = {"fp32": 1e-4, "fp16": 1e-3, "q8": 0.03}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_processor):
    """A small model for images of 224 x 224 pixels."""
    folder = tmp_path_factory.mktemp("source") / "model"
    randomize(CapivaraModel(tiny_config(vision_config=VISION))).save_pretrained(folder)
    CapivaraProcessor(CapivaraImageProcessor(), tiny_processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("js") / "repository"
    export_model(source, folder, ["transformers", "transformers_js"])
    return folder


@pytest.fixture(scope="module")
def packages():
    """The folder with npm's packages. Without Node.js, tests are skipped, or fail if CI_REQUIRES_NODE=1."""
    try:
        return in_browser.node_packages()
    except RuntimeError as error:
        end_test = pytest.fail if os.environ.get("CI_REQUIRES_NODE") == "1" else pytest.skip
        end_test(f"transformers.js can't run: {error}")


@pytest.fixture(scope="module")
def ask(repository, packages, tmp_path_factory) -> Callable[[str, str | None], dict]:
    """A function that runs transformers.js on photographs and on their centers (224 x 224), and caches the results."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in in_browser.save_photos(folder):
        center_crop(file).save(folder / f"224-{file.name}")
    names = [f"{part}{name}.png" for part in ("224-", "") for name in in_browser.PHOTOS]
    inputs = inputs_and_outputs(repository)[0]
    with served({NAME: repository}, packages, photos=folder) as address:

        @cache
        def ask_program(place: str, dtype: str | None) -> dict:
            if place == "chromium":
                require_chromium()
            pictures = [f"{address}photos/{name}" for name in names]
            request = in_browser.request(
                address, dtype=dtype, inputs=inputs, labels=LABELS, template=TEMPLATE, pictures=pictures
            )
            answer = in_browser.ask(place, request, packages)
            return answer | {"files": [folder / name for name in names]}

        yield ask_program


def center_crop(file: Path):
    """Return the center of a photograph, 224 x 224 pixels, which the model reads without resizing."""
    from PIL import Image

    photo = Image.open(file)
    left, top = (photo.width - 224) // 2, (photo.height - 224) // 2
    return photo.crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize(
    ("place", "dtype", "used_dtype"),
    [
        *(("node", None, "fp32"), ("node", "q8", "q8"), ("node", "fp16", "fp16")),
        *(("chromium", "fp32", "fp32"), ("chromium", None, "q8")),
    ],
)
def test_scores_are_close_to_those_of_the_model(repository, ask, place, dtype, used_dtype):
    answer = ask(place, dtype)
    assert answer["dtype"] == used_dtype
    distances, (difference, cosine) = compared(answer, inputs_and_outputs(repository)[1]), BOUNDS[used_dtype]
    assert distances["largest_score_difference"] < difference, distances
    assert min(distances["lowest_image_cosine"], distances["lowest_text_cosine"]) > cosine, distances
    # The probabilities of the pipeline, for images that need no resizing.
    files = [file for file in answer["files"] if file.name.startswith("224-")]
    classify = pipeline("zero-shot-image-classification", str(repository), trust_remote_code=True)
    ours = classify(list(map(str, files)), candidate_labels=LABELS, hypothesis_template=TEMPLATE)
    for mine, theirs in zip(ours, answer["classes"][: len(files)], strict=True):
        expected = {entry["label"]: entry["score"] for entry in mine}
        assert {entry["label"]: entry["score"] for entry in theirs} == pytest.approx(
            expected, abs=PROBABILITIES[used_dtype]
        )
    # The benchmark compares scores; the pipeline's probabilities must be their softmax.
    for logits, theirs in zip(answer["logits"], answer["classes"], strict=True):
        probabilities = torch.tensor(logits).softmax(dim=-1).tolist()
        expected = dict(zip(LABELS, probabilities, strict=True))
        assert {entry["label"]: entry["score"] for entry in theirs} == pytest.approx(expected, abs=1e-5)


def is_cleaned_in_javascript(text: str) -> bool:
    """Return whether cleaning a text only changes white space, quotes and accents, which transformers.js does too."""
    return uncurl_quotes(unicodedata.normalize("NFC", " ".join(text.split()))) == clean_text(text) and "\0" not in text


def test_token_ids_are_the_same_for_texts_without_damage(xlmr, packages, tmp_path):
    """Exception: if a text is cut, transformers.js also cuts off the final `</s>`."""
    processor = xlmr[0]
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "capivara"}')
    convert_tokenizer_files_in_place(tmp_path)
    candidates = [text for text in (*PLAIN, *AWKWARD, *LONG.values(), *TYPED) if len(text) < 20_000]
    texts = [text for text in candidates if text.isascii() or not any(unicodedata.category(c) == "Cs" for c in text)]
    texts += [clean_text(text) for text in texts]
    with served({NAME: tmp_path}, packages) as address:
        all_ids = in_browser.ask("node", in_browser.request(address, texts=texts), packages)["ids"]
    differing = {}
    for text, ids in zip(texts, all_ids, strict=True):
        expected = processor(text=[text])["input_ids"][0]
        is_cut = len(expected) == 77
        if ids[:76] != expected[:76] or (not is_cut and ids != expected):
            differing[text] = (ids, expected)
    assert sum(map(is_cleaned_in_javascript, texts)) > 70 and not set(TYPED) & set(differing)
    # Several segmentations of a long run of equal letters are equally good.
    assert {text for text in differing if is_cleaned_in_javascript(text)} <= {"x" * 5000, "x" * 4096}
    assert any("&amp;" in text for text in differing), (
        "texts with HTML entities must differ, because they are not repaired"
    )


def test_python_reads_the_same_token_ids_from_the_converted_tokenizer(source, repository):
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, repository))
    assert "Nmt" in before.normalizer.__repr__() and "Nmt" not in after.normalizer.__repr__()
    points = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 101)]
    texts = [f"um{chr(point)}gato {chr(point)}" for point in points]
    plain = [uncurl_quotes(unicodedata.normalize("NFC", text)) for text in texts]  # as text cleaning does
    assert sum(map(str.__ne__, texts, plain)) > 10
    for ours, theirs in zip(before.encode_batch(plain), after.encode_batch(texts), strict=True):
        assert ours.ids == theirs.ids
    awkward = [text for text in AWKWARD if text.isascii() or text.isprintable()]
    old, new = (AutoProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (source, repository))
    assert old(text=awkward)["input_ids"] == new(text=awkward)["input_ids"]
    assert new.image_processor.resample == 3 and type(new.image_processor).__name__ == "CapivaraImageProcessor"


def test_an_unsupported_normalizer_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.ByteLevel()])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--formats"]
    with pytest.raises(ValueError, match=r"ByteLevel.*transformers_js"):
        main([*command, "transformers,transformers_js"])
    assert not (tmp_path / "out").exists()


def test_each_graph_has_a_weight_file_and_a_report(repository):
    folder = repository / "onnx"
    hints = json.loads((repository / "config.json").read_text())["transformers.js_config"]
    names = {f"{kind}model{end}.onnx" for kind in ("text_", "vision_", "") for end in ENDS}
    assert hints == {"use_external_data_format": dict.fromkeys(names, 1)}
    for name in names:
        onnx.checker.check_model(str(folder / name))
    graphs = json.loads((folder / "quantisation.json").read_text())["graphs"]
    assert set(graphs) == names
    assert graphs["model.onnx"]["largest_score_difference"] < 1e-4
    assert 0.999 < graphs["model_quantized.onnx"]["lowest_cosine"] < 0.9999999
    assert graphs["model_fp16.onnx"]["bytes"] < 0.6 * graphs["model.onnx"]["bytes"]
