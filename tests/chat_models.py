"""Tiny language models with random weights, in the form in which `transformers serve` serves a folder."""

from pathlib import Path

from tiny import randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ["um", "gato", "uma", "menina", "dois", "cavalos", "praia", "parque", "casa", "corre", "dorme", "perto", "azul"]
SPECIAL_TOKENS = ["<pad>", "<unk>", "</s>", "<image>"]
PAD, EOS, IMAGE = 0, 2, 3  # token ids
IMAGE_SIDE, PATCH_SIDE = 32, 8  # pixels
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE) ** 2
TEXT_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
# A message is its role, its images and its text.
CHAT_TEMPLATE = """{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{
message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{
part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are `WORDS`. All other words are unknown tokens."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def save_text_model(folder: Path) -> Path:
    """Save a model that takes texts only."""
    _save(LlamaForCausalLM(_text_config()), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_vision_language_model(folder: Path) -> Path:
    """Save a LLaVA model. An image becomes `IMAGE_TOKENS` tokens."""
    vision = CLIPVisionConfig(
        **TEXT_SIZES, image_size=IMAGE_SIDE, patch_size=PATCH_SIDE, projection_dim=TEXT_SIZES["hidden_size"]
    )
    config = LlavaConfig(
        vision_config=vision, text_config=_text_config(), image_token_id=IMAGE, vision_feature_layer=-1
    )
    _save(LlavaForConditionalGeneration(config), folder)
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square),
        build_tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS), pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS, **TEXT_SIZES
    )


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with random weights that writes words only, and ends its answers after a few."""
    randomize(model)
    model.generation_config.update(
        eos_token_id=EOS,
        pad_token_id=PAD,
        min_new_tokens=3,
        exponential_decay_length_penalty=(5, 10.0),
        suppress_tokens=[PAD, 1, IMAGE],
    )
    model.save_pretrained(folder)
