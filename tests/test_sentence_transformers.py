"""sentence-transformers with exported models: equal embeddings for every kind of input, and a loss equal to CLIP's."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as Images
from PIL import Image
from sampling import one_in
from test_readme import code_with
from towers import as_published, gemma_like, siglip2

from capivara_search.miniature import get_miniature_folder
from eval.retrieval import RetrievalArguments, evaluate
from examples.openmoji.concepts import load_concepts, split_concepts
from examples.openmoji.dataset import render_png
from examples.tune_sentence_transformers import build_clip_loss, build_recall_evaluator, load_pairs, main
from hub_upload.export import export_model
from hub_upload.formats import open_clip
from hub_upload.formats.open_clip import write_sentence_transformers
from modeling_capivara import CapivaraModel, CapivaraProcessor, clip_loss
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_texts, random_images

TEXTS = ["um gato", "uma foto de cachorro na água", "SÃ£o JoÃ£o &amp; cia", "casa verde", "céu azul"]


@pytest.fixture(scope="module")
def folder(saved_tiny_folder, tmp_path_factory):
    """Folder of a tiny model that was exported for transformers and sentence-transformers."""
    repository = tmp_path_factory.mktemp("exported") / "repository"
    export_model(saved_tiny_folder, repository, ["transformers", "sentence_transformers"])
    return repository


@pytest.fixture
def encoder(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").eval()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [image.convert("RGB") for image in random_images()]


@torch.no_grad()
def transformers_embeddings(folder: Path, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text embeddings and image embeddings that transformers computes."""
    model, processor = CapivaraModel.from_pretrained(folder).eval(), CapivaraProcessor.from_pretrained(folder)
    output = model(**processor(text=TEXTS, images=pictures, return_tensors="pt", padding=True))
    return output.text_embeds, output.image_embeds


def test_encode_accepts_texts_images_and_dictionaries(folder, encoder, pictures):
    texts, images = transformers_embeddings(folder, pictures)
    inputs = {
        "texts": (encoder.encode(TEXTS), texts),
        "pictures": (encoder.encode(pictures), images),
        "dictionaries of texts": (encoder.encode([{"text": text} for text in TEXTS]), texts),
        "dictionaries of pictures": (encoder.encode([{"image": image} for image in pictures]), images),
        "queries": (encoder.encode_query(TEXTS), texts),
        "documents": (encoder.encode_document(pictures), images),
        "batch size 1": (encoder.encode(TEXTS, batch_size=1), texts),
    }
    for kind, (actual, expected) in inputs.items():
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=kind)
    assert encoder.encode(TEXTS[0]).shape == (24,) == (encoder.get_embedding_dimension(),)
    assert encoder.similarity_fn_name == "cosine" and encoder.max_seq_length == 77
    both = [{"text": TEXTS[0], "image": pictures[0]}]
    with pytest.raises(ValueError, match="modalit"):  # CLIP has no joint embedding of a text and an image
        encoder.encode(both)


@pytest.mark.parametrize("mini_batch_size", one_in(3, [5, 2, 64]))
def test_its_loss_equals_clip_loss(encoder, tiny_dataset_folder, mini_batch_size):
    """Compare the loss and all gradients of a batch that is encoded in mini-batches."""
    rows = load_pairs(tiny_dataset_folder, "train", "pt")
    model = encoder[0].auto_model
    columns = [encoder.preprocess(list(rows[column])) for column in ("text", "image")]
    embeds = [encoder(dict(features))["sentence_embedding"] for features in columns]
    expected = clip_loss(*embeds, model.logit_scale)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"logit_scale", "text_projection.0.weight"} <= gradients.keys()
    encoder.zero_grad()
    loss = build_clip_loss(encoder, mini_batch_size)(columns, None)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-6, rtol=1e-4, msg=name)


def test_captions_that_look_like_urls_or_files_are_texts(encoder, tmp_path, pictures, monkeypatch):
    """sentence-transformers itself would load bare texts of this kind as images, even from another machine."""
    pictures[0].save(tmp_path / "a.png")
    captions = ["https://example.org/a.png", str(tmp_path / "a.png")]
    rows = {"image": pictures[:2], "captions-pt": captions}
    DatasetDict(
        train=Dataset.from_dict(rows, Features({"image": Images(), "captions-pt": Value("string")}))
    ).save_to_disk(tmp_path / "data")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a request left the machine"))
    rows = load_pairs(tmp_path / "data", "train", "pt")
    texts = encoder.encode(list(rows["text"]))
    np.testing.assert_allclose(texts, encoder.encode([{"text": text} for text in captions]))
    assert abs(texts[1] - encoder.encode(pictures[:1])[0]).max() > 1e-3
    assert set(build_recall_evaluator(rows)(encoder)) >= {"cosine_accuracy@1"}


@pytest.mark.slow
def test_the_example_trains_only_the_text_encoder(folder, tiny_dataset_folder, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    command = ["--model", folder, "--dataset", tiny_dataset_folder, "--output_dir", tmp_path / "tuned", "--epochs", 2]
    main([*map(str, command), "--batch_size", "6", "--mini_batch_size", "4", "--learning_rate", "1e-3"])
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "recall@10" in printed
    before, after = CapivaraModel.from_pretrained(folder), CapivaraModel.from_pretrained(tmp_path / "tuned")
    trained_state = after.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, trained_state[name])}
    assert "logit_scale" in changed and any(name.startswith("text_model.") for name in changed)
    assert not [name for name in changed if name.startswith(("vision_model.", "visual_projection."))]
    tuned = SentenceTransformer(str(tmp_path / "tuned"), device="cpu").eval()
    processor = CapivaraProcessor.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        expected = after.eval()(**processor(text=TEXTS, return_tensors="pt", padding=True)).text_embeds
    np.testing.assert_allclose(tuned.encode(TEXTS), expected, atol=1e-6)
    results = json.loads((tmp_path / "tuned" / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["batch_size"] == 6 and set(results["text_to_image"]) == {"before", "after"}
    assert results["versions"]["sentence-transformers"] == version("sentence-transformers")
    assert str(tmp_path) not in json.dumps(results)


@pytest.mark.parametrize(
    ("changed_flags", "message"),
    [
        ({"--model": "missing"}, r"modules\.json"),
        ({"--train_split": "prova"}, "'prova'.* train"),
        ({"--batch_size": "500"}, r"--batch_size .*train.*\b12\b.*\b500\b"),
        ({"--language": "eo"}, "image.*captions-eo"),
    ],
)
def test_wrong_input_is_refused_before_any_work(folder, tiny_dataset_folder, tmp_path, changed_flags, message):
    flags = {"--model": folder, "--dataset": tiny_dataset_folder, "--output_dir": tmp_path / "tuned"}
    flags |= {"--batch_size": 4, **changed_flags}
    with pytest.raises(ValueError, match=message):
        main([str(word) for flag in flags.items() for word in flag])
    assert not (tmp_path / "tuned").exists()


def gives_a_mask(folder: Path) -> None:
    """Save a SigLIP 2 whose tokenizer returns an attention mask by default, which training does not use."""
    siglip2(folder, gemma_like(TEXTS, 320))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"model_input_names": ["input_ids", "attention_mask"]}), encoding="utf-8")


def published(folder: Path) -> None:
    """Save a SigLIP 2 whose tokenizer does not lowercase texts."""
    siglip2(folder, gemma_like(TEXTS, 320))
    as_published(folder)


@pytest.mark.parametrize("save", [gives_a_mask, pytest.param(published, marks=pytest.mark.slow)])
def test_texts_are_embedded_as_in_training(save, tmp_path):
    """Also texts with capital letters, and texts longer than the text encoder's maximum."""
    from sentence_transformers import SentenceTransformer

    save(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "repository", ["sentence_transformers"])
    texts = [*TEXTS, "Uma FOTO de um Gato", "gato " * 600]
    expected = embed_texts(load_model(tmp_path / "model").eval(), load_processor(tmp_path / "model"), texts)
    embeds = SentenceTransformer(str(tmp_path / "repository"), device="cpu").encode(texts, batch_size=1)
    assert np.ptp(embeds, axis=0).max() > 0.01, "equal rows would prove nothing"
    np.testing.assert_allclose(embeds, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_export_with_other_text_embeddings_is_refused(tmp_path, monkeypatch):
    siglip2(tmp_path / "model", gemma_like(TEXTS, 320))
    # The exported model then pads texts to the longest of the batch, which is wrong for SigLIP.
    monkeypatch.setattr(open_clip, "pads_to_max_length", lambda _: False)
    with pytest.raises(ValueError, match=r"sentence-transformers.*\d"):
        export_model(tmp_path / "model", tmp_path / "repository", ["sentence_transformers"])
    assert not (tmp_path / "repository").exists()


XM3600 = """---
configs:
- config_name: default
  data_files:
  - split: pt
    path: pt.parquet
---
"""


def write_xm3600(folder: Path, pictures: int) -> Path:
    """Write OpenMoji's pictures in the format of mteb's XM3600, with two Portuguese captions each and unique names."""
    emoji_by_name = {}
    for picture in split_concepts(load_concepts(), 0)["test"]:
        emoji_by_name.setdefault(picture.captions_pt[0], picture.emoji)
    names = list(emoji_by_name)[:pictures]
    captions = [[name, f"um desenho que mostra {name}"] for name in names]
    columns = {
        "image_id": [str(number) for number in range(len(names))],
        **dict.fromkeys(("captions", "captions_tokenized", "captions_tokenized_lowercase"), captions),
        "image_locale": ["pt"] * len(names),
        "image": [{"bytes": render_png(emoji_by_name[name]), "path": None} for name in names],
    }
    folder.mkdir()
    Dataset.from_dict(columns).cast_column("image", Images()).to_parquet(folder / "pt.parquet")
    (folder / "README.md").write_text(XM3600, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capivara", "siglip"])
def test_mteb_and_our_evaluation_agree(kind, tmp_path, monkeypatch):
    """Run the code of the evaluation guide. If an image has two captions, mteb's recall is half of its hit rate."""
    import mteb

    data = write_xm3600(tmp_path / "data", pictures=80)
    if kind == "siglip":  # texts of 64 tokens without a mask; random weights find a few images
        captions = [text for row in Dataset.from_parquet(str(data / "pt.parquet"))["captions"] for text in row]
        siglip2(tmp_path / "model", gemma_like(captions, 500))
        export_model(tmp_path / "model", tmp_path / "repository", ["transformers", "sentence_transformers"])
    else:
        for path in get_miniature_folder().iterdir():  # a trained model
            (tmp_path / "repository").mkdir(exist_ok=True)
            (tmp_path / "repository" / path.name).symlink_to(path)
        write_sentence_transformers(tmp_path / "repository", load_processor(tmp_path / "repository"))
    directions = {"text_to_image": "XM3600T2IRetrieval", "image_to_text": "XM3600I2TRetrieval"}
    for task in directions.values():
        monkeypatch.setitem(mteb.get_task(task).metadata.dataset, "path", str(data))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    exec(compile(code_with("docs/how-to/evaluation.md", "mteb.evaluate"), "evaluation.md", "exec"), {})
    options = {"split": "pt", "caption_column": "captions", "device": "cpu"}
    records = evaluate(RetrievalArguments("repository", str(data), tmp_path / "ours.json", **options))
    ours = {(record.direction, record.metric): record.value for record in records}
    min_recall = {"capivara": 0.1, "siglip": 0.01}[kind]
    assert min_recall < ours["text_to_image", "recall@10"] < 0.9, "a recall near 0 or 1 would prove little"
    for direction, task in directions.items():
        result = json.loads(Path("results/mieb/results/my-name__my-model/COMMIT", f"{task}.json").read_text())
        (theirs,) = result["scores"]["test"]
        hit_rates = [theirs[f"hit_rate_at_{k}"] for k in (1, 5, 10)]
        assert hit_rates == pytest.approx([ours[direction, f"recall@{k}"] for k in (1, 5, 10)], abs=1e-5)
        captions = 2 if direction == "image_to_text" else 1
        assert theirs["recall_at_1"] == pytest.approx(hit_rates[0] / captions, abs=1e-5)
