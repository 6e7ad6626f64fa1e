"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    accelerate launch train_accelerate.py --config configs/openmoji.yaml
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --seed 1
    accelerate launch train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

`python -m examples.openmoji.prepare` makes what the first two train on. Flags win
over the file. An unfinished run lies in `<output_dir>.partial`; `--resume auto` resumes it.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from capivara_common.cli import run_command, user_errors
from capivara_common.environment import device_description, resolve_precision
from capivara_common.files import finish_folder
from caption_data.rows import write_skipped
from hub_upload.card import write_card
from hub_upload.origins import origins, short_card
from hub_upload.push import check_access, publish_checkpoint, publish_run
from modeling_capivara.loading import load_model
from training import launch
from training.arguments import RunArguments, parse_arguments
from training.checkpoints import Checkpoints, TrainerState, check_finished_run
from training.inputs import Inputs, load_inputs
from training.loop import Trainer
from training.outputs import measure, write_run
from training.trainable import interpolate_weights, merge_adapters, prepare_trainable


@user_errors
def main(argv: list[str] | None = None) -> Path:
    """Train, measure and save; returns the folder of the run. Raises SystemExit with the fault in one line."""
    args = parse_arguments(argv, __doc__)
    launch.set_up_logging()
    output_dir = launch.choose_output_dir(args, launch.join_processes())
    args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
    if launch.is_complete(args, output_dir):
        check_finished_run(output_dir, args.to_dict(), {})
        print(f"The run in {output_dir} is complete; there is nothing to go on with.")
        return end_run(args, output_dir)
    accelerator = launch.create_accelerator(args, output_dir)
    if args.push_to_hub and accelerator.is_main_process:
        check_access(args.hub_model_id, args.hub_private)
    with launch.run_folder(output_dir, args, accelerator) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", args.keep_last, accelerator)
        resume = checkpoints.to_resume(args)  # its settings are checked before any long work
        inputs = load_inputs(args, accelerator, output_dir)
        if accelerator.is_main_process:
            write_skipped(folder / "skipped.jsonl", inputs.skipped)
        if (folder / "run.json").is_file():  # the training was finished before the run was stopped
            check_finished_run(folder, args.to_dict(), inputs.fingerprints(args))
        else:
            train(args, inputs, checkpoints, resume)
        if accelerator.is_main_process:
            measure(args, inputs, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # the tracker's files are closed before their folder is renamed
        if accelerator.is_main_process:
            finish_folder(output_dir, args.overwrite_output_dir)
            print(f"\n{(output_dir / 'table.md').read_text(encoding='utf-8')}\nEverything is in {output_dir}.")
    return end_run(args, output_dir)


def train(args: RunArguments, inputs: Inputs, checkpoints: Checkpoints, resume: Path | None) -> None:
    """Train, and save model, adapters and `run.json` in the folder of the run."""
    accelerator, folder = checkpoints.accelerator, checkpoints.folder.parent
    settings = args.to_dict()
    tracked = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers("capivara", tracked)
    inputs.base = None  # its memory is needed
    set_seed(args.seed)
    model = load_model(args.model)
    wrapped = prepare_trainable(model, args)
    device = f"{device_description(accelerator.device)}, {accelerator.num_processes} processes"
    state = TrainerState(
        config=settings, data=inputs.fingerprints(args), threads=torch.get_num_threads(), device=device
    )
    sources = origins(args.model, args.dataset, args.evaluation_dataset)

    def publish_step(step: int) -> None:
        def save(to: Path) -> None:  # merging changes the weights that are being trained: it is done to a copy
            (merge_adapters(copy.deepcopy(wrapped)) if args.lora_rank else wrapped).save_pretrained(to)
            inputs.processor.save_pretrained(to)
            card = short_card(sources, f"CAPIVARA ({args.language}), step {step} of a run")
            (to / "README.md").write_text(card, encoding="utf-8")

        publish_checkpoint(save, checkpoints.folder, args.hub_model_id, step)

    publish = publish_step if args.push_to_hub and args.hub_strategy == "checkpoint" else None
    trainer = Trainer(args, inputs, model, wrapped, checkpoints, state, publish)
    energy = nullcontext()
    if args.carbon_country and accelerator.is_main_process:  # of its machine: one of several is not the whole
        from codecarbon import OfflineEmissionsTracker

        options = {"save_to_file": False, "log_level": "error"}
        energy = OfflineEmissionsTracker(country_iso_code=args.carbon_country, **options)
    with energy:
        state = trainer.train(resume)
    if accelerator.is_main_process:
        model = merge_adapters(wrapped, folder)
        if args.interpolate != 1:
            interpolate_weights(model, load_model(args.model).state_dict(), args.interpolate)
        model.save_pretrained(folder)
        inputs.processor.save_pretrained(folder)
        write_run(args, state, inputs, sources, getattr(energy, "final_emissions_data", None), folder)
    accelerator.wait_for_everyone()


def end_run(args: RunArguments, output_dir: Path) -> Path:
    """Write the card of a complete run, and push it where that is asked for; what fails is said and costs nothing."""
    if PartialState().is_main_process:
        language = "pt" if args.language == "pt" else "en"
        if (output_dir / launch.MARKER).is_file():  # after the rename: what a kill leaves must be resumed
            try:
                write_card(output_dir, language=language)
            except (ValueError, OSError) as error:
                launch.logger.warning("The run has no card, README.md: %s", error)
            (output_dir / launch.MARKER).unlink()
        if args.push_to_hub:
            publish_run(output_dir, args.hub_model_id, args.hub_private, language)
    return output_dir


if __name__ == "__main__":
    run_command(main)
