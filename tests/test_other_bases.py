"""SigLIP: trimmed vocabularies of BPE tokenizers, models at full width, and its frozen scale and bias."""

import pytest
import torch
from towers import MAKERS, gemma_like, siglip2
from transformers import (
    SiglipConfig,
    SiglipModel,
)
from whole_batch_process import CAPTIONS

from hub_upload.export import export_model
from hub_upload.formats.open_clip import TIMM_TOWERS, check_siglip_supported
from modeling_capivara.convert_open_clip import to_open_clip_state_dict
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import frequent_words, trim, word_variants
from modeling_capivara.two_towers import (
    embed_texts,
    load_embedder,
    random_images,
    random_texts,
    tokenize,
)
from training.arguments import RunArguments
from training.trainable import prepare_trainable

pytestmark = pytest.mark.usefixtures("no_pictures")
TWELVE = [f"{caption} {ending}" for caption in CAPTIONS[:6] for ending in ("azul", "e uma casa verde")]


def load_trimmed(folder, output, **options):
    """Trim a model to Portuguese; return both processors and both models, the original ones first."""
    trim(folder, output, ["pt"], words=[300], **options)
    return *(load_processor(path) for path in (folder, output)), *(load_model(path) for path in (folder, output))


@pytest.mark.slow
@pytest.mark.parametrize("size", [3000, 256_000])  # SigLIP 2 has 256,000 tokens
def test_a_trimmed_bpe_splits_texts_of_kept_tokens_as_before(size, tmp_path):
    """All merges that lead to a kept token are kept: the same tokens, with the same rows, in the same order."""
    words = frequent_words("pt", 300) + frequent_words("de", 2000)
    languages = ("pt", "en", "de", "fr", "es", "it", "nl", "pl")
    more = (f"▁{word}" for language in languages for word in frequent_words(language, 50_000))
    siglip2(tmp_path / "base", gemma_like([*map(word_variants, words), *TWELVE], 3000, more, size))
    (tmp_path / "texts").write_text("\n".join(TWELVE), encoding="utf-8")
    paths = tmp_path / "base", tmp_path / "small"
    processor, trimmed_processor, model, trimmed_model = load_trimmed(*paths, texts=[tmp_path / "texts"])
    tokenizer, trimmed_tokenizer = processor.tokenizer, trimmed_processor.tokenizer
    assert len(trimmed_tokenizer) < 0.8 * size and len(tokenizer) == size
    table = model.text_model.get_input_embeddings().weight
    trimmed_table = trimmed_model.text_model.get_input_embeddings().weight
    changed = 0
    for text in [*TWELVE, *map(word_variants, frequent_words("pt", 300)), "Über die Brücke 鮫", "geschwindigkeit"]:
        ids = tokenize(processor, [text])[0]["input_ids"]
        trimmed_ids = tokenize(trimmed_processor, [text])[0]["input_ids"]
        same_tokens = tokenizer.convert_ids_to_tokens(ids) == trimmed_tokenizer.convert_ids_to_tokens(trimmed_ids)
        changed += not same_tokens
        assert torch.equal(table[ids], trimmed_table[trimmed_ids]) == same_tokens
    assert changed == 2, "only the two German texts have tokens that were removed"
    assert type(trimmed_model) is SiglipModel and trimmed_tokenizer.model_max_length == 64
    expected = embed_texts(model, processor, TWELVE)
    torch.testing.assert_close(embed_texts(trimmed_model, trimmed_processor, TWELVE), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_siglip2_of_full_width_is_read_by_open_clip_and_sentence_transformers(tmp_path):
    """SigLIP 2 B/16 with a BPE of 30,000 tokens, trimmed: the embeddings of all libraries are equal."""
    import open_clip
    from sentence_transformers import SentenceTransformer

    words = [word for code in ("pt", "en", "de") for word in frequent_words(code, 10_000)]
    tokenizer = gemma_like(list(map(word_variants, words)), 30_000)
    text = {"vocab_size": 30_000, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    siglip2(tmp_path / "base", tokenizer, SiglipConfig(text_config=text))
    folder, images = tmp_path / "exported", [image.convert("RGB") for image in random_images()]
    texts = [*random_texts(), "Uma FOTO, de um_gato!"]  # every library must lowercase it and keep its punctuation
    report = trim(tmp_path / "base", tmp_path / "small", ["pt", "en"], words=[5_000])
    assert " of 30,000 " in report[0]
    export_model(tmp_path / "small", folder, ["transformers", "open_clip", "sentence_transformers"])
    ours = load_embedder(str(folder), "cpu")
    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    open_clip_tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        theirs = model.encode_text(open_clip_tokenizer(texts), normalize=True)
        pictures = model.encode_image(torch.stack(list(map(preprocess, images))), normalize=True)
    torch.testing.assert_close(theirs, ours.embed_texts(texts), rtol=0, atol=1e-4)
    # PIL and torchvision resize slightly differently.
    torch.testing.assert_close(pictures, ours.embed_images(images), rtol=0, atol=1e-3)
    sentences = SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(
        sentences.encode(texts, convert_to_tensor=True), ours.embed_texts(texts), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        sentences.encode(images, convert_to_tensor=True), ours.embed_images(images), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "vision", "text", "intermediate_size"),
    [
        ("ViT-L-16-SigLIP2-256", (1024, 24, 16, 256), (1024, 24), 4096),
        ("ViT-SO400M-14-SigLIP2", (1152, 27, 14, 224), (1152, 27), 4304),
        *((f"ViT-SO400M-16-SigLIP2-{side}", (1152, 27, 16, side), (1152, 27), 4304) for side in (256, 384, 512)),
        *((f"ViT-gopt-16-SigLIP2-{side}", (1536, 40, 16, side), (1152, 27), 6144) for side in (256, 384)),
    ],
)
@pytest.mark.slow
def test_the_large_siglip2_have_open_clips_names_and_shapes(name, vision, text, intermediate_size):
    """At full size, but on the meta device, which allocates no memory for weights."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    width, layers, patch_size, image_size = vision
    tower = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": intermediate_size}
    tower |= {"num_attention_heads": 16, "patch_size": patch_size, "image_size": image_size}
    texts = {"hidden_size": text[0], "num_hidden_layers": text[1], "num_attention_heads": 16, "vocab_size": 256_000}
    texts |= {"intermediate_size": 4096 if text[0] == 1024 else 4304, "projection_size": width}
    config, model_cfg = SiglipConfig(text_config=texts, vision_config=tower), open_clip.get_model_config(name)
    check_siglip_supported(config)
    assert f"{TIMM_TOWERS[vision[:3]]}_{image_size}" == model_cfg["vision_cfg"]["timm_model_name"]
    assert model_cfg.pop("custom_text")
    with torch.device("meta"):
        expected = CustomTextCLIP(**model_cfg).state_dict()
        actual = to_open_clip_state_dict(SiglipModel(config))
    shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in (actual, expected)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 600


def test_scale_and_bias_of_siglip_are_frozen_unless_nothing_is(tmp_path):
    MAKERS["siglip"](tmp_path / "base")
    for patterns, trained in ([r"text_model\.embeddings\..*"], False), (["none"], True), ([], False):
        model = load_model(tmp_path / "base")
        prepare_trainable(model, RunArguments(model="m", dataset=["d"], frozen_parameters=patterns))
        assert model.logit_scale.requires_grad is model.logit_bias.requires_grad is trained
