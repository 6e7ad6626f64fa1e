"""Measure how fast images are captioned, and how much faster this is if each image is encoded only once.

    python -m benchmarks.captions --output benchmarks/results/captions.json                    # captioning
    python -m benchmarks.captions --parts chat --output benchmarks/results/captions_chat.json  # translation

A reduced BLIP-2 model with random weights continues ten prefixes, such as "a photo of", for each image. Two programs
are compared:

- `plain`: `generate` of transformers, which encodes an image once per prefix.
- `ours`: `captions.generate` of this project, which encodes an image once.

`--parts chat` measures how many sentences per second `captions.translate` translates with 1, 8 and 64 simultaneous
requests. A stand-in for a chat server answers each request after one second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from captions.captioners.blip2 import PREFIXES_FILE, PrefixCaptioner, read_caption_prefixes
from captions.translate import TranslateArguments
from captions.translators.chat import ChatTranslator
from examples.chat_server import MODEL, ChatServer, run_stand_in_chat_server

# Published values of BLIP-2: side of an input image in pixels, and number of tokens that represent one image in the
# input of the language model.
IMAGE_SIDE, QUERY_TOKENS = 224, 32
# Fields of BLIP-2's config for widths, numbers of heads and vocabulary size. They are divided by the flag --widths.
SCALED_FIELDS = {"hidden_size", "intermediate_size", "encoder_hidden_size", "ffn_dim", "word_embed_proj_dim"}
SCALED_FIELDS |= {"num_attention_heads", "vocab_size"}
# Numbers of simultaneous requests to measure, and seconds that the stand-in server takes for each answer.
CONCURRENCY, ANSWER_S = (1, 8, 64), 1.0
ROUNDS = 8  # with n simultaneous requests, ROUNDS * n sentences are translated, one per request


@dataclass
class CaptionsArguments:
    """Command-line arguments of `benchmarks.captions`, which measures the speed of captioning and of translation."""

    images: int = flag(16, "Number of images, all in one batch.")
    new_tokens: int = flag(12, "Number of tokens to generate per caption.")
    runs: int = flag(5, "Number of timed runs of each compared program. The programs run alternately.")
    widths: int = flag(4, "Divisor of BLIP-2's widths, numbers of heads and vocabulary size.")
    layers: int = flag(6, "Divisor of BLIP-2's numbers of layers.")
    parts: Literal["generate", "chat"] = flag("generate", "generate: measure captioning. chat: measure translation.")
    output: Path | None = flag(None, "JSON file for the results.")


def main(argv: list[str] | None = None) -> None:
    """Run the caption benchmark, and print the results as JSON.

    `--parts generate` measures images captioned per second. `--parts chat` measures sentences translated per second.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(CaptionsArguments, __doc__, argv)
    if args.parts == "chat":
        measured, packages = _measure_chat_translation_rates(args.runs), ["openai"]
    else:
        measured, packages = _measure_captioning_rates(args), []
    results = {"runs": args.runs, "measured": {args.parts: measured}}
    tools.output_results_with_conditions(results, args.output, *packages)


def _measure_captioning_rates(args: CaptionsArguments) -> dict[str, Any]:
    """Measure captioned images per second of both programs, and compare their tokens.

    Args:
        args: Command-line arguments: sizes of the model, number of images, tokens per caption, and number of runs.

    Returns:
        A dict with the sizes of the measurement and these keys:

        - "rows_per_second": `{"plain": rates, "ours": rates}` as in `tools.summarize_rates`.
        - "gain_ours": `{"measured": median over the runs of the seconds of "plain" divided by those of "ours"}`.
        - "same_tokens": whether both programs generate the same tokens.
    """
    transformers_logging.set_verbosity_error()
    prefixes = read_caption_prefixes(PREFIXES_FILE)
    steps = _build_captioning_programs_to_compare(_build_small_random_captioner(args, prefixes), prefixes, args.images)
    plain, ours = (step().tolist() for step in steps.values())
    seconds = tools.time_alternating(steps, args.runs, "generate")
    rates = {name: [args.images / elapsed for elapsed in times] for name, times in seconds.items()}
    return {
        "rows_per_second": {name: tools.summarize_rates(values) for name, values in rates.items()},
        "gain_ours": {"measured": tools.median_ratio(seconds["plain"], seconds["ours"])},
        "same_tokens": plain == ours,
        "images": args.images, "prefixes": len(prefixes), "new_tokens": args.new_tokens, "precision": "float32",
        "divided": {"widths": args.widths, "layers": args.layers},
    }  # fmt: skip


def _measure_chat_translation_rates(runs: int) -> dict[str, Any]:
    """Measure translated sentences per second with different numbers of requests at the same time.

    Args:
        runs: Number of runs. Each run measures every number of requests in `CONCURRENCY` once.

    Returns:
        `{"sentences_per_second": {number of requests: rates as in summarize_rates}, "gain": {"measured": rate with the
        most requests divided by the rate with one request}, "answer_seconds": ANSWER_S, "rounds": ROUNDS}`.
    """
    with run_stand_in_chat_server(ChatServer(lambda messages: "um gato", delay_s=ANSWER_S)) as server:

        def make_step(concurrency: int) -> Callable[[], list[str]]:
            flags = {"language": "pt", "backend": "chat", "base_url": [server.url], "model": MODEL}
            args = TranslateArguments("none", Path("none"), concurrency=concurrency, **flags)
            translator = ChatTranslator(args, None)
            return lambda: translator.translate([f"cat {number}" for number in range(ROUNDS * concurrency)])

        steps = {str(concurrency): make_step(concurrency) for concurrency in CONCURRENCY}
        seconds = tools.time_alternating(steps, runs, "chat")
    rates = {name: [ROUNDS * int(name) / elapsed for elapsed in times] for name, times in seconds.items()}
    few, many = str(CONCURRENCY[0]), str(CONCURRENCY[-1])
    return {
        "sentences_per_second": {name: tools.summarize_rates(values) for name, values in rates.items()},
        "gain": {"measured": tools.median_ratio(seconds[few], seconds[many]) * CONCURRENCY[-1] / CONCURRENCY[0]},
        "answer_seconds": ANSWER_S,
        "rounds": ROUNDS,
    }


def _build_small_random_captioner(args: CaptionsArguments, prefixes: list[str]) -> PrefixCaptioner:
    """Build a scaled-down BLIP-2 with random weights.

    The model has no end-of-sequence token, so that all captions have the same length.

    Args:
        args: Command-line arguments: divisors of the model's sizes, number of images, and tokens per caption.
        prefixes: Beginnings of the captions. Their words are the vocabulary of the tokenizer.

    Returns:
        The model with its image processor and tokenizer.
    """
    tokenizer = _build_word_tokenizer(" ".join(prefixes).split())
    language = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
    language |= {"ffn_dim": 10240, "word_embed_proj_dim": 2560, "vocab_size": 50304, "max_position_embeddings": 2048}
    language |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    # The sizes are those of `Salesforce/blip2-opt-2.7b-coco`. Only the language model needs explicit sizes. The
    # defaults of `Blip2Config` for the vision tower and the Q-Former are the sizes of the published model.
    config = Blip2Config(text_config=language)
    for part in (config.vision_config, config.qformer_config, config.text_config):
        part.num_hidden_layers = max(1, part.num_hidden_layers // args.layers)
        for name in SCALED_FIELDS & part.to_dict().keys():
            setattr(part, name, max(1, getattr(part, name) // args.widths))
    config.qformer_config.vocab_size = len(tokenizer)
    config.image_token_index = config.text_config.vocab_size - 1
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # transformers initializes the vision tower of BLIP-2 with a standard deviation of 1e-10, so its outputs
            # would hardly depend on the image. All weight matrices are therefore drawn again.
            torch.nn.init.normal_(parameter, std=0.02)
    model.language_model.generation_config.eos_token_id = None
    processor = BlipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return PrefixCaptioner(model, processor, tokenizer, args.new_tokens, len(prefixes) * args.images)


def _build_word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word. The tokenizer puts the token "</s>" before each text.

    Args:
        words: Words of the vocabulary; repeated words count once. All other words become the token "<unk>".
    """
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def _build_captioning_programs_to_compare(
    captioner: PrefixCaptioner, prefixes: list[str], images: int
) -> dict[str, Callable[[], Tensor]]:
    """Build the two programs that the benchmark compares. Both generate captions of the same images of random pixels.

    Args:
        captioner: The model with its processors.
        prefixes: Beginnings of the captions.
        images: Number of images.

    Returns:
        `{"plain": function, "ours": function}`; the module docstring describes both programs. The functions return the
        generated token ids, of shape (images * prefixes, new_tokens).
    """
    model, new_tokens = captioner.model, captioner.max_new_tokens
    pixels = torch.randn(images, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    # Both programs pad the prefixes to the length of the longest prefix.
    prompts = captioner.tokenizer(prefixes)["input_ids"] * images
    image_of_text = torch.arange(images).repeat_interleave(len(prefixes))
    prefix_ids, mask = captioner.pad_prompts(prompts)
    block = torch.full((len(prompts), QUERY_TOKENS), model.config.image_token_index)
    ids, mask = torch.cat([block, prefix_ids], 1), torch.cat([torch.ones_like(block), mask], 1)
    options = {"max_new_tokens": new_tokens, "do_sample": False}

    @torch.inference_mode()
    def plain() -> Tensor:
        output = model.generate(pixel_values=pixels[image_of_text], input_ids=ids, attention_mask=mask, **options)
        return output[:, ids.shape[1] :]

    @torch.inference_mode()
    def ours() -> Tensor:
        # The language model processes the query tokens once. All prefixes share their cached keys and values.
        return captioner.continue_prompts(captioner.encode_images(pixels), image_of_text, prompts, **options)

    return {"plain": plain, "ours": ours}


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
