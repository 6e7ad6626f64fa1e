"""Rows per second of the stages that build a caption data set, and what encoding an image once is worth.

    python -m benchmarks.captions --output benchmarks/results/captions.json
    python -m benchmarks.captions --parts generate --images 8 --runs 3

**generate**: BLIP-2 with random weights, in the proportions of `Salesforce/blip2-opt-2.7b-coco`, widths, heads and
vocabulary divided by 4 and layers by 6, goes on from the ten prefixes by 12 tokens. Measured are, in alternating runs
on the same images,

- `plain`: `Blip2ForConditionalGeneration.generate`, an image encoded once a prefix;
- `encoded_once`: the image encoded once, its query block given to `language_model.generate` with each prefix;
- `ours`: `captions.captioner`, where the language model reads the block once, too; its bare calls, with pixels ready;
- `stage`: the whole stage around them, parquet to parquet, which decodes, prepares, and writes texts.

The last two are timed over four batches, for which the stage starts once. A gain is that over `plain`, run by run. The
overhead is that of `stage` over `ours`. Prefixes are padded to the longest in all four.

**translate**: a Marian model of a quarter of the paper's widths, on sentences that are all different (`distinct`), of
which a share are repetitions (`repeated`: at most 1 / (1 - share) times as fast), and that an earlier run has
translated (`known`). **score**: CAPIVARA at full size, one caption and ten generated ones an image. **select**: the
five captions that are most similar.

The last line of the output is JSON.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from benchmarks.loading import SIZE, photos
from benchmarks.timing import conditions, finish, median_ratio, rate_spread, software, table, timed_runs
from capivara_common.cli import at_least, flag, parse, run_command
from capivara_search.miniature_encoders import load_tokenizer
from caption_data.rows import CAPTIONS, SIMILARITIES
from captions import translate
from captions.captioner import Blip2Captioner, Decoding
from captions.generate import COLUMN, GenerateProcess, read_prefixes
from captions.score import ScoreProcess
from captions.select import SelectArguments, Selection
from captions.stage_arguments import PREFIXES, StageArguments, TranslateArguments
from captions.stages import RowStage
from captions.translate import PHASES
from captions.translators import Seq2SeqTranslator
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.two_towers import capivara_embedder

PARTS = ("generate", "translate", "score", "select")
BATCHES = 4  # that `ours` and `stage` are timed over
PROGRAMS = ("plain", "encoded_once", "ours", "stage")
ROW_TITLES = {
    "plain": "plain call: image encoded once a prefix",
    "encoded_once": "image encoded once",
    "ours": "and read once by the language model",
    "stage": "the whole stage around it",
    "distinct": "different sentences",
    "repeated": "a share of them repeated",
    "known": "all in the memory",
}
IMAGE_SIDE, QUERIES = 224, 32  # of BLIP-2: pixels, and tokens that an image becomes
TRANSLATED_TOKENS = 16  # of a translation; about COCO's
WORDS = "a the of two old red small happy dog cat house tree child boat street table sits runs plays under near with"
SENTENCE_WORDS = 10  # of a caption; about COCO's
ORIGINALS, GENERATED = 1, 10  # captions an image
CAPTIONS_PER_ROW = ORIGINALS + GENERATED


@dataclass
class CaptionsArguments:
    """Arguments of `benchmarks.captions`."""

    parts: list[str] = flag(list(PARTS), "Stages that are measured.", choices=PARTS)
    images: int = flag(16, "Rows of generate, all in one batch.")
    new_tokens: int = flag(12, "Tokens of every generated text.")
    translated_rows: int = flag(32, "Rows of translate, of eleven captions.")
    repeated: float = flag(0.5, "Share of the sentences that repeat others, below 1.")
    scored_rows: int = flag(8, "Rows of score, of eleven captions.")
    selected_rows: int = flag(1000, "Rows of select, of eleven captions.")
    runs: int = flag(5, "Runs of everything; of programs that are compared, alternating.")
    widths: int = flag(4, "What BLIP-2's widths, heads and vocabulary are divided by.")
    layers: int = flag(6, "What BLIP-2's layers are divided by.")
    device: str = flag("cpu", "cpu or cuda, for generate; the others are on the CPU.")
    precision: str = flag("float32", "float32, bfloat16 or float16, of generate.")
    output: Path | None = flag(None, "JSON file for the figures.")

    def __post_init__(self) -> None:
        at_least(self, 1, "images", "new_tokens", "translated_rows", "scored_rows", "selected_rows", "runs")
        if not 0 <= self.repeated < 1:
            raise ValueError(f"repeated must be a share from 0 to below 1, got {self.repeated}.")


def main(argv: list[str] | None = None) -> None:
    """Measure the stages and print the results."""
    args = parse(CaptionsArguments, __doc__, argv)
    transformers_logging.set_verbosity_error()
    measure = {"generate": generation, "translate": translation, "score": scoring, "select": selecting}
    results = {**conditions(args.device), "runs": args.runs, "measured": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            results["measured"][part] = measure[part](args, Path(folder) / part)
    print(captions_table(results))
    finish(results, args.output)


# ---- rows ----


def write_rows(folder: Path, columns: dict[str, list], rows: int) -> str:
    """A parquet file of JPEG images of a photo's size, as loading's, beside some columns; returns its folder."""
    folder.mkdir(parents=True)
    files = [{"bytes": photo, "path": None} for photo in photos(min(rows, 64))]
    kinds = {name: SIMILARITIES if name.startswith("similarities") else CAPTIONS for name in columns}
    data = {"image": [files[row % len(files)] for row in range(rows)], **columns}
    Dataset.from_dict(data, features=Features({"image": Image()} | kinds)).to_parquet(folder / "train.parquet")
    return str(folder)


def sentences(number: int) -> list[str]:
    """Different English word sequences."""
    draw, words = np.random.default_rng(0), np.array(WORDS.split())
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join(draw.choice(words, SENTENCE_WORDS))] = None
    return list(found)


def caption_lists(texts: list[str], language: str) -> dict[str, list]:
    """The columns of originals and generated captions, an image's in a row."""
    rows = [texts[start : start + CAPTIONS_PER_ROW] for start in range(0, len(texts), CAPTIONS_PER_ROW)]
    return {
        f"captions-{language}": [row[:ORIGINALS] for row in rows],
        f"generated-captions-{language}": [row[ORIGINALS:] for row in rows],
    }


# ---- generate ----


def generation(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rates of the four programs, the gains, and the overhead of the stage."""
    prefixes = read_prefixes(PREFIXES)
    captioner = scaled_captioner(args, prefixes)
    steps = generation_steps(captioner, prefixes, args.images)
    tokens = [steps[name](0).tolist() for name in PROGRAMS[:3]]
    dataset, columns = write_rows(folder / "rows", {}, BATCHES * args.images), {COLUMN: CAPTIONS}

    def stage(run: int) -> None:
        process = GenerateProcess(captioner, prefixes, "image")
        stage_args = StageArguments(dataset, folder / f"run-{run}", batch_rows=args.images)
        RowStage(stage_args).run(columns, {}, process)

    steps |= {"ours": lambda run, ours=steps["ours"]: [ours(run) for _ in range(BATCHES)], "stage": stage}
    seconds = timed_runs(steps, args.runs, args.device, "generate")
    seconds |= {name: [run / BATCHES for run in seconds[name]] for name in ("ours", "stage")}
    gains = {name: median_ratio(seconds["plain"], seconds[name]) for name in ("encoded_once", "ours")}
    return {
        "rows_per_second": {name: rate_spread(args.images, seconds[name]) for name in PROGRAMS},
        **{f"gain_{name}": {"measured": gain} for name, gain in gains.items()},
        "overhead": median_ratio(seconds["stage"], seconds["ours"]) - 1,
        "same_tokens": tokens[0] == tokens[1] == tokens[2],
        "images": args.images, "batches": BATCHES, "image_size": SIZE, "prefixes": len(prefixes),
        "new_tokens": args.new_tokens, "precision": args.precision,
        "divided": {"widths": args.widths, "layers": args.layers},
    }  # fmt: skip


def scaled_captioner(args: CaptionsArguments, prefixes: list[str]) -> Blip2Captioner:
    """BLIP-2 of the given divisors, with random weights that never end a text: every caption has the same length."""

    def sizes(width: int, layers: int, heads: int) -> dict[str, int]:
        named = {"hidden_size": width // args.widths, "num_hidden_layers": max(1, layers // args.layers)}
        return named | {"num_attention_heads": max(1, heads // args.widths)}

    tokenizer = word_tokenizer(" ".join(prefixes).split(), "</s> $A")
    # Salesforce/blip2-opt-2.7b-coco: EVA ViT-g/14, BERT base's sizes, OPT-2.7b (their config.json)
    vision = sizes(1408, 39, 16) | {
        "intermediate_size": 6144 // args.widths,
        "image_size": IMAGE_SIDE,
        "patch_size": 14,
    }
    qformer = sizes(768, 12, 12) | {"intermediate_size": 3072 // args.widths, "vocab_size": len(tokenizer)}
    language, vocabulary = sizes(2560, 32, 32), 50304 // args.widths
    language |= {"model_type": "opt", "ffn_dim": 10240 // args.widths, "word_embed_proj_dim": language["hidden_size"]}
    language |= {"vocab_size": vocabulary, "max_position_embeddings": 2048, "bos_token_id": tokenizer.bos_token_id}
    language |= {"eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=language, num_query_tokens=QUERIES,
        image_token_index=vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # its own vision weights start at 1e-10
            torch.nn.init.normal_(parameter, std=0.02)
    model.language_model.generation_config.eos_token_id = None
    processor = BlipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    decoding = Decoding(max_new_tokens=args.new_tokens, micro_batch_size=len(prefixes) * args.images)
    return Blip2Captioner(model.to(args.device, getattr(torch, args.precision)), processor, tokenizer, decoding)


def word_tokenizer(words: Iterable[str], template: str) -> PreTrainedTokenizerFast:
    """A token for each of the words; `template` says where "</s>" stands."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def generation_steps(captioner: Blip2Captioner, prefixes: list[str], images: int) -> dict[str, Callable[[int], Tensor]]:
    """Program -> the new token ids (images x prefixes, new tokens) of random pixels."""
    model, new_tokens = captioner.model, captioner.decoding.max_new_tokens
    pixels = torch.randn(images, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(captioner.device, captioner.writer.dtype)
    prompts = [captioner.prompt(prefix) for prefix in prefixes] * images
    image_of_text = torch.arange(images, device=captioner.device).repeat_interleave(len(prefixes))
    prefix_ids, mask = captioner.padded(prompts, left=True)
    block = torch.full((len(prompts), QUERIES), model.config.image_token_index, device=captioner.device)
    ids, mask = torch.cat([block, prefix_ids], 1), torch.cat([torch.ones_like(block), mask], 1)
    options = {"max_new_tokens": new_tokens, "do_sample": False}

    @torch.inference_mode()
    def plain(run: int) -> Tensor:
        output = model.generate(pixel_values=pixels[image_of_text], input_ids=ids, attention_mask=mask, **options)
        return output[:, ids.shape[1] :]

    @torch.inference_mode()
    def encoded_once(run: int) -> Tensor:
        blocks = model.get_image_features(pixel_values=pixels).pooler_output[image_of_text]
        embeds = torch.cat([blocks, model.get_input_embeddings()(prefix_ids)], 1)
        return model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    @torch.inference_mode()
    def ours(run: int) -> Tensor:
        return captioner.continued(captioner.encode(pixels), image_of_text, prompts, **options)

    return {"plain": plain, "encoded_once": encoded_once, "ours": ours}


# ---- translate, score, select ----


def translation(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rates on different, repeated and known sentences, and the gain of the memory."""
    translator = scaled_translator()
    translate.open_translator = lambda *_: translator  # the stage would load one
    number = args.translated_rows * CAPTIONS_PER_ROW
    different = sentences(number)
    originals = different[: max(1, round(number * (1 - args.repeated)))]
    mixed = [originals[i % len(originals)] for i in np.random.default_rng(1).permutation(number)]
    folders = {
        name: write_rows(folder / name, caption_lists(texts, "en"), args.translated_rows)
        for name, texts in (("distinct", different), ("repeated", mixed))
    }

    def stage(name: str, sentences: str, run: int) -> None:
        output, memory = folder / f"{name}-{run}", folder / f"memory-{sentences}-{run}"
        stage_args = TranslateArguments(dataset=folders[sentences], output=output, language="pt", memory=memory)
        for phase in ("sentences", "translations", "rows"):
            PHASES[phase].run(stage_args, 0, 1)

    of_step = {"distinct": "distinct", "repeated": "repeated", "known": "distinct"}  # in the memory of the first
    steps = {name: lambda run, own=(name, of): stage(*own, run) for name, of in of_step.items()}
    seconds = timed_runs(steps, args.runs, "cpu", "translate")
    return {
        "rows_per_second": {name: rate_spread(args.translated_rows, own) for name, own in seconds.items()},
        "gain_memory": {"measured": median_ratio(seconds["distinct"], seconds["repeated"])},
        "rows": args.translated_rows, "captions_per_row": CAPTIONS_PER_ROW, "repeated_share": args.repeated,
        "translated_tokens": TRANSLATED_TOKENS, "sizes": {"width": 256, "layers": 6, "vocabulary": 13_600},
    }  # fmt: skip


def scaled_translator() -> Seq2SeqTranslator:
    """Marian with random weights: opus-mt-tc-big's layers, and a quarter of its widths, heads and vocabulary."""
    tokenizer = word_tokenizer([*WORDS.split(), *(f"w{n}" for n in range(len(WORDS.split()) + 3, 13_600))], "$A </s>")
    sizes = {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": len(tokenizer)}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(**sizes, **ids, max_position_embeddings=512)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every translation has the same length
    options = {"max_new_tokens": TRANSLATED_TOKENS, "num_beams": 1, "do_sample": False}
    return Seq2SeqTranslator(model, tokenizer, "pt", source_prefix="", options=options, identity={"model": "random"})


def scoring(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rate of the similarities."""
    dataset = write_rows(
        folder / "rows", caption_lists(sentences(args.scored_rows * CAPTIONS_PER_ROW), "pt"), args.scored_rows
    )
    torch.manual_seed(0)
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer())
    embedder = capivara_embedder("random", CapivaraModel(CapivaraConfig()).eval(), processor, "float32")
    process = ScoreProcess(embedder, ["captions-pt", "generated-captions-pt"], "similarities-pt", "image", 32)

    def stage(run: int) -> None:
        RowStage(StageArguments(dataset, folder / f"run-{run}")).run({"similarities-pt": SIMILARITIES}, {}, process)

    seconds = timed_runs({"score": stage}, args.runs, "cpu", "score")["score"]
    return {"rows_per_second": {"score": rate_spread(args.scored_rows, seconds)}, "rows": args.scored_rows}


def selecting(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rate of the choice; its report is left out."""
    columns = caption_lists(sentences(args.selected_rows * CAPTIONS_PER_ROW), "pt")
    columns["similarities-pt"] = np.random.default_rng(0).random((args.selected_rows, CAPTIONS_PER_ROW)).tolist()
    dataset = write_rows(folder / "rows", columns, args.selected_rows)

    def stage(run: int) -> None:
        stage_args = SelectArguments(dataset, folder / f"run-{run}", caption_strategy="rank")
        RowStage(stage_args).run({"captions-pt": CAPTIONS}, {}, Selection(stage_args))

    seconds = timed_runs({"select": stage}, args.runs, "cpu", "select")["select"]
    return {"rows_per_second": {"select": rate_spread(args.selected_rows, seconds)}, "rows": args.selected_rows}


def captions_table(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md, out of the JSON."""
    rows, measured = [], results["measured"]
    for part, found in measured.items():
        for name, rate in found["rows_per_second"].items():
            gain = found.get("gain_memory" if name == "repeated" else f"gain_{name}")
            cell = f"{gain['measured']:.2f}" if gain else "-"
            rows.append((part, ROW_TITLES.get(name, ""), f"{rate['median']:.2f}", cell))
    facts = f"Random weights, median of {results['runs']} alternating runs on {results['device']}; "
    facts += f"{software(results, 'torch', 'transformers')}."
    if found := measured.get("generate"):
        facts += (
            f" generate: BLIP-2 in real proportions, widths / {found['divided']['widths']}, layers / "
            f"{found['divided']['layers']}, {found['images']} images, ten prefixes, {found['new_tokens']} new tokens, "
            f"{found['precision']}; the stage takes {found['overhead']:.1%} longer than its model's calls."
        )
    return table(("stage", "what", "rows/s", "gain"), rows, facts, text_columns=2)


if __name__ == "__main__":
    run_command(main)
