"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    python train_accelerate.py --config configs/openmoji.yaml
    python train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --seed 1
    python train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

`python -m examples.openmoji.prepare` makes what the first two train on. Flags win
over the file. An unfinished run lies in `<output_dir>.partial`; `--resume auto` resumes it.
"""

import capivara_common.interrupt  # isort: skip # noqa: F401, first of all

import logging
import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from capivara_common.cli import parse_arguments, run_command
from capivara_common.environment import (
    describe_device,
    package_versions,
    process_state,
    require_packages,
    resolve_precision,
)
from capivara_common.files import RUN_MARKER, finish_folder, partial_folder, read_json, write_json, write_text
from capivara_common.privacy import short_name
from caption_data.pairs import pairs_fingerprint
from eval.records.plots import plot_retrieval_sheet, plot_training_curves
from eval.records.schema import SCHEMA_VERSION, write_records
from eval.records.tables import render_retrieval_table
from eval.retrieval import compute_gain_records, compute_retrieval_records, embed_captions
from hub_upload.card import write_card
from hub_upload.origins import read_origins
from hub_upload.push import check_push_access, publish_run
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import describe_model
from training.arguments import RunArguments
from training.checkpoints import (
    Checkpoints,
    TrainingState,
    check_finished_run,
    choose_output_dir,
    is_run_complete,
    locked_run_folder,
)
from training.inputs import TrainingInputs, load_inputs
from training.loop import TrainingLoop
from training.trainable import fixed_settings, interpolate_weights, merge_adapters, prepare_trainable

PROCESS_TIMEOUT = timedelta(hours=24)  # the others wait while the main one prepares, checks and measures
logger = logging.getLogger("capivara")


def main(argv: list[str] | None = None) -> Path:
    """Train, measure and save; returns the folder of the run."""
    args = parse_arguments(RunArguments, __doc__, argv, config=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("accelerate", "httpx", "httpx2"):  # the client of the Hub would show every request
        logging.getLogger(name).setLevel(logging.WARNING)
    output_dir = choose_output_dir(args, join_processes())
    args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
    if is_run_complete(args, output_dir):
        check_finished_run(output_dir, args.to_dict(), {})
        print(f"The run in {output_dir} is complete; there is nothing to go on with.")
        return finish_run(args, output_dir)
    accelerator = create_accelerator(args, output_dir)
    if args.push_to_hub and accelerator.is_main_process:
        check_push_access(args.hub_model_id, args.hub_private)
    with locked_run_folder(output_dir, args, accelerator) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", args.keep_last, accelerator)
        resume = checkpoints.find_resume_checkpoint(args)  # its settings are checked before any long work
        inputs = load_inputs(args, accelerator)
        if (folder / "run.json").is_file():  # the training was finished before the run was stopped
            check_finished_run(folder, args.to_dict(), inputs.fingerprints(args))
        else:
            train(args, inputs, checkpoints, resume)
        if accelerator.is_main_process:
            evaluate_models(args, inputs, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # the tracker's files are closed before their folder is renamed
        if accelerator.is_main_process:
            finish_folder(output_dir, args.overwrite_output_dir)
            print(f"\n{(output_dir / 'table.md').read_text(encoding='utf-8')}\nEverything is in {output_dir}.")
    return finish_run(args, output_dir)


def join_processes() -> PartialState:
    """Accelerate's processes. Raises ValueError where it has not joined those that were started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and of accelerate launch
    state = process_state(PROCESS_TIMEOUT)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate has joined {state.num_processes}: each would train on a "
            "batch of its own. Launch with --num_processes 1, or with one of configs/accelerate/."
        )
    return state


def create_accelerator(args: RunArguments, output_dir: Path) -> Accelerator:
    """Device, precision, processes and tracker of the run; nothing is written yet.

    Raises ImportError where a package is not installed.
    """
    # `accelerate launch` starts a lone process with one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if args.lora_rank:
        require_packages("--lora_rank", "lora", "peft")
    tracker = {}
    if args.tracker != "none":
        require_packages(
            f"--tracker {args.tracker}", "trackers" if args.tracker == "tensorboard" else None, args.tracker
        )
        tracker = {"log_with": args.tracker, "project_dir": str(partial_folder(output_dir) / "trackers")}
    return Accelerator(mixed_precision=args.mixed_precision, **tracker)


def train(args: RunArguments, inputs: TrainingInputs, checkpoints: Checkpoints, resume: Path | None) -> None:
    """Train, and save model, adapters and `run.json` in the folder of the run."""
    accelerator, folder = checkpoints.accelerator, checkpoints.folder.parent
    settings = args.to_dict()
    tracked = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers("capivara", tracked)
    set_seed(args.seed)
    model = load_model(args.model)
    wrapped = prepare_trainable(model, args)
    state = TrainingState(config=settings, data=inputs.fingerprints(args), threads=torch.get_num_threads())
    state.device = f"{describe_device(accelerator.device)}, {accelerator.num_processes} processes"
    sources = read_origins(args.model, args.dataset, args.evaluation_dataset)
    trainer = TrainingLoop(args, inputs, model, wrapped, checkpoints, state)
    state = trainer.train(resume)
    if accelerator.is_main_process:
        model = merge_adapters(wrapped, folder)
        if args.interpolate != 1:
            interpolate_weights(model, load_model(args.model).state_dict(), args.interpolate)
        model.save_pretrained(folder)
        inputs.processor.save_pretrained(folder)
        write_run_files(args, model, state, inputs, sources, folder)
    accelerator.wait_for_everyone()


def evaluate_models(args: RunArguments, inputs: TrainingInputs, accelerator: Accelerator, folder: Path) -> None:
    """Measure the base and the model that was saved in `folder` on the test split of every language.

    Result files, table and sheet of pictures are written beside the model, the seconds of measuring into `run.json`.
    """
    started, run = time.perf_counter(), read_json(folder / "run.json", seconds=dict)
    models = {"baseline": args.model, "capivara": folder}
    models = {role: load_model(name).eval().to(accelerator.device) for role, name in models.items()}
    table, measured = [], {}
    for language, split in inputs.test.items():
        both = measured[language] = {
            role: embed_captions(model, inputs.processor, split.captions(), inputs.test_embeds)
            for role, model in models.items()
        }
        facts = {"dataset": short_name(args.evaluation_dataset), "split": args.test_split, "language": language}
        trained = facts | {"model": "capivara", "model_folder": ".", "seed": args.seed}
        records = compute_retrieval_records(
            both["baseline"], **facts, model="baseline", model_folder=args.model, seed=None
        )
        records += compute_retrieval_records(both["capivara"], **trained) + compute_gain_records(
            *both.values(), **trained
        )
        name = f"retrieval_{facts['dataset'].replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(
            folder / "results" / name, records, dataset=args.evaluation_dataset, model=".", precision="float32",
            fingerprint=pairs_fingerprint(split.table), device=describe_device(accelerator.device),
            **describe_model(models["capivara"]),
        )  # fmt: skip
        table += records
    run["seconds"]["evaluation"] = time.perf_counter() - started
    write_text(folder / "table.md", render_retrieval_table(table))
    split, shown = inputs.test[args.language], measured[args.language]
    queries = [text for texts in split.captions() for text in texts]
    plot_retrieval_sheet(folder / "retrieval.png", split.__getitem__, queries, shown, args.seed, args.language)
    write_json(folder / "run.json", run)


def write_run_files(
    args: RunArguments,
    model: PreTrainedModel,
    state: TrainingState,
    inputs: TrainingInputs,
    origins: dict[str, Any],
    folder: Path,
) -> None:
    """Write the curves of a training that is done, and `run.json`, all that it was; `origins` is of `hub_upload`."""
    plot_training_curves(state.curve, args.language, folder / "curves.png", label_language=args.language)
    pairs = state.step * args.effective_batch_size
    facts = {
        "schema_version": SCHEMA_VERSION,
        "config": args.to_dict(),
        **describe_model(model),
        "fixed": fixed_settings(model),
        "origins": origins,
        "seed": args.seed,
        "dataset_fingerprints": state.data,
        "skipped_rows": dict(Counter(line.reason for line in inputs.skipped)),
        "versions": package_versions(),
        "device": describe_device(PartialState().device),
        "processes": PartialState().num_processes,
        "steps": state.step,
        "pairs": pairs,
        "seconds": {"training": state.seconds},  # with the measurements of the validation split in it
        "pairs_per_second": pairs / state.seconds,
        "curve": state.curve,
    }
    write_json(folder / "run.json", facts)


def finish_run(args: RunArguments, output_dir: Path) -> Path:
    """Write the card of a complete run, and push it where that is asked for; what fails is said and costs nothing."""
    if PartialState().is_main_process:
        language = "pt" if args.language == "pt" else "en"
        if (output_dir / RUN_MARKER).is_file():  # after the rename: what a kill leaves must be resumed
            try:
                write_card(output_dir, language=language)
            except (ValueError, OSError) as error:
                logger.warning("The run has no card, README.md: %s", error)
            (output_dir / RUN_MARKER).unlink()
        if args.push_to_hub:
            publish_run(output_dir, args.hub_model_id, args.hub_private, language)
    return output_dir


if __name__ == "__main__":
    run_command(main)
