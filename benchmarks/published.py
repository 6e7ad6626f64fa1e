"""Convert the published models, check the converted models, and evaluate them on the datasets of the CAPIVARA paper.

    python -m benchmarks.published --output results/published
    python -m benchmarks.published --output results/quick --only flickr30k-pt mnist --limit 500   # a quick check

The command downloads CAPIVARA and its base model, compares the converted models with open_clip, and evaluates both on
the datasets of the paper (arXiv 2310.13683). It needs network access, and the extras `train` and `open-clip`. If a
dataset can't be downloaded, the command says where to request it. Put its data into the folder --data_dir.

The output folder gets `published.json`, `report.md`, and the files of `eval.suite`. To continue an interrupted run,
repeat the command.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import check_output_file, read_json, write_json, write_text
from capivara_common.hub_cache import CONVERSION_FILE, OPEN_CLIP_WEIGHT_FILES, find_download_or_convert_model_folder
from eval.benchmarks import Benchmark
from eval.prompts import load_prompts
from eval.records.result_files import ROLE_NAMES
from eval.suite import SuiteArguments, check_arguments_and_select_benchmarks, render_suite_table, run_suite
from modeling_capivara.convert_open_clip import convert_to_folder
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import compute_image_embeds, compute_text_embeds, load_embedder

# Largest accepted difference of an element of our embeddings (unit length, float32, CPU) from open_clip's. Rounding
# errors cause small differences. Tokens and pixels must be exactly equal.
MAX_EMBEDDING_DIFFERENCE = 1e-5
CAPTIONS_PER_IMAGE = 5  # captions per image in the downloadable retrieval datasets, to estimate the time
TIMED_ITEMS = 32  # number of images, and of texts, that are embedded to estimate the total time
# Texts of the comparison: accents, broken encoding, an empty text, extra spaces, another script, and a text that is too
# long and is therefore truncated.
TEXTS = (
    *("um gato dormindo no sofá", "SÃ£o JoÃ£o &amp;amp; cia", "", "  Duas   CRIANÇAS\n jogam bola ", "日本語 🦫"),
    "uma praia ao pôr do sol, com coqueiros " * 9,
)
IMAGE_SIZES = ((310, 227), (224, 224), (97, 640), (1200, 800), (16, 16))  # (width, height) of images to compare


@dataclass
class PublishedArguments(SuiteArguments):
    """Command-line arguments of `benchmarks.published`, which evaluates the published models.

    They are the arguments of `eval.suite` with other defaults. Only `runs`, a list of training runs, is refused.

    Raises:
        ValueError: If `runs` is set, or `eval.suite` refuses an argument.
    """

    model: str = flag("hiaac-nlp/CAPIVARA", "Hub id or folder of the trained model in open_clip's format.")
    baseline: str = flag(
        "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k",
        "Hub id or folder of the base model that --model was trained from, in open_clip's format.",
    )
    output: Path = flag(Path("results/published"), "Folder to write the results to.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs:
            raise ValueError("--runs is not supported, because there is only one published model. Remove --runs.")


def fetch_download_sizes_from_hub(args: PublishedArguments, benchmarks: list[Benchmark]) -> dict[str, int | None]:
    """Ask the Hugging Face Hub how large the missing models and datasets are, before anything is downloaded.

    Args:
        args: Arguments of the command, with the two models and the local data folder.
        benchmarks: Benchmarks whose datasets are needed.

    Returns:
        `{Hub id: size of the download in bytes, or None if unknown}`, without what is already on this machine.
    """
    sizes, api = {}, HfApi()
    sources = [(name, api.model_info, OPEN_CLIP_WEIGHT_FILES) for name in (args.model, args.baseline)]
    for benchmark in benchmarks:
        source = benchmark.find_data(args.data_dir)
        if source["data"] and not source["local"]:
            sources.append((source["data"], api.dataset_info, None))
    for name, get_info, weight_files in sources:
        if name not in sizes and not Path(name).exists():
            try:
                stored = {file.rfilename: file.size or 0 for file in get_info(name, files_metadata=True).siblings}
            except HfHubHTTPError:
                # No error here: `eval.suite` needs the same files later, and then reports the reason.
                sizes[name] = None
                continue
            if weight_files:
                # A model's repository may have the same weights in several formats, but only one is downloaded.
                stored = dict([next((item for item in stored.items() if item[0] in weight_files), ("", 0))])
            sizes[name] = sum(stored.values())
    return sizes


def estimate_embedding_time(
    args: PublishedArguments, benchmarks: list[Benchmark], folders: dict[str, Path]
) -> dict[str, Any]:
    """Estimate how long the evaluation will take to embed all images and texts on this machine.

    Args:
        args: Arguments of the command: device, precision and limit of images per dataset.
        benchmarks: Benchmarks whose data can be read.
        folders: `{role of the model, such as "baseline": folder of the converted model}`.

    Returns:
        Totals over all models:

        - "images" and "texts": numbers of images and texts to embed.
        - "seconds": estimated time.
        - "unknown": keys of the benchmarks of unknown size, which are not counted.
    """
    images, texts, unknown = 0, 0, []
    for benchmark in benchmarks:
        size = min(filter(None, (benchmark.test_images, args.limit)), default=0)
        unknown += [] if size else [benchmark.key]
        images += size
        if benchmark.task == "retrieval":
            texts += CAPTIONS_PER_IMAGE * size
        else:
            texts += sum(map(len, load_prompts(benchmark.prompts).class_prompts))
    seconds, image_encoders = {"image": 0.0, "text": 0.0}, set()
    for folder in folders.values():
        embedder = load_embedder(str(folder), args.device, precision=args.precision)
        # Models with the same image encoder share the embeddings of images, so each image counts once.
        image_encoders.add(embedder.image_fingerprint)
        picture, sentence = PIL.Image.effect_noise((500, 375), 60).convert("RGB"), " ".join(TEXTS[:2])
        for kind, embed, item in (("image", embedder.embed_images, picture), ("text", embedder.embed_texts, sentence)):
            embed([item])  # untimed warm-up, because the first call is slower
            elapsed = tools.time_call(partial(embed, [item] * TIMED_ITEMS))
            seconds[kind] = max(seconds[kind], elapsed / TIMED_ITEMS)  # the slowest model counts
    counts = {"images": len(image_encoders) * images, "texts": len(folders) * texts}
    total = sum(counts[f"{kind}s"] * value for kind, value in seconds.items())
    return counts | {"seconds": total, "unknown": unknown}


@torch.no_grad()
def compare_converted_model_with_open_clip(source: str, folder: Path) -> dict[str, Any]:
    """Check a converted model: compare its inputs and embeddings with those of open_clip's original model.

    Args:
        source: Hub id or folder of the original model in open_clip's format.
        folder: Folder of the converted model.

    Returns:
        A dict with these keys:

        - "equal_tokens" and "equal_pixels": whether token ids and preprocessed pixels equal those of open_clip.
        - "text_embeds" and "image_embeds": largest absolute difference between corresponding elements of the
          embeddings of both programs.
        - "passed": whether the inputs are equal and both differences are at most `MAX_EMBEDDING_DIFFERENCE`.
    """
    import open_clip

    name = f"local-dir:{source}" if Path(source).exists() else f"hf-hub:{source}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    ours, processor, tokens = load_model(folder).eval(), load_processor(folder), open_clip.get_tokenizer(name)(TEXTS)
    area = (-2, -1.5, 1, 1.5)
    images = [PIL.Image.effect_mandelbrot(size, area, 60 + n).convert("RGB") for n, size in enumerate(IMAGE_SIZES)]
    pixels = torch.stack([preprocess(image) for image in images])
    batch = processor(text=list(TEXTS), images=images, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    texts = compute_text_embeds(ours, batch["input_ids"], batch["attention_mask"])
    text_difference = (texts - theirs.eval().encode_text(tokens, normalize=True)).abs().max().item()
    image_embeds = compute_image_embeds(ours, batch["pixel_values"])
    image_difference = (image_embeds - theirs.encode_image(pixels, normalize=True)).abs().max().item()
    # open_clip pads all texts to 77 tokens, so only the columns that our tokens also have are compared.
    equal_tokens = torch.equal(batch["input_ids"], tokens[:, :width])
    equal_pixels = torch.equal(batch["pixel_values"], pixels)
    is_close = max(text_difference, image_difference) <= MAX_EMBEDDING_DIFFERENCE
    return {
        "equal_tokens": equal_tokens, "equal_pixels": equal_pixels, "text_embeds": text_difference,
        "image_embeds": image_difference, "passed": equal_tokens and equal_pixels and is_close,
    }  # fmt: skip


def _render_report(models: dict[str, dict[str, Any]], summary: dict[str, Any]) -> str:
    """Return the report as Markdown: the comparison with open_clip, then the tables of `eval.suite`."""
    lines = ["## Conversion, compared with open_clip", "", "| Model | Tokens | Pixels | Texts | Images |"]
    lines.append("|---" * 5 + "|")
    for role, model in models.items():
        same = ["equal" if model[name] else "**different**" for name in ("equal_tokens", "equal_pixels")]
        differences = [f"{model[name]:.1e}" for name in ("text_embeds", "image_embeds")]
        lines.append(f"| {ROLE_NAMES[role]}: {model['source']} | {' | '.join(same + differences)} |")
    lines += ["", "Texts and images: largest absolute difference between elements of unit-length embeddings.", ""]
    return "\n".join(lines) + "\n" + render_suite_table(summary)


def main(argv: list[str] | None = None) -> None:
    """Run the command: convert the models, compare them with open_clip, evaluate them, and write the report.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: If a converted model gives other results than open_clip. The report is written nevertheless.
    """
    args = parse_arguments(PublishedArguments, __doc__, argv)
    require_packages("The comparison with open_clip", "open-clip", "open_clip")
    check_output_file(args.output / "published.json")
    selected = check_arguments_and_select_benchmarks(args)
    benchmarks = [b for b in selected if b.key in args.only or "beyond" not in b.suite]
    sizes = fetch_download_sizes_from_hub(args, benchmarks)
    total = sum(filter(None, sizes.values())) / 1e9
    unknown = [name for name, size in sizes.items() if size is None]
    print(f"Downloads: {total:.1f} GB" + f", and of unknown size: {', '.join(unknown)}" * bool(unknown), flush=True)
    readable = []
    for benchmark in benchmarks:
        if reason := benchmark.find_data(args.data_dir)["reason"]:
            print(f"{benchmark.key}: {reason}.", flush=True)
        else:
            readable.append(benchmark)
    sources, models = {"baseline": args.baseline, "capivara": args.model}, {}
    folders = {role: find_download_or_convert_model_folder(name, convert_to_folder) for role, name in sources.items()}
    for role, source in sources.items():
        models[role] = read_json(folders[role] / CONVERSION_FILE, revision=str) | {"source": source}
        models[role] |= compare_converted_model_with_open_clip(source, folders[role])
        print(f"{source}: {'equal to open_clip' if models[role]['passed'] else 'DIFFERENT from open_clip'}", flush=True)
    estimate = estimate_embedding_time(args, readable, folders)
    left_out = f" without {', '.join(estimate['unknown'])}, whose size is unknown" * bool(estimate["unknown"])
    print(f"Embeddings: about {estimate['seconds'] / 3600:.1f} hours on this machine{left_out}.", flush=True)
    models_to_run = {"model": str(folders["capivara"]), "baseline": str(folders["baseline"])}
    summary = run_suite(replace(args, **models_to_run, only=[benchmark.key for benchmark in benchmarks]))
    if summary is None:
        # In a distributed launch, only the main process gets a summary. The other processes have nothing to write.
        return
    for model in summary["models"]:
        model["name"] = sources[model["role"]]
    names = ("protocol", "measurements", "rows")
    measured = {name: summary[name] for name in names} | {"limit": args.limit, "downloads": sizes, "estimate": estimate}
    conditions = tools.describe_measurement_conditions("open_clip_torch")
    write_json(args.output / "published.json", conditions | {"models": models} | measured)
    write_text(args.output / "report.md", report := _render_report(models, summary))
    print(report)
    if different := [model["source"] for model in models.values() if not model["passed"]]:
        sys.exit(f"error: {' and '.join(different)} differ from open_clip after the conversion; see the first table.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
