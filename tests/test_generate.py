"""Generated captions: a tiny BLIP-2 continues every prefix exactly like its plain `generate` call."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from tiny import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from capivara_common.image_files import BadRow
from captions.captioners.blip2 import (
    NAN_REASON,
    OUTPUT_COLUMN,
    PREFIXES_FILE,
    Blip2Captioner,
    PrefixCaptioner,
    load_captioner,
    read_caption_prefixes,
)
from captions.generate import GenerateArguments, main
from captions.stages import DECODED_KEY

SIDE, QUERIES, IMAGE_TOKEN, STEPS = 28, 4, 299, 9
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 14}
QFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# Token 12 ends a text. It is likely with these weights, so that texts of a batch end at different steps.
OPT = {"model_type": "opt", "vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128, "bos_token_id": 2}
OPT |= {"eos_token_id": 12, "pad_token_id": 1, "tie_word_embeddings": False}
TEN = read_caption_prefixes(PREFIXES_FILE)


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 299 tokens that begins texts with </s>, like that of OPT, and has no <image> token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEN, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>"
    )


def image_processor() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})


def tiny_blip2() -> Blip2ForConditionalGeneration:
    """Make a model whose weights are large enough that texts depend on image and prefix."""
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=OPT, num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    model = randomize(Blip2ForConditionalGeneration(config)).eval()
    for parameter in model.language_model.parameters():
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    return model


def pictures(number: int) -> list[PIL.Image.Image]:
    noise = np.random.default_rng(0)
    return [PIL.Image.fromarray(noise.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(number)]


def captioner_of(model, **options) -> PrefixCaptioner:
    return PrefixCaptioner(model, image_processor(), opt_tokenizer(), STEPS, **options)


def until_end(tokens, model) -> list[int]:
    """Remove the padding after the end of a text."""
    tokens, end = [int(token) for token in tokens], model.config.text_config.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def new_tokens(captioner: PrefixCaptioner, images: list) -> list[list[list[int]]]:
    tokens = captioner.generate_tokens(captioner.preprocess_images(images), TEN)
    return [[until_end(row, captioner.model) for row in rows] for rows in tokens]


def plain_tokens(model, images: list) -> list[list[list[int]]]:
    """Generate token ids with the processor and plain `generate` calls, which encode each image once per prefix."""
    tokenizer = opt_tokenizer()
    tokenizer.padding_side = "left"
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    tokens = []
    for image in images:
        inputs = processor(images=[image] * len(TEN), text=TEN, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        tokens.append([until_end(row, model) for row in output[:, inputs["input_ids"].shape[1] :]])
    return tokens


@pytest.fixture(scope="module")
def blip2() -> Blip2ForConditionalGeneration:
    return tiny_blip2()


@pytest.fixture(scope="module")
def blip2_folder(blip2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    blip2.save_pretrained(folder)
    Blip2Processor(image_processor(), opt_tokenizer(), num_query_tokens=QUERIES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("micro_batch_size", [1, 7, 160])  # one at a time; with a remainder; all together
def test_tokens_equal_those_of_the_plain_call(blip2, micro_batch_size):
    expected = plain_tokens(blip2, pictures(3))
    texts = [tuple(row) for rows in expected for row in rows]
    assert len(set(texts)) > 15, "texts that depend on neither image nor prefix would prove nothing"
    assert len({len(text) for text in texts}) > 2, "they end at different steps"
    assert new_tokens(captioner_of(blip2, micro_batch_size=micro_batch_size), pictures(3)) == expected


def test_every_image_is_encoded_once(blip2):
    rows = {"vision": 0, "qformer": 0, "block": 0}

    def count(name, count_rows):
        def hook(module, args, kwargs):
            rows[name] += count_rows(args, kwargs)

        return hook

    def block(args, kwargs):  # calls of the language model with the query tokens; all prefixes are longer
        embeds = kwargs.get("inputs_embeds")
        return 0 if embeds is None or embeds.shape[1] != QUERIES else len(embeds)

    hooks = [
        (blip2.vision_model, count("vision", lambda args, kwargs: len(kwargs["pixel_values"]))),
        (blip2.qformer, count("qformer", lambda args, kwargs: len(kwargs["query_embeds"]))),
        (blip2.language_model.model, count("block", block)),
    ]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    captioner_of(blip2, micro_batch_size=7).generate_captions(pictures(3), TEN)
    for handle in handles:
        handle.remove()
    assert rows == {"vision": 3, "qformer": 3, "block": 3}


def test_nan_scores_only_affect_their_own_row(blip2, monkeypatch):
    captioner, images = captioner_of(blip2), pictures(3)
    expected = captioner.generate_captions(images, TEN)
    pixels = captioner.preprocess_images(images)
    pixels[1] = torch.nan
    monkeypatch.setattr(captioner, "preprocess_images", lambda images: pixels)
    first, bad, last = captioner.generate_captions(images, TEN)
    assert isinstance(bad, BadRow) and bad.reason == NAN_REASON and "bf16" in bad.detail
    assert [first, last] == [expected[0], expected[2]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(blip2_folder, precision):
    captioner = load_captioner(arguments(blip2_folder, precision=precision))
    assert captioner.model.vision_model.dtype == captioner.language_model.dtype != torch.float32
    assert captioner.model.qformer.dtype == (torch.float32 if precision == "fp16" else torch.bfloat16)
    (captions,) = captioner.generate_captions(pictures(1), TEN)
    assert [caption.startswith(prefix) for prefix, caption in zip(TEN, captions, strict=True)] == [True] * len(TEN)


def test_other_model_types_are_refused(tiny_folder, tmp_path):
    config = {"model_type": "blip-2", "text_config": {"model_type": "t5"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for folder, kind in ((tiny_folder, "capivara"), (tmp_path, "blip-2")):
        with pytest.raises(ValueError, match=f"'{kind}'"):
            load_captioner(arguments(folder))


# ---- the command ----


def arguments(model: Path, **options) -> GenerateArguments:
    return GenerateArguments("data", Path("generated"), model=str(model), device="cpu", **options)


@pytest.fixture
def images_folder(tmp_path) -> Path:
    """An image folder with seven rows: row 2 has a broken image, row 4 has none."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number, picture in enumerate(pictures(7)):
        picture.save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "captions-en": [f"picture {number}"]})
    (folder / "2.png").write_bytes(b"no image")
    lines[4]["file_name"] = None
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder.parent


def flags(images: Path, output: Path, model: Path, *more: str) -> list[str]:
    words = ["--dataset", images, "--output", output, "--model", model, "--max_new_tokens", STEPS, "--device", "cpu"]
    return [*map(str, words), "--batch_rows", "2", "--rows_per_part", "3", *more]


def rows_of(output: Path) -> dict[str, dict]:
    rows = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["captions-en"][0]: row for row in rows}


@pytest.mark.slow
def test_the_command(images_folder, blip2_folder, tmp_path, capsys):
    output = tmp_path / "generated"
    main(flags(images_folder, output, blip2_folder))
    output_text = capsys.readouterr().out
    assert "5 rows written, 2 skipped" in output_text and "1 unreadable image" in output_text
    rows = rows_of(output)
    captioner = load_captioner(arguments(blip2_folder, max_new_tokens=STEPS))
    for number in (0, 1, 3, 5, 6):
        row = rows[f"picture {number}"]
        assert row["image"]["bytes"] == (images_folder / "train" / f"{number}.png").read_bytes()
        assert [row[OUTPUT_COLUMN]] == captioner.generate_captions([pictures(7)[number]], TEN)
    listed = [json.loads(line) for path in output.glob("*.skipped.jsonl") for line in path.read_text().splitlines()]
    assert sorted((line["row"], line["reason"]) for line in listed) == [(2, "unreadable image"), (4, "no image")]
    settings = json.loads((output / "stage.json").read_text())["settings"]
    assert settings["prefixes"] == TEN and settings["model"] == blip2_folder.name and settings["sampling"] is None
    assert (settings["max_new_tokens"], settings["precision"]) == (STEPS, "float32")
    sorted(output.glob("*.parquet"))[1].unlink()
    main(flags(images_folder, output, blip2_folder, "--tasks", "2"))
    assert rows_of(output) == rows, "what is missing is made again"


def test_prefixes_from_a_file(images_folder, blip2_folder, tmp_path):
    (tmp_path / "own.json").write_text('{"prefixes": ["a drawing of ", "here we see"]}')
    main(flags(images_folder, tmp_path / "out", blip2_folder, "--prefixes", str(tmp_path / "own.json")))
    for row in rows_of(tmp_path / "out").values():
        assert [caption[:11] for caption in row[OUTPUT_COLUMN]] == ["a drawing o", "here we see"]


@pytest.mark.parametrize(
    ("prefixes", "values"),
    [([], r"\[\]"), (["a", None], r"\['a', None\]"), (["a", " "], r"\['a', ' '\]"), (["a", "a "], r"\['a', 'a '\]")],
)
def test_invalid_prefixes_are_refused(prefixes, values, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"prefixes": prefixes}))
    with pytest.raises(ValueError, match=rf"p\.json.*{values}"):
        read_caption_prefixes(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_new_tokens", "0"], r"max_new_tokens.*\b0\b"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--executor", "slurm"], "--tasks"),
    ],
)
def test_the_command_refuses_invalid_flags(images_folder, blip2_folder, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(flags(images_folder, tmp_path / "out", blip2_folder, *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_out_of_memory_error_names_the_flags_to_lower(blip2_folder, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PrefixCaptioner, "generate_captions", no_memory)
    captioner = Blip2Captioner(arguments(blip2_folder))
    with pytest.raises(ValueError, match=r"\b1 images.*\b160 captions.*--micro_batch_size"):
        captioner.caption_rows([{DECODED_KEY: pictures(1)[0]}])
