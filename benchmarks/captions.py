"""Rows per second of the stages that build a caption data set, and what encoding an image once is worth.

    python -m benchmarks.captions --output benchmarks/results/captions.json
    python -m benchmarks.captions --parts generate --images 8 --runs 3
    python -m benchmarks.captions --parts engine --old_tree ../capivara-before-datatrove

**generate**: BLIP-2 with random weights, in the proportions of `Salesforce/blip2-opt-2.7b-coco`, widths, heads and
vocabulary divided by 4 and layers by 6 (`benchmarks/blip2_proportions.py` has the formulas), goes on from the ten
prefixes by 12 tokens. Measured are, in alternating runs on the same images,

- `plain`: `Blip2ForConditionalGeneration.generate`, an image encoded once a prefix;
- `encoded_once`: the image encoded once, its query block given to `language_model.generate` with each prefix;
- `ours`: `captions.captioner`, where the language model reads the block once, too; its bare calls, with pixels ready;
- `stage`: the whole stage around them, parquet to parquet, which decodes, prepares, and writes texts.

The last two are timed over four batches, for which the stage starts once.

A gain is that over `plain`, run by run; the predicted one is the ratio of their FLOP. The overhead is that of `stage`
over `ours`. Prefixes are padded to the longest in all four.

**translate**: a Marian model of a quarter of the paper's widths, on sentences that are all different (`distinct`), of
which a share are repetitions (`repeated`: at most 1 / (1 - share) times as fast), and that an earlier run has
translated (`known`). **score**: CAPIVARA at full size, one caption and ten generated ones an image. **select**: the
five captions that are most similar.

**engine** (with --old_tree, a checkout from before the stages ran on datatrove): whole commands in both trees by turns;
`start` is the time of one row, rows/s those of all rows without it, `ratio` how much longer the whole command takes.

The last line of the output is JSON.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import HfArgumentParser, MarianConfig, MarianMTModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from benchmarks import blip2_proportions as blip2
from benchmarks.caption_rows import GENERATED, ORIGINALS, WORDS, caption_lists, sentences, write_rows
from benchmarks.captions_engine import engine, engine_lines
from benchmarks.loading import SIZE
from benchmarks.timing import median_ratio, rate_spread, timed_runs
from caption_data.columns import CAPTIONS, SIMILARITIES
from captions import sentence_stage
from captions.captioner import Blip2Captioner, Decoding
from captions.generate import COLUMN, GenerateProcess, read_prefixes
from captions.score import ScoreProcess
from captions.select import SelectArguments, Selection
from captions.stage_arguments import PREFIXES, StageArguments
from captions.stages import RowStage
from captions.translate import PHASES
from captions.translate_arguments import TranslateArguments
from captions.translators.local import Seq2SeqTranslator
from common.environment import device_description, package_versions
from common.files import write_json
from examples.openmoji.encoders import load_text_encoder
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.embedder import CapivaraEmbedder

PARTS = ("generate", "translate", "score", "select", "engine")
WIDTHS, LAYERS = 4, 6  # that BLIP-2's are divided by
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
TRANSLATED_TOKENS = 16  # of a translation; about COCO's


@dataclass
class CaptionsArguments:
    """Arguments of `benchmarks.captions`."""

    parts: list[str] = field(default_factory=lambda: list(PARTS[:4]), metadata={"help": f"Of {', '.join(PARTS)}."})
    images: int = field(default=16, metadata={"help": "Rows of generate, all in one batch."})
    new_tokens: int = field(default=12, metadata={"help": "Tokens of every generated text."})
    translated_rows: int = field(default=32, metadata={"help": "Rows of translate, of eleven captions."})
    repeated: float = field(default=0.5, metadata={"help": "Share of the sentences that repeat others, below 1."})
    scored_rows: int = field(default=8, metadata={"help": "Rows of score, of eleven captions."})
    selected_rows: int = field(default=1000, metadata={"help": "Rows of select, of eleven captions."})
    engine_rows: int = field(default=2000, metadata={"help": "Rows of engine, of two captions."})
    old_tree: Path | None = field(default=None, metadata={"help": "Checkout that engine is compared with."})
    runs: int = field(default=5, metadata={"help": "Runs of everything; of programs that are compared, alternating."})
    widths: int = field(default=WIDTHS, metadata={"help": "What BLIP-2's widths, heads and vocabulary are divided by."})
    layers: int = field(default=LAYERS, metadata={"help": "What BLIP-2's layers are divided by."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda, for generate; the others are on the CPU."})
    precision: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16, of generate."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self) -> None:
        if not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts must be of {', '.join(PARTS)}, got {self.parts}.")
        if min(self.images, self.new_tokens, self.translated_rows, self.scored_rows, self.selected_rows, self.runs) < 1:
            raise ValueError("Numbers of rows, tokens and runs must be at least 1.")
        if "engine" in self.parts and not (self.old_tree and (self.old_tree / "captions").is_dir()):
            raise ValueError(f"The part engine needs --old_tree, the folder of another checkout, got {self.old_tree}.")
        if not 0 <= self.repeated < 1:
            raise ValueError(f"repeated must be a share from 0 to below 1, got {self.repeated}.")


def main(argv: list[str] | None = None) -> None:
    """Measure the stages and print the results."""
    (args,) = HfArgumentParser(CaptionsArguments, description=__doc__).parse_args_into_dataclasses(argv)
    transformers_logging.set_verbosity_error()
    measure: dict[str, Callable[[CaptionsArguments, Path], dict[str, Any]]] = {
        "generate": generation,
        "translate": translation,
        "score": scoring,
        "select": selecting,
        "engine": lambda args, folder: engine(args.old_tree, args.engine_rows, args.runs, folder),
    }
    results: dict[str, Any] = {"device": device_description(args.device), "versions": package_versions()}
    results |= {"runs": args.runs, "measured": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            results["measured"][part] = measure[part](args, Path(folder) / part)
    if args.output:
        write_json(args.output, results)
    print(markdown_table(results))
    print(json.dumps(results))


# ---- generate ----


def generation(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rates of the four programs, measured and predicted gains, the overhead of the stage."""
    prefixes = read_prefixes(PREFIXES)
    tokenizer, sizes = blip2.build_tokenizer(prefixes), blip2.REAL.scaled(args.widths, args.layers)
    model = blip2.build_model(sizes, tokenizer).to(args.device, getattr(torch, args.precision))
    decoding = Decoding(max_new_tokens=args.new_tokens, micro_batch_size=len(prefixes) * args.images)
    captioner = Blip2Captioner(model, blip2.build_image_processor(), tokenizer, decoding)
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
    prefix_tokens = max(len(captioner.prompt(prefix)) for prefix in prefixes)
    found: dict[str, Any] = {
        "rows_per_second": {name: rate_spread(args.images, seconds[name]) for name in PROGRAMS},
        "overhead": median_ratio(seconds["stage"], seconds["ours"]) - 1,
        "same_tokens": tokens[0] == tokens[1] == tokens[2],
        "images": args.images, "batches": BATCHES, "image_size": SIZE, "prefixes": len(prefixes),
        "prefix_tokens": prefix_tokens, "new_tokens": args.new_tokens, "precision": args.precision,
        "divided": {"widths": args.widths, "layers": args.layers}, "sizes": vars(sizes),
    }  # fmt: skip
    for name in ("encoded_once", "ours"):
        predicted = blip2.gains(sizes, prefix_tokens, args.new_tokens)[name]
        gain = median_ratio(seconds["plain"], seconds[name])
        at_full_size = blip2.gains(blip2.REAL, prefix_tokens, args.new_tokens)[name]
        found[f"gain_{name}"] = {
            "measured": gain, "predicted": predicted, "share": gain / predicted, "predicted_at_full_size": at_full_size
        }  # fmt: skip
    return found


def generation_steps(captioner: Blip2Captioner, prefixes: list[str], images: int) -> dict[str, Callable[[int], Tensor]]:
    """Program -> the new token ids (images x prefixes, new tokens) of random pixels."""
    model, new_tokens = captioner.model, captioner.decoding.max_new_tokens
    pixels = torch.randn(images, 3, blip2.IMAGE_SIDE, blip2.IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(captioner.device, captioner.writer.dtype)
    prompts = [captioner.prompt(prefix) for prefix in prefixes] * images
    image_of_text = torch.arange(images, device=captioner.device).repeat_interleave(len(prefixes))
    prefix_ids, mask = captioner.padded(prompts, left=True)
    block = torch.full((len(prompts), blip2.QUERIES), model.config.image_token_index, device=captioner.device)
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
    number = args.translated_rows * (ORIGINALS + GENERATED)
    different = sentences(number)
    originals = different[: max(1, round(number * (1 - args.repeated)))]
    mixed = [originals[i % len(originals)] for i in range(number)]
    mixed = [mixed[i] for i in np.random.default_rng(1).permutation(number)]
    folders = {
        name: write_rows(folder / name, caption_lists(texts, "en"), args.translated_rows)
        for name, texts in (("distinct", different), ("repeated", mixed))
    }
    translated = [0]
    translate = translator.translate

    def counted(sentences: list[str]) -> list[str]:
        translated[0] += len(sentences)
        return translate(sentences)

    translator.translate = counted
    sentence_stage.open_translator = lambda *_: translator  # the stage would load one

    def step(name: str) -> Callable[[int], None]:
        def stage(run: int) -> None:
            same = "distinct" if name == "known" else name
            stage_args = TranslateArguments(
                dataset=folders[same],
                output=folder / f"{name}-{run}",
                language="pt",
                memory=folder / f"memory-{same}-{run}",
            )
            before = translated[0]
            for phase in ("sentences", "translations", "rows"):
                PHASES[phase].run(stage_args, 0, 1)
            expected = {"distinct": number, "repeated": len(originals), "known": 0}[name]
            if translated[0] - before != expected:
                raise RuntimeError(f"{name}: {translated[0] - before} sentences were translated, not {expected}.")

        return stage

    seconds = timed_runs(
        {name: step(name) for name in ("distinct", "repeated", "known")}, args.runs, "cpu", "translate"
    )
    gain, predicted = median_ratio(seconds["distinct"], seconds["repeated"]), number / len(originals)
    return {
        "rows_per_second": {name: rate_spread(args.translated_rows, own) for name, own in seconds.items()},
        "gain_memory": {"measured": gain, "predicted": predicted, "share": gain / predicted},
        "rows": args.translated_rows, "captions_per_row": ORIGINALS + GENERATED, "repeated_share": args.repeated,
        "translated_tokens": TRANSLATED_TOKENS, "sizes": {"width": 256, "layers": 6, "vocabulary": 13_600},
    }  # fmt: skip


def scaled_translator() -> Seq2SeqTranslator:
    """Marian with random weights: opus-mt-tc-big's layers, and a quarter of its widths, heads and vocabulary."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), 13_600)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    sizes = {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": len(vocabulary)}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(**sizes, **ids, max_position_embeddings=512)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every translation has the same length
    options = {"max_new_tokens": TRANSLATED_TOKENS, "num_beams": 1, "do_sample": False}
    return Seq2SeqTranslator(model, tokenizer, "pt", source_prefix="", options=options, identity={"model": "random"})


def scoring(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rate of the similarities."""
    texts = sentences(args.scored_rows * (ORIGINALS + GENERATED))
    dataset = write_rows(folder / "rows", caption_lists(texts, "pt"), args.scored_rows)
    torch.manual_seed(0)
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_text_encoder()[1])
    embedder = CapivaraEmbedder("random", CapivaraModel(CapivaraConfig()).eval(), processor, "float32")
    process = ScoreProcess(embedder, ["captions-pt", "generated-captions-pt"], "similarities-pt", "image", 32)

    def stage(run: int) -> None:
        RowStage(StageArguments(dataset, folder / f"run-{run}")).run({"similarities-pt": SIMILARITIES}, {}, process)

    seconds = timed_runs({"score": stage}, args.runs, "cpu", "score")["score"]
    return {"rows_per_second": {"score": rate_spread(args.scored_rows, seconds)}, "rows": args.scored_rows}


def selecting(args: CaptionsArguments, folder: Path) -> dict[str, Any]:
    """Rate of the choice; its report is left out."""
    width = ORIGINALS + GENERATED
    columns: dict[str, list] = caption_lists(sentences(args.selected_rows * width), "pt")
    columns["similarities-pt"] = np.random.default_rng(0).random((args.selected_rows, width)).tolist()
    dataset = write_rows(folder / "rows", columns, args.selected_rows)

    def stage(run: int) -> None:
        stage_args = SelectArguments(dataset, folder / f"run-{run}", caption_strategy="rank")
        RowStage(stage_args).run({"captions-pt": CAPTIONS}, {}, Selection(stage_args))

    seconds = timed_runs({"select": stage}, args.runs, "cpu", "select")["select"]
    return {"rows_per_second": {"select": rate_spread(args.selected_rows, seconds)}, "rows": args.selected_rows}


def markdown_table(results: dict[str, Any]) -> str:
    """The README's tables, out of the JSON."""
    lines = ["| stage | what | rows/s | gain | predicted | share |", "|---|---|---:|---:|---:|---:|"]
    for part, found in results["measured"].items():
        for name, rate in found["rows_per_second"].items():
            gain = found.get(f"gain_{name}") or (found.get("gain_memory") if name == "repeated" else None)
            cells = f"{gain['measured']:.2f} | {gain['predicted']:.2f} | {gain['share']:.0%}" if gain else "- | - | -"
            title = ROW_TITLES.get(name, name if part == "engine" else "")
            lines.append(f"| {part} | {title} | {rate['median']:.2f} | {cells} |")
    lines += engine_lines(results["measured"]["engine"]) if "engine" in results["measured"] else []
    facts = f"Random weights, median of {results['runs']} alternating runs on {results['device']}; torch "
    facts += f"{results['versions']['torch']}, transformers {results['versions']['transformers']}."
    if found := results["measured"].get("generate"):
        full = found["gain_ours"]["predicted_at_full_size"]
        facts += (
            f" generate: BLIP-2 in real proportions, widths / {found['divided']['widths']}, layers / "
            f"{found['divided']['layers']}, {found['images']} images, ten prefixes, {found['new_tokens']} new tokens, "
            f"{found['precision']}; the stage takes {found['overhead']:.1%} longer than its model's calls; the "
            f"gain predicted at full size is {full:.2f}."
        )
    return "\n".join([*lines, "", facts])


if __name__ == "__main__":
    main()
