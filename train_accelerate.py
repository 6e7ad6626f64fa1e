"""Fine-tune the text tower of a CAPIVARA model on captions in your language, evaluate it and save it.

    python train_accelerate.py --config configs/openmoji.yaml
    python train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --seed 1
    python train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

The first two commands need the output of `python -m examples.openmoji.prepare`. Flags override the configuration file.
While a run is unfinished, its files are in the folder `<output_dir>.partial`; `--resume auto` resumes it.
"""

import capivara_common.interrupt  # isort: skip # noqa: F401, before slow imports, so that Ctrl-C ends them cleanly

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

from capivara_common import environment, files
from capivara_common.cli import parse_arguments, run_main_and_report_user_errors
from capivara_common.privacy import get_publishable_model_or_dataset_name
from caption_data.pairs import load_or_compute_pair_content_digest
from eval.records.plots import plot_retrieval_sheet, plot_training_curves
from eval.records.result_files import SCHEMA_VERSION, write_records_to_result_file
from eval.records.tables import render_retrieval_table
from eval.retrieval import compute_gain_records, compute_retrieval_records, embed_captions_for_retrieval
from hub_upload.card import write_card
from hub_upload.origins import read_origin_cards_and_infer_license
from hub_upload.push import ensure_writable_repository, try_export_and_push_run
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import describe_model
from training import run_folder
from training.arguments import RunArguments
from training.checkpoints import Checkpoints, TrainingState
from training.inputs import TrainingInputs, load_inputs_and_embed_images
from training.loop import TrainingLoop
from training.trainable import fixed_settings, freeze_parameters_and_add_adapters, interpolate_weights

# How long processes wait for each other. It must be long, because the main process evaluates and saves on its own while
# the other processes wait.
PROCESS_TIMEOUT = timedelta(hours=24)
logger = logging.getLogger("capivara")


def main(argv: list[str] | None = None) -> Path:
    """Run the command: train a model, evaluate and save it, and push it to the Hub if requested.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Returns:
        The folder of the finished run.

    Raises:
        ValueError: If an argument or the data are invalid.
        OSError: If a file can't be read or written.
        ImportError: If a required package is not installed.
        SystemExit: If the run was interrupted, or a loss or gradient was not finite.
    """
    args = parse_arguments(RunArguments, __doc__, argv, config=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # These libraries would log many details, such as every HTTP request to the Hub. Only their warnings are shown.
    for name in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    output_dir = run_folder.choose_and_check_output_dir(args, _connect_processes())
    args.has_auto_precision = args.mixed_precision == "auto"
    args.mixed_precision = environment.resolve_mixed_precision(args.mixed_precision, PartialState().device)
    if run_folder.is_run_complete(args, output_dir):
        run_folder.check_matches_finished_run(output_dir, args.to_dict(), {})
        print(f"The run in {output_dir} is complete; there is nothing to resume.")
        return _write_card_and_push_run_if_requested(args, output_dir)
    accelerator = _create_accelerator_and_set_threads(args, output_dir)
    if args.push_to_hub and accelerator.is_main_process:
        ensure_writable_repository(args.hub_model_id, args.hub_private)
    with run_folder.lock_run_folder_and_exit_on_interrupt(output_dir, args, accelerator) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", args.keep_last, accelerator)
        # This call also compares the settings of the run with those in the checkpoint, so that a mismatch is reported
        # before images are embedded, which takes long.
        resume = checkpoints.find_resume_checkpoint(args)
        inputs = load_inputs_and_embed_images(args, accelerator)
        # If run.json exists, the run was stopped after training, before or during the evaluation. It is not trained
        # again.
        if (folder / "run.json").is_file():
            run_folder.check_matches_finished_run(folder, args.to_dict(), inputs.fingerprints(args))
        else:
            train(args, inputs, checkpoints, resume)
        if accelerator.is_main_process:
            evaluate_base_and_trained_and_write_results(args, inputs, folder)
        accelerator.wait_for_everyone()
        # This closes the tracker's files. Open files could prevent the renaming of their folder below.
        accelerator.end_training()
        if accelerator.is_main_process:
            files.rename_partial_folder(output_dir, args.overwrite_output_dir)
            print(f"\n{(output_dir / 'table.md').read_text(encoding='utf-8')}\nThe results are in {output_dir}.")
    return _write_card_and_push_run_if_requested(args, output_dir)


def _connect_processes() -> PartialState:
    """Connect the processes that a launcher such as `accelerate launch` has started.

    Returns:
        Accelerate's state, with the number of processes and the index of this process.

    Raises:
        ValueError: If the launcher has started more processes than Accelerate has connected.
    """
    # torchrun and accelerate launch set WORLD_SIZE to the number of processes that they start.
    started = int(os.environ.get("WORLD_SIZE", "1"))
    state = environment.get_or_init_distributed_state(PROCESS_TIMEOUT)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate has connected {state.num_processes}, so each would "
            "train a model of its own. Launch with --num_processes 1, or with a configuration file from "
            "configs/accelerate/."
        )
    return state


def _create_accelerator_and_set_threads(args: RunArguments, output_dir: Path) -> Accelerator:
    """Create the `Accelerator` of the run, which holds device, precision, processes and experiment tracker.

    Also sets the number of CPU threads. No file is written.

    Args:
        args: Arguments of the run.
        output_dir: Folder of the finished run. The tracker writes into the working folder `output_dir.partial`.

    Raises:
        ImportError: If peft or the tracker's package is not installed.
    """
    # The number of threads is set explicitly, because `accelerate launch` limits a single process to one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if args.lora_rank:
        environment.require_packages("--lora_rank", "lora", "peft")
    tracker_options = {}
    if args.tracker != "none":
        extra = "trackers" if args.tracker == "tensorboard" else None
        environment.require_packages(f"--tracker {args.tracker}", extra, args.tracker)
        folder = files.get_partial_folder_path(output_dir) / "trackers"
        tracker_options = {"log_with": args.tracker, "project_dir": str(folder)}
    return Accelerator(mixed_precision=args.mixed_precision, **tracker_options)


def train(args: RunArguments, inputs: TrainingInputs, checkpoints: Checkpoints, resume: Path | None) -> None:
    """Train the model, and save it in the working folder of the run, `<output_dir>.partial`.

    The folder also gets `run.json`, which describes the run. With LoRA, it also gets the adapters, in the subfolder
    `adapter`; the saved model includes them.

    Args:
        args: Arguments of the run.
        inputs: Data of the run, with image embeddings.
        checkpoints: Checkpoints of the run, inside the working folder.
        resume: Checkpoint folder to resume from, or None to start at step 0.

    Raises:
        KeyboardInterrupt: If the run was interrupted.
        FloatingPointError: If a loss, a gradient or an embedding is not finite.
        ValueError: If the checkpoint does not belong to this run, or too many images can't be used.
        OSError: If a file can't be written.
    """
    accelerator, folder = checkpoints.accelerator, checkpoints.folder.parent
    settings = args.to_dict()
    tracked = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers("capivara", tracked)
    set_seed(args.seed)
    model = load_model(args.model)
    wrapped = freeze_parameters_and_add_adapters(model, args)
    state = TrainingState(config=settings, data=inputs.fingerprints(args), threads=torch.get_num_threads())
    state.device = f"{environment.describe_device(accelerator.device)}, {accelerator.num_processes} processes"
    sources = read_origin_cards_and_infer_license(args.model, args.dataset, args.evaluation_dataset)
    state = TrainingLoop(args, inputs, model, wrapped, checkpoints, state).train(resume)
    if accelerator.is_main_process:
        if args.lora_rank:
            wrapped.save_pretrained(folder / "adapter")
            # The adapters are added to the weights, so that the model can be used without peft.
            model = wrapped.merge_and_unload()
        if args.interpolate != 1:
            interpolate_weights(model, load_model(args.model).state_dict(), args.interpolate)
        model.save_pretrained(folder)
        inputs.processor.save_pretrained(folder)
        plot_training_curves(state.curve, args.language, folder / "curves.png", label_language=args.language)
        files.write_json(folder / "run.json", _describe_run(args, model, state, inputs, sources))
    accelerator.wait_for_everyone()


def evaluate_base_and_trained_and_write_results(args: RunArguments, inputs: TrainingInputs, folder: Path) -> None:
    """Compare the base model and the trained model on the test split of every language, and write the results.

    The outputs are result files in `results/`, the table `table.md`, and `retrieval.png`, an image with example queries
    and the images that each model ranks first. The duration is added to `run.json`.

    Args:
        args: Arguments of the run.
        inputs: Data of the run, with the image embeddings of the test split.
        folder: Working folder of the run, which has the trained model and `run.json`.
    """
    started, run = time.perf_counter(), files.read_json(folder / "run.json", seconds=dict)
    folders, device = {"baseline": args.model, "capivara": folder}, PartialState().device
    models = {role: load_model(name).eval().to(device) for role, name in folders.items()}
    dataset = get_publishable_model_or_dataset_name(args.evaluation_dataset)
    all_records, embeddings_by_language = [], {}
    for language, split in inputs.test.items():
        embeddings = embeddings_by_language[language] = {
            role: embed_captions_for_retrieval(model, inputs.processor, split.captions(), inputs.test_embeds)
            for role, model in models.items()
        }
        metadata = {"dataset": dataset, "split": args.test_split, "language": language}
        baseline = metadata | {"model": "baseline", "model_folder": args.model, "seed": None}
        trained = metadata | {"model": "capivara", "model_folder": ".", "seed": args.seed}
        records = compute_retrieval_records(embeddings["baseline"], **baseline)
        records += compute_retrieval_records(embeddings["capivara"], **trained)
        records += compute_gain_records(embeddings["baseline"], embeddings["capivara"], **trained)
        name = f"retrieval_{dataset.replace('/', '_')}_{args.test_split}_{language}.json"
        write_records_to_result_file(
            folder / "results" / name, records, dataset=args.evaluation_dataset, model=".", precision="float32",
            fingerprint=load_or_compute_pair_content_digest(split.table), device=environment.describe_device(device),
            **describe_model(models["capivara"]), **split.source.describe_embeds(),
        )  # fmt: skip
        all_records += records
    run["seconds"]["evaluation"] = time.perf_counter() - started
    files.write_text(folder / "table.md", render_retrieval_table(all_records))
    split, embeddings = inputs.test[args.language], embeddings_by_language[args.language]
    queries = [text for texts in split.captions() for text in texts]
    sheet = folder / "retrieval.png"
    plot_retrieval_sheet(sheet, split.source.load_image, queries, embeddings, args.seed, args.language)
    files.write_json(folder / "run.json", run)


def _describe_run(
    args: RunArguments, model: PreTrainedModel, state: TrainingState, inputs: TrainingInputs, origins: dict[str, Any]
) -> dict[str, Any]:
    """Return the complete description of a run, the content of `run.json`.

    Args:
        args: Arguments of the run.
        model: Trained model.
        state: State of the run after the last step.
        inputs: Data and image embeddings.
        origins: Licenses and origins of base model and data, from
            `hub_upload.origins.read_origin_cards_and_infer_license`.
    """
    pairs = state.step * args.effective_batch_size
    return {
        "schema_version": SCHEMA_VERSION,
        "config": args.to_dict(),
        **describe_model(model),
        "fixed": fixed_settings(model),
        "origins": origins,
        "seed": args.seed,
        "dataset_fingerprints": state.data,
        "skipped_rows": dict(Counter(row.reason for row in inputs.skipped)),
        "versions": environment.package_versions(),
        "device": environment.describe_device(PartialState().device),
        "processes": PartialState().num_processes,
        "steps": state.step,
        "pairs": pairs,
        "seconds": {"training": state.seconds},  # includes the time of evaluations on the validation split
        "pairs_per_second": pairs / state.seconds,
        "curve": state.curve,
    }


def _write_card_and_push_run_if_requested(args: RunArguments, output_dir: Path) -> Path:
    """Write the model card of a complete run, and push the run if `args.push_to_hub` is set.

    If the card can't be written or the push fails, the reason is logged and the run is kept.

    Args:
        args: Arguments of the run.
        output_dir: Folder of the complete run.

    Returns:
        `output_dir`.
    """
    if PartialState().is_main_process:
        language = "pt" if args.language == "pt" else "en"
        # A finished run keeps its marker file until the card is written or could not be written. If the process is
        # killed before that, the marker is still there, so that the next run with --resume auto writes the card.
        if (output_dir / files.RUN_MARKER).is_file():
            try:
                write_card(output_dir, language=language)
            except (ValueError, OSError) as error:
                logger.warning("The model card, README.md, could not be written: %s", error)
            (output_dir / files.RUN_MARKER).unlink()
        if args.push_to_hub:
            try_export_and_push_run(output_dir, args.hub_model_id, args.hub_private, language)
    return output_dir


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
