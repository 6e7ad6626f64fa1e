"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    accelerate launch train_accelerate.py --config configs/openmoji.yaml
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --seed 1
    accelerate launch train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

Flags win over the file. An unfinished run lies in `<output_dir>.partial`; `--resume auto` resumes it.
"""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed

from capivara_common.cli import run_command
from capivara_common.environment import device_description
from capivara_common.files import finish_folder, read_json, write_json, write_text
from caption_data.rows import write_skipped
from eval.records.plots import plot_training_curves
from eval.records.schema import Record
from eval.retrieval import RetrievalEmbeddings
from hub_upload.publish import check_access, publish_checkpoint, publish_run
from modeling_capivara.loading import load_model
from training.arguments import RunArguments, parse_arguments
from training.checkpoints import (
    Checkpoints,
    TrainerState,
    check_finished_run,
    check_settings_of_checkpoints,
    checkpoint_to_resume,
)
from training.evaluation import baseline_records, draw_sheet, embed_test, trained_records, validate, write_results
from training.inputs import Inputs, load_inputs
from training.launch import (
    create_accelerator,
    join_processes,
    resolve_precision,
    set_up_logging,
    start_tracker,
)
from training.loop import Trainer
from training.outputs import measure_energy, model_card, run_facts, save_step
from training.run_folder import choose_output_dir, is_complete, remove_work_files, run_folder
from training.trainable import interpolate_weights, merge_adapters, prepare_trainable, save_adapters


def main(argv: list[str] | None = None) -> Path:
    """Train, measure and save; returns the folder of the run. Raises SystemExit with the fault in one line."""
    try:
        args = parse_arguments(argv, __doc__)
        output_dir = choose_output_dir(args, join_processes())
        args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
        if is_complete(args, output_dir):
            check_finished_run(output_dir, args.to_dict(), {})
            print(f"The run in {output_dir} is complete; there is nothing to go on with.")
            set_up_logging()
            return end_run(args, output_dir)
        accelerator = create_accelerator(args, output_dir)
        if args.push_to_hub and accelerator.is_main_process:
            check_access(args.hub_model_id, args.hub_private)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    with run_folder(output_dir, args, accelerator) as folder:
        check_settings_of_checkpoints(args, folder)
        inputs = load_inputs(args, accelerator, output_dir)
        start_tracker(args, accelerator)
        train(args, inputs, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # the tracker's files are closed before their folder is renamed
        if accelerator.is_main_process:
            finish_folder(output_dir, args.overwrite_output_dir)
    if accelerator.is_main_process:
        table = (output_dir / "table.md").read_text(encoding="utf-8")
        print(f"\n{table}\nEverything is in {output_dir}.")
    return end_run(args, output_dir)


def train(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Measure the base model, train, measure again, and write model and results into `folder`."""
    main_process = accelerator.is_main_process
    if main_process:
        write_skipped(folder / "skipped.jsonl", inputs.skipped)
    baseline = embed_test(inputs.base, inputs) if main_process else {}
    inputs.base = None  # its memory is needed
    if (folder / "records.json").is_file():  # the training was finished before the run was stopped
        check_finished_run(folder, args.to_dict(), inputs.fingerprints(args))
    else:
        train_model(args, inputs, baseline, accelerator, folder)
    if main_process:
        records = [Record(**fields) for fields in read_json(folder / "records.json")]
        write_results(args, baseline_records(args, baseline) + records, inputs, accelerator, folder)


def train_model(
    args: RunArguments,
    inputs: Inputs,
    baseline: dict[str, RetrievalEmbeddings],
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Train, save the model in `folder`, measure it, and write its records there."""
    set_seed(args.seed)
    model = load_model(args.model)
    wrapped = prepare_trainable(model, args)
    device = f"{device_description(accelerator.device)}, {accelerator.num_processes} processes"
    state = TrainerState(
        config=args.to_dict(), data=inputs.fingerprints(args), threads=torch.get_num_threads(), device=device
    )
    checkpoints = Checkpoints(folder / "checkpoints", args.keep_last, accelerator)

    def publish_step(step: int) -> None:
        save = partial(save_step, args, wrapped, inputs.processor, step)
        publish_checkpoint(save, checkpoints.folder, args.hub_model_id, step)

    trainer = Trainer(
        args, model, wrapped, inputs.planner(args), inputs.images, accelerator,
        lambda trained: validate(trained, inputs), checkpoints, state,
        publish_step if args.push_to_hub and args.hub_strategy == "checkpoint" else None,
    )  # fmt: skip
    with measure_energy(args, accelerator) as energy:
        state = trainer.train(checkpoint_to_resume(args, checkpoints, state))
    if accelerator.is_main_process:
        save_adapters(wrapped, folder)
        model = merge_adapters(wrapped)
        if args.interpolate != 1:
            interpolate_weights(model, load_model(args.model).state_dict(), args.interpolate)
        model.save_pretrained(folder)
        inputs.processor.save_pretrained(folder)
        started = time.perf_counter()
        trained = embed_test(model, inputs)
        seconds = {"training": state.seconds, "evaluation": time.perf_counter() - started}
        write_json(folder / "run.json", run_facts(args, state, accelerator, seconds, inputs.skipped, energy))
        write_text(folder / "README.md", model_card(args, f"CAPIVARA ({args.language})"))
        plot_training_curves(state.curve, args.language, folder / "curves.png", words=args.language)
        draw_sheet(args, inputs, baseline, trained, folder / "retrieval.png")
        records = trained_records(args, baseline, trained)
        write_json(folder / "records.json", [asdict(record) for record in records])
    accelerator.wait_for_everyone()


def end_run(args: RunArguments, output_dir: Path) -> Path:
    """Tidy up a complete run and push it where that is asked for; a push that fails is reported and costs nothing."""
    if PartialState().is_main_process:
        remove_work_files(output_dir)  # after the rename: a kill before it must leave what can be resumed
        if args.push_to_hub:
            publish_run(output_dir, args.hub_model_id, args.hub_private, "pt" if args.language == "pt" else "en")
    return output_dir


if __name__ == "__main__":
    run_command(main)
