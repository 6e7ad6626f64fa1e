"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    accelerate launch train_accelerate.py --config configs/openmoji.yaml
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --runs 3
    accelerate launch train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

Flags win over the file. An unfinished run lies in `<output_dir>.partial`; `--resume auto` resumes it.
"""

from capivara_common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("training.arguments:parse_arguments", __doc__)

import sys
import time
from contextlib import nullcontext
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
from eval.retrieval import RetrievalEmbeddings
from hub_upload.publish import check_access, publish_checkpoint, publish_run
from modeling_capivara.kept_pieces import used_ids
from records.plots import plot_training_curves
from records.schema import Record
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
from training.launch import create_accelerator, join_processes, set_up_logging, start_tracker
from training.loop import Trainer
from training.matryoshka import run_rotation, save_rotation
from training.outputs import measure_energy, model_card, run_facts, save_step
from training.run_folder import choose_output_dir, is_complete, remove_work_files, run_folder
from training.step import resolve_precision
from training.trainable import interpolate_weights, merge_adapters, prepare_trainable, save_adapters
from training.vocabulary import used_vocabulary


def main(argv: list[str] | None = None) -> Path:
    """Train, measure and save; returns the folder of the run. Raises SystemExit with the fault in one line."""
    try:
        args = parse_arguments(argv, __doc__)
        output_dir = choose_output_dir(args, join_processes())
        args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
        if is_complete(args, output_dir):
            if (output_dir / "run.json").is_file():  # a run of several seeds has one in each of their folders
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
        prepare(args, accelerator)
        inputs = load_inputs(args, accelerator, output_dir)
        if args.matryoshka_dims and args.towers == "text":
            inputs.turn(run_rotation(args, inputs.base, inputs.images, accelerator, folder))
        start_tracker(args, accelerator)
        train_all_seeds(args, inputs, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # the tracker's files are closed before their folder is renamed
        if accelerator.is_main_process:
            finish_folder(output_dir, args.overwrite_output_dir)
    if accelerator.is_main_process:
        table = (output_dir / "table.md").read_text(encoding="utf-8")
        print(f"\n{table}\nEverything is in {output_dir}.")
    return end_run(args, output_dir)


def prepare(args: RunArguments, accelerator: Accelerator) -> None:
    """Make the embedded default's own data set and base model where they are asked for and missing; once.

    In the place of another model, a slip of its name included, none is built.
    """
    if args.prepare == "openmoji":
        from examples.example_arguments import PrepareArguments
        from examples.openmoji.prepare import prepare as prepare_openmoji

        own = PrepareArguments()
        own_model = Path(args.model).resolve() == own.model.resolve()
        with accelerator.main_process_first():
            if own_model or own.dataset.resolve() in [Path(name).resolve() for name in args.dataset]:
                prepare_openmoji(own.dataset, own.model if own_model else None)


def train_all_seeds(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Measure the base model, train and measure once a seed, and write the results into `folder`."""
    main_process = accelerator.is_main_process
    if main_process:
        write_skipped(folder / "skipped.jsonl", inputs.skipped)
    baseline = embed_test(args, inputs.base, inputs) if main_process else {}
    records = baseline_records(args, baseline)
    inputs.base = None  # its memory is needed
    for seed in range(args.seed, args.seed + args.runs):
        seed_folder = folder / f"seed-{seed}" if args.runs > 1 else folder
        if (seed_folder / "records.json").is_file():  # this seed was finished before the run was stopped
            check_finished_run(seed_folder, args.to_dict(), inputs.fingerprints(args))
            records += [Record(**fields) for fields in read_json(seed_folder / "records.json")]
        else:
            model_folder = seed_folder.relative_to(folder).as_posix()
            records += train_seed(args, seed, inputs, baseline, accelerator, seed_folder, model_folder)
    if main_process:
        write_results(args, records, inputs, accelerator, folder)


def train_seed(
    args: RunArguments,
    seed: int,
    inputs: Inputs,
    baseline: dict[str, RetrievalEmbeddings],
    accelerator: Accelerator,
    folder: Path,
    model_folder: str,
) -> list[Record]:
    """Train with one seed, save the model in `folder`, measure it; returns its records, on the main process alone."""
    set_seed(seed)
    model = inputs.start_model(args)
    wrapped = prepare_trainable(model, args)
    device = f"{device_description(accelerator.device)}, {accelerator.num_processes} processes"
    state = TrainerState(
        config=args.to_dict(), data=inputs.fingerprints(args), threads=torch.get_num_threads(), device=device
    )
    checkpoints = Checkpoints(folder / "checkpoints", args.keep_last, accelerator)

    def publish_step(step: int) -> None:
        save = partial(save_step, args, wrapped, inputs.processor, inputs.rotation, step)
        publish_checkpoint(save, checkpoints.folder, args.hub_model_id, step)

    planner = inputs.planner(args, seed)
    trainer = Trainer(
        args, seed, model, wrapped, planner, inputs.images, accelerator,
        lambda trained: validate(args, trained, inputs), checkpoints, state,
        publish_step if args.push_to_hub and args.hub_strategy == "checkpoint" else None,
    )  # fmt: skip
    used = args.trained_vocabulary == "used"
    trained_rows = used_vocabulary(model, used_ids(inputs.processor, planner.texts())) if used else nullcontext()
    with measure_energy(args, accelerator) as energy, trained_rows:
        state = trainer.train(checkpoint_to_resume(args, checkpoints, state))
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return []
    if inputs.rotation is None:
        save_adapters(wrapped, folder)
    else:  # adapters of a turned base fit no other
        save_rotation(inputs.rotation, folder)
    model = merge_adapters(wrapped)
    if args.interpolate != 1:
        interpolate_weights(model, inputs.start_model(args).state_dict(), args.interpolate)
    model.save_pretrained(folder)
    inputs.processor.save_pretrained(folder)
    started = time.perf_counter()
    trained = embed_test(args, model, inputs, inputs.rotation)
    seconds = {"training": state.seconds, "evaluation": time.perf_counter() - started}
    records = trained_records(args, baseline, trained, model_folder, seed)
    write_json(folder / "run.json", run_facts(args, seed, state, accelerator, seconds, inputs.skipped, energy))
    write_text(folder / "README.md", model_card(args, f"CAPIVARA ({args.language})"))
    plot_training_curves(state.curve, args.language, folder / "curves.png", words=args.language)
    draw_sheet(args, inputs, baseline, trained, folder / "retrieval.png")
    write_json(folder / "records.json", [asdict(record) for record in records])
    accelerator.wait_for_everyone()
    return records


def end_run(args: RunArguments, output_dir: Path) -> Path:
    """Tidy up a complete run and push it where that is asked for; a push that fails is reported and costs nothing."""
    if PartialState().is_main_process:
        remove_work_files(output_dir)  # after the rename: a kill before it must leave what can be resumed
        if args.push_to_hub:
            publish_run(output_dir, args.hub_model_id, args.hub_private, "pt" if args.language == "pt" else "en")
    return output_dir


if __name__ == "__main__":
    run_command(main)
