"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    accelerate launch train_accelerate.py --config configs/openmoji.yaml
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --runs 3

The image tower stays frozen, so every image is embedded once. Flags win over the file.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import Dataset

from artifacts import check_free_space, check_output_folder, next_numbered_folder, whole_folder, write_json, write_text
from eval.metrics import mean_recall
from eval.plots import plot_retrieval_sheet, plot_training_curves, similarity_scores
from eval.results import Record, write_records
from eval.retrieval import (
    DIRECTIONS,
    RetrievalEmbeddings,
    dataset_name,
    embed_texts_of_split,
    gain_records,
    retrieval_records,
)
from eval.tables import retrieval_table
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.embedding import embed_images
from modeling_capivara.loading import load_model, load_processor
from training.arguments import RunArguments, parse_arguments
from training.data import caption_column, load_splits
from training.loop import train
from training.outputs import model_card, run_facts
from training.step import resolve_precision

SHEET_QUERIES = 5
logger = logging.getLogger("capivara")


@dataclass
class Inputs:
    """What a run starts from, checked."""

    base: CapivaraModel
    processor: CapivaraProcessor
    splits: dict[str, Dataset]
    image_embeds: dict[str, torch.Tensor]  # split -> (images, width); the frozen tower's, so computed once


def main(argv: list[str] | None = None) -> Path:
    """The run; returns its folder."""
    try:
        args = parse_arguments(argv, __doc__)
        accelerator = start(args)
        output_dir = choose_output_dir(args)
        prepare(args, accelerator)
        inputs = load_inputs(args, accelerator, output_dir)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    try:
        with whole_folder(output_dir, args.overwrite_output_dir) as folder:
            run(args, inputs, accelerator, folder)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{(output_dir / 'table.md').read_text(encoding='utf-8')}\nEverything is in {output_dir}.")
    return output_dir


def run(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Baseline, repetitions, report, into `folder`."""
    baseline = embed_test(args, inputs.base, inputs)
    records = score(args, baseline, "baseline", ".", None)
    for seed in range(args.seed, args.seed + args.runs):
        run_folder = folder / f"seed-{seed}" if args.runs > 1 else folder
        records += train_and_score(args, seed, inputs, baseline, accelerator, run_folder, folder)
    report(args, records, folder)


def start(args: RunArguments) -> Accelerator:
    """Accelerate's device and precision. Raises ValueError on several processes, which cannot share a batch yet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and of accelerate launch
    if processes > 1:
        raise ValueError(
            f"{processes} processes were started, but a batch is not yet shared between processes: each would train on "
            "its own negatives only. Launch with --num_processes 1."
        )
    # `accelerate launch` starts a lone process with one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or cores)
    args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
    return Accelerator(mixed_precision=args.mixed_precision)


def choose_output_dir(args: RunArguments) -> Path:
    if args.output_dir is None:
        return next_numbered_folder(Path("runs"), f"{Path(args.dataset).parent.name or 'capivara'}-{args.language}")
    check_output_folder(args.output_dir, args.overwrite_output_dir)
    for kept in (Path.cwd(), Path(args.model), Path(args.dataset)):
        if args.overwrite_output_dir and kept.resolve().is_relative_to(args.output_dir.resolve()):
            raise ValueError(f"The output folder {args.output_dir} holds {kept}, which the run needs. Choose another.")
    return args.output_dir


def prepare(args: RunArguments, accelerator: Accelerator) -> None:
    """The embedded default's data set and base model, where they are missing; once, on the main process."""
    if args.prepare == "openmoji":
        from examples.openmoji.prepare import prepare as prepare_openmoji

        with accelerator.main_process_first():
            prepare_openmoji(Path(args.dataset), Path(args.model))


def load_inputs(args: RunArguments, accelerator: Accelerator, output_dir: Path) -> Inputs:
    """Model, processor and data, every row checked, and the embeddings of all images; what is quick to fail first."""
    processor = load_processor(args.model)
    base = load_model(args.model).to(accelerator.device).eval()
    check_free_space(output_dir, args.runs * sum(p.nbytes for p in base.parameters()))
    languages = {
        args.train_split: [args.language],
        args.validation_split: [args.language],
        args.test_split: args.eval_languages,
    }
    splits = load_splits(args.dataset, list(languages), languages, args.image_column)
    number = len(splits[args.train_split])
    if args.effective_batch_size > number:
        raise ValueError(
            f"effective_batch_size ({args.effective_batch_size}) exceeds the {number} images of split "
            f"{args.train_split!r}; an image would be its own negative. Choose {number} at most."
        )
    image_embeds = {
        name: embed_images(base, processor, split[args.image_column], args.embedding_batch_size, f"Images, {name}")
        for name, split in splits.items()
    }
    return Inputs(base, processor, splits, image_embeds)


def train_and_score(
    args: RunArguments,
    seed: int,
    inputs: Inputs,
    baseline: dict[str, RetrievalEmbeddings],
    accelerator: Accelerator,
    run_folder: Path,
    folder: Path,
) -> list[Record]:
    """One repetition: train, save the model folder, measure it on the test split beside the baseline."""
    set_seed(seed)
    started = time.perf_counter()
    model = load_model(args.model)
    curve = train(
        args,
        seed,
        model,
        inputs.processor,
        inputs.splits[args.train_split][caption_column(args.language)],
        inputs.image_embeds[args.train_split],
        accelerator,
        lambda trained: validate(args, trained, inputs),
    )
    seconds = {"training": time.perf_counter() - started}
    model.save_pretrained(run_folder)
    inputs.processor.save_pretrained(run_folder)
    started = time.perf_counter()
    trained = embed_test(args, model, inputs)
    seconds["evaluation"] = time.perf_counter() - started
    model_folder = run_folder.relative_to(folder).as_posix()
    records = score(args, trained, "capivara", model_folder, seed)
    for language, embeddings in trained.items():
        facts = record_facts(args, language, "capivara", model_folder, seed)
        records += gain_records(baseline[language], embeddings, **facts)
    fingerprints = {name: split._fingerprint for name, split in inputs.splits.items()}
    write_json(run_folder / "run.json", run_facts(args, seed, fingerprints, accelerator.device, curve, seconds))
    write_text(run_folder / "README.md", model_card(args, f"CAPIVARA ({args.language})"))
    plot_training_curves(curve, args.language, run_folder / "curves.png")
    draw_sheet(args, inputs, baseline, trained, run_folder / "retrieval.png")
    return records


def validate(args: RunArguments, model: CapivaraModel, inputs: Inputs) -> dict[str, float]:
    """Mean recall of the validation split in each direction, a share from 0 to 1."""
    embeddings = embed_texts_of_split(
        model.eval(),
        inputs.processor,
        inputs.splits[args.validation_split],
        args.language,
        inputs.image_embeds[args.validation_split],
    )
    return {direction: mean_recall(embeddings.ranks(direction)) for direction in DIRECTIONS}


def embed_test(args: RunArguments, model: CapivaraModel, inputs: Inputs) -> dict[str, RetrievalEmbeddings]:
    """Language -> the test split in the model's space."""
    split, image_embeds = inputs.splits[args.test_split], inputs.image_embeds[args.test_split]
    return {
        language: embed_texts_of_split(model.eval(), inputs.processor, split, language, image_embeds)
        for language in args.eval_languages
    }


def score(
    args: RunArguments, embeddings: dict[str, RetrievalEmbeddings], model: str, model_folder: str, seed: int | None
) -> list[Record]:
    records = []
    for language, embedded in embeddings.items():
        records += retrieval_records(embedded, **record_facts(args, language, model, model_folder, seed))
    return records


def record_facts(args: RunArguments, language: str, model: str, model_folder: str, seed: int | None) -> dict:
    """The fields of a record that its measurement does not know; the baseline's folder is the base itself."""
    folder = args.model if model == "baseline" else model_folder
    return {
        "dataset": dataset_name(args.dataset),
        "split": args.test_split,
        "language": language,
        "model": model,
        "model_folder": folder,
        "seed": seed,
    }


def draw_sheet(
    args: RunArguments,
    inputs: Inputs,
    baseline: dict[str, RetrievalEmbeddings],
    trained: dict[str, RetrievalEmbeddings],
    path: Path,
) -> None:
    """Five test captions, drawn by the seed and not by their success, with what each model finds."""
    split = inputs.splits[args.test_split]
    before, after = baseline[args.language], trained[args.language]
    texts = [text for texts in split[caption_column(args.language)] for text in texts]
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(texts), generator=generator)[:SHEET_QUERIES].tolist()
    plot_retrieval_sheet(
        split[args.image_column],
        [texts[i] for i in chosen],
        [int(after.image_of_text[i]) for i in chosen],
        {
            "Baseline": similarity_scores(before.text_embeds, before.image_embeds, chosen),
            "CAPIVARA": similarity_scores(after.text_embeds, after.image_embeds, chosen),
        },
        path,
    )


def report(args: RunArguments, records: list[Record], folder: Path) -> None:
    """Result files, one a language, and the table of all."""
    for language in args.eval_languages:
        name = f"retrieval_{dataset_name(args.dataset).replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(folder / "results" / name, [record for record in records if record.language == language])
    write_text(folder / "table.md", retrieval_table(records))


if __name__ == "__main__":
    main()
