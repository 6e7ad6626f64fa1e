"""Training of transformers' own two-tower models: their loss and gradients, their rules, their class when saved."""

import json

import pytest
import torch
from accelerate import Accelerator
from test_train_accelerate import flags
from tiny import TINY_TEXT, randomise, tiny_config
from towers import MAKERS, gemma_like, siglip2
from transformers import AutoProcessor, CLIPModel, SiglipConfig, SiglipModel
from whole_batch_process import CAPTIONS, gradients_of

import train_accelerate
from hub_upload.export import export_model
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import frequent_words, trim, word_variants
from modeling_capivara.two_towers import (
    IMAGE_ENCODER_PREFIXES,
    compute_image_embeds,
    embed_texts,
    freeze_image_encoder,
    load_embedder,
    random_images,
    random_texts,
    tokenize,
)
from training.arguments import RunArguments
from training.batches import make_micro_batches
from training.trainable import prepare_trainable

pytestmark = pytest.mark.usefixtures("no_pictures")
TWELVE = [f"{caption} {ending}" for caption in CAPTIONS[:6] for ending in ("azul", "e uma casa verde")]
CLASSES = {"siglip": SiglipModel, "clip": CLIPModel, "capivara": CapivaraModel}


@pytest.fixture(params=CLASSES)
def kind(request, tmp_path, tiny_processor):
    """SigLIP, CLIP, and ours with a bias, as for the miniature under the sigmoid loss."""
    if request.param != "capivara":
        MAKERS[request.param](tmp_path / "base")
    else:
        text = TINY_TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        randomise(CapivaraModel(tiny_config(text_config=text, logit_bias_init_value=-10.0))).save_pretrained(
            tmp_path / "base"
        )
        tiny_processor.save_pretrained(tmp_path / "base")
    return request.param


@pytest.mark.parametrize("budget", [0.0, float("inf")])
def test_step_equals_the_models_own_loss(kind, budget, tmp_path):
    """Micro-batches of 5 of 12, against `return_loss=True` of all at once, gradients included."""
    folder, pixels = tmp_path / "base", torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, processor = CLASSES[kind].from_pretrained(folder).train(), AutoProcessor.from_pretrained(folder)
    freeze_image_encoder(model)
    padding = {"padding": "max_length", "max_length": 64} if kind == "siglip" else {"padding": True}
    texts = processor(text=TWELVE, return_tensors="pt", **padding)
    loss = model(**texts, pixel_values=pixels, return_loss=True).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = load_model(folder).train()
    freeze_image_encoder(model)
    batches, order = make_micro_batches(load_processor(folder), TWELVE, 5)
    with torch.no_grad():
        images = compute_image_embeds(model, pixels[order])
    report, actual = gradients_of(model, Accelerator(cpu=True), batches, images, budget)
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    assert actual.keys() == expected.keys() and "logit_scale" in actual
    assert ("logit_bias" in actual) == (kind != "clip")
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name  # of a key bias, 0


LORA = {"lora_rank": 2, "lora_targets": r"text_model\..*\.(q_proj|v_proj|query|value)"}


@pytest.mark.parametrize("more", [{}, pytest.param({"augmented_views": 2}, marks=pytest.mark.slow), LORA])
def test_a_run_saves_the_bases_own_class(more, kind, tmp_path, tiny_dataset_folder):
    """The image side and what else is not trained stay to the bit, and transformers alone opens the result."""
    values = {"max_steps": 2, "warmup_steps": 1, "caption_strategy": "all", "mixed_precision": "no", "interpolate": 0.5}
    train_accelerate.main(flags(tmp_path / "base", tiny_dataset_folder, tmp_path / "run", **values | more))
    base, trained = (CLASSES[kind].from_pretrained(tmp_path / name) for name in ("base", "run"))
    before, after = base.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(IMAGE_ENCODER_PREFIXES) for name in changed)
    assert ("logit_scale" in changed) == (kind == "clip" and "lora_rank" not in more)
    assert "logit_bias" not in changed
    assert AutoProcessor.from_pretrained(tmp_path / "run")(text="um gato").input_ids
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["model_class"] == CLASSES[kind].__name__
    assert facts["loss"] == ("contrastive" if kind == "clip" else "sigmoid")


def trimmed(folder, output, **options):
    trim(folder, output, ["pt"], words=[300], **options)
    return *(load_processor(path) for path in (folder, output)), *(load_model(path) for path in (folder, output))


@pytest.mark.parametrize("size", [3000, pytest.param(256_000, marks=pytest.mark.slow)])  # SigLIP 2 has so many
def test_a_bpe_with_bytes_is_trimmed_and_texts_of_its_pieces_stay(size, tmp_path):
    """Merges are closed under what is kept: the same pieces, with the same rows, in the same order."""
    words = frequent_words("pt", 300) + frequent_words("de", 2000)
    many = ("pt", "en", "de", "fr", "es", "it", "nl", "pl")
    more = (f"▁{word}" for code in many for word in frequent_words(code, 50_000))
    siglip2(tmp_path / "base", gemma_like([*map(word_variants, words), *TWELVE], 3000, more, size))
    (tmp_path / "texts").write_text("\n".join(TWELVE), encoding="utf-8")
    whole, small, base, cut = trimmed(tmp_path / "base", tmp_path / "small", texts=[tmp_path / "texts"])
    assert len(small.tokenizer) < 0.8 * size and len(whole.tokenizer) == size
    tables = [model.text_model.get_input_embeddings().weight for model in (base, cut)]
    changed = 0
    for text in [*TWELVE, *map(word_variants, frequent_words("pt", 300)), "Über die Brücke 鮫", "geschwindigkeit"]:
        before, after = (tokenize(processor, [text])[0]["input_ids"] for processor in (whole, small))
        pieces = [one.tokenizer.convert_ids_to_tokens(ids) for one, ids in ((whole, before), (small, after))]
        changed += pieces[0] != pieces[1]
        assert torch.equal(tables[0][before], tables[1][after]) == (pieces[0] == pieces[1])
    assert changed == 2, "of all texts the two German ones alone have pieces that were cut"
    assert type(cut) is SiglipModel and small.tokenizer.model_max_length == 64
    torch.testing.assert_close(embed_texts(base, whole, TWELVE), embed_texts(cut, small, TWELVE), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_siglip2_of_full_width_is_read_by_open_clip_and_sentence_transformers(tmp_path):
    """SigLIP 2 B/16 with a made BPE of 30,000 pieces, trimmed: each library with its own code, the scores equal."""
    import open_clip
    from sentence_transformers import SentenceTransformer

    words = [word for code in ("pt", "en", "de") for word in frequent_words(code, 10_000)]
    tokenizer = gemma_like(list(map(word_variants, words)), 30_000)
    text = {"vocab_size": 30_000, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    siglip2(tmp_path / "base", tokenizer, SiglipConfig(text_config=text))
    folder, images = tmp_path / "made", [image.convert("RGB") for image in random_images()]
    texts = [*random_texts(), "Uma FOTO, de um_gato!"]  # made small by each, and nothing else
    said = trim(tmp_path / "base", tmp_path / "small", ["pt", "en"], words=[5_000])
    assert said[0].endswith(" of 30,000 word pieces are kept.")
    export_model(tmp_path / "small", folder, ["transformers", "open_clip", "sentence_transformers"])
    ours = load_embedder(str(folder), "cpu")
    model, preprocess = open_clip.create_model_from_pretrained(name := f"local-dir:{folder}")
    tokenise_theirs = open_clip.get_tokenizer(name)
    with torch.no_grad():
        theirs = model.encode_text(tokenise_theirs(texts), normalize=True)
        pictures = model.encode_image(torch.stack(list(map(preprocess, images))), normalize=True)
    torch.testing.assert_close(theirs, ours.embed_texts(texts), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        pictures, ours.embed_images(images), rtol=0, atol=1e-3
    )  # PIL's resizing beside torchvision's
    sentences = SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(
        sentences.encode(texts, convert_to_tensor=True), ours.embed_texts(texts), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        sentences.encode(images, convert_to_tensor=True), ours.embed_images(images), rtol=0, atol=1e-5
    )


def test_scale_and_bias_stay_whatever_else_is_frozen(tmp_path):
    MAKERS["siglip"](tmp_path / "base")
    for words, trained in ([r"text_model\.embeddings\..*"], False), (["none"], True), ([], False):
        model = load_model(tmp_path / "base")
        prepare_trainable(model, RunArguments(model="m", dataset=["d"], frozen_parameters=words))
        assert model.logit_scale.requires_grad is model.logit_bias.requires_grad is trained
