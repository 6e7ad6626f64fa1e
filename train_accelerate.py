"""Fine-tune the text tower of a CAPIVARA model on captions in your language, measure it, save it.

    accelerate launch train_accelerate.py --config configs/openmoji.yaml
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --learning_rate 1e-4 --runs 3
    accelerate launch train_accelerate.py --config configs/capivara.yaml --model MODEL --dataset DATA --resume auto

Flags win over the file. An unfinished run lies in `<output_dir>.partial`; `--resume auto` goes on with it.
"""

from common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("training.arguments:parse_arguments", __doc__)

import contextlib
import copy
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError

from caption_data.rows import write_skipped
from common.cli import run_command
from common.environment import device_description, require
from common.files import (
    check_output_folder,
    finish_folder,
    next_numbered_folder,
    no_space_left,
    partial_folder,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from common.privacy import short_name
from eval.retrieval import (
    RetrievalEmbeddings,
    embed_captions,
    gain_records,
    retrieval_records,
    validation_measures,
)
from hub_upload.publish import check_access, publish_checkpoint, publish_run
from modeling_capivara import CapivaraModel
from modeling_capivara.embedding import embed_images
from modeling_capivara.loading import load_model
from records.plots import plot_retrieval_sheet, plot_training_curves, similarity_scores
from records.schema import Record, header, write_records
from records.tables import retrieval_table
from training.arguments import RunArguments, parse_arguments
from training.checkpoints import Checkpoints, TrainerState, check_files, check_same_run, read_state, threads
from training.inputs import Inputs, load_inputs
from training.loop import Interrupted, Trainer
from training.optimiser import hopeless_rate
from training.outputs import check_country, energy_of, model_card, run_facts
from training.step import resolve_precision
from training.trainable import interpolate_weights, merge_adapters, prepare_trainable, save_adapters

SHEET_QUERIES = 5
WAIT = timedelta(hours=24)
GOES_ON = (
    "checkpoints/step-*",
    "checkpoints/bad-batch-*",
    "records.json",
)  # in an unfinished run: what it can go on from
MARK = ".capivara-run"  # a folder that a run may empty and rename
logger = logging.getLogger("capivara")


def main(argv: list[str] | None = None) -> Path:
    """The run; returns its folder."""
    try:
        args = parse_arguments(argv, __doc__)
        output_dir = choose_output_dir(args, join_processes())
        args.mixed_precision = resolve_precision(args.mixed_precision, PartialState().device)
        if is_complete(args, output_dir):
            if (output_dir / "run.json").is_file():
                done = TrainerState(config=read_json(output_dir / "run.json", config=dict)["config"])
                check_same_run(done, args.to_dict(), {}, output_dir)
            if PartialState().is_main_process:
                remove_work_files(output_dir)  # where a kill came first
            print(f"The run in {output_dir} is complete; there is nothing to go on with.")
            set_up_logging()
            publish(args, output_dir)
            return output_dir
        accelerator = start(args, output_dir)
        if args.push_to_hub and accelerator.is_main_process:
            check_access(args.hub_model_id, args.hub_private)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    with unfinished_work(output_dir, args, accelerator) as folder:
        check_settings_of_checkpoints(args, folder)
        prepare(args, accelerator)
        inputs = load_inputs(args, accelerator, output_dir)
        start_tracker(args, accelerator)
        run(args, inputs, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # the tracker's files are closed before their folder is renamed
        if accelerator.is_main_process:
            finish_folder(output_dir, args.overwrite_output_dir)
            remove_work_files(output_dir)  # after the rename: a kill before it must leave what can be gone on with
    if accelerator.is_main_process:
        table = (output_dir / "table.md").read_text(encoding="utf-8")
        print(f"\n{table}\nEverything is in {output_dir}.")
    publish(args, output_dir)
    return output_dir


def run(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Baseline, repetitions, report, into `folder`."""
    main_process = accelerator.is_main_process
    if main_process:
        write_skipped(folder / "skipped.jsonl", inputs.skipped)
    baseline = embed_test(args, inputs.base, inputs) if main_process else {}
    records = score(args, baseline, "baseline", ".", None)
    inputs.base = None  # its memory is needed
    for seed in range(args.seed, args.seed + args.runs):
        run_folder = folder / f"seed-{seed}" if args.runs > 1 else folder
        if (run_folder / "records.json").is_file():  # of a run that is resumed
            done = read_json(run_folder / "run.json", config=dict, dataset_fingerprints=dict)
            there = TrainerState(config=done["config"], data=done["dataset_fingerprints"])
            check_same_run(there, args.to_dict(), inputs.fingerprints(args), run_folder)
            records += [Record(**fields) for fields in read_json(run_folder / "records.json")]
        else:
            records += train_and_score(args, seed, inputs, baseline, accelerator, run_folder, folder)
    if main_process:
        report(args, records, inputs, accelerator, folder)


def remove_work_files(output_dir: Path) -> None:
    """Of a run that has ended: what only one that goes on needs."""
    for path in [output_dir / MARK, *output_dir.rglob("records.json")]:
        path.unlink(missing_ok=True)


def publish(args: RunArguments, output_dir: Path) -> None:
    """Send a complete run to the Hub, where that is asked for; a failure is told and changes nothing."""
    if args.push_to_hub and PartialState().is_main_process:
        publish_run(output_dir, args.hub_model_id, args.hub_private, "pt" if args.language == "pt" else "en")


def checkpoint_publisher(
    args: RunArguments, wrapped: torch.nn.Module, inputs: Inputs, run_folder: Path
) -> Callable[[int], bool] | None:
    """What sends the model of a step to the Hub; None where that is not asked for."""
    if not args.push_to_hub or args.hub_strategy != "checkpoint":
        return None

    def publish_step(step: int) -> bool:
        def save(path: Path) -> None:
            # Merging changes the weights that are being trained, so that it is done to a copy.
            model = merge_adapters(copy.deepcopy(wrapped)) if args.lora_rank else wrapped
            model.save_pretrained(path)
            inputs.processor.save_pretrained(path)
            write_text(path / "README.md", model_card(args, f"CAPIVARA ({args.language}), step {step} of a run"))

        return publish_checkpoint(save, run_folder / "checkpoints", args.hub_model_id, step)

    return publish_step


def join_processes() -> PartialState:
    """Accelerate's processes. Raises ValueError where it has not joined those that were started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and of accelerate launch
    # Accelerate joins processes without a GPU only where it is told that they have none.
    # The others wait while the main one prepares, checks and measures, which can take longer than ten minutes.
    options = {"timeout": WAIT} if started > 1 else {}
    state = PartialState(cpu=started > 1 and not torch.cuda.is_available(), **options)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate has joined {state.num_processes}: each would train on a "
            "batch of its own. Launch with --num_processes 1, or with one of configs/accelerate/."
        )
    return state


def set_up_logging() -> None:
    """What the run tells goes to the terminal, one line each; libraries only warn."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("accelerate", "httpx", "httpx2"):  # the client of the Hub would show every request
        logging.getLogger(name).setLevel(logging.WARNING)


def start(args: RunArguments, output_dir: Path) -> Accelerator:
    """Accelerate's device, precision, processes and tracker; nothing is written yet."""
    set_up_logging()
    # `accelerate launch` starts a lone process with one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if args.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU; use bf16, no or auto.")
    if args.runs > 1 and args.resume not in (None, "auto"):
        raise ValueError(f"The checkpoint {args.resume} is of one run, not of {args.runs}. Use --resume auto.")
    processes, parts = PartialState().num_processes, -(-args.effective_batch_size // args.micro_batch_size)
    if processes > parts:
        raise ValueError(
            f"{processes} processes can't share the {parts} micro-batches of {args.micro_batch_size} in an "
            f"effective_batch_size of {args.effective_batch_size}: each needs one. Use a smaller --micro_batch_size."
        )
    if (warning := hopeless_rate(args)) and PartialState().is_main_process:
        logger.warning("Warning: %s", warning)
    if args.carbon_country:
        require("--carbon_country", "carbon", "codecarbon")
        check_country(args.carbon_country)
    if args.lora_rank:
        require("--lora_rank", "lora", "peft")
    tracker = None if args.tracker == "none" else args.tracker
    if tracker:
        require(f"--tracker {tracker}", "trackers" if tracker == "tensorboard" else None, tracker)
    folder = str(partial_folder(output_dir) / "trackers") if tracker else None
    return Accelerator(mixed_precision=args.mixed_precision, log_with=tracker, project_dir=folder)


def start_tracker(args: RunArguments, accelerator: Accelerator) -> None:
    """Let the tracker write, into the folder of the run; nothing without one."""
    settings = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in args.to_dict().items()
    }
    accelerator.init_trackers("capivara", config=settings)


def choose_output_dir(args: RunArguments, state: PartialState) -> Path:
    """Where the run goes, the same on all processes; nothing is written yet."""
    if args.output_dir is None:
        name = f"{Path(args.dataset[0]).parent.name or 'capivara'}-{args.language}"
        unfinished = sorted(Path("runs").glob(f"{name}-[0-9]*.partial"))
        found = [next_numbered_folder(Path("runs"), name)]
        if args.resume == "auto" and unfinished:
            found = [unfinished[-1].with_suffix("")]
        if state.num_processes > 1:
            broadcast_object_list(found)
        return found[0]
    if state.is_main_process:
        remove_leftovers(args.output_dir)  # before any process looks at what is there
    state.wait_for_everyone()
    if not is_complete(args, args.output_dir):
        check_output_folder(args.output_dir, args.overwrite_output_dir)
    for kept in map(Path, (Path.cwd(), args.model, args.evaluation_dataset, *args.dataset)):
        if args.overwrite_output_dir and kept.resolve().is_relative_to(args.output_dir.resolve()):
            raise ValueError(f"The output folder {args.output_dir} holds {kept}, which the run needs. Choose another.")
    partial = partial_folder(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and goes_on(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Go on with it by --resume auto, or start anew with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def is_complete(args: RunArguments, output_dir: Path) -> bool:
    """Whether `--resume auto` finds a run that has ended; one that is to replace it may be unfinished."""
    complete = (output_dir / "run.json").is_file() or (output_dir / "table.md").is_file()  # of one seed, of several
    return args.resume == "auto" and complete and not partial_folder(output_dir).exists()


def goes_on(folder: Path) -> bool:
    """Whether an unfinished run has left something that --resume can go on from."""
    return any(any(folder.rglob(name)) for name in GOES_ON)


@contextlib.contextmanager
def unfinished_work(output_dir: Path, args: RunArguments, accelerator: Accelerator):
    """The folder a run works in. It stays where it holds something to go on from, and faults end in one line."""
    folder = partial_folder(output_dir)
    lock = claimed(folder) if accelerator.is_main_process else None
    if accelerator.is_main_process and args.resume is None:
        for path in [path for path in folder.iterdir() if path.name != MARK]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    accelerator.wait_for_everyone()
    try:
        with sigterm_as_ctrl_c():
            yield folder
    except (Interrupted, KeyboardInterrupt) as stop:  # after a step; before, between and after the steps
        if isinstance(stop, Interrupted):
            said, number = str(stop), stop.signal
        else:
            said, number = "Stopped.", stop.args[0] if stop.args else signal.SIGINT
        way = "Nothing was trained yet; run the same command again."
        if goes_on(folder):
            way = f"Go on with --resume auto --output_dir {output_dir}."
        print(f"\n{said} {way}", file=sys.stderr)
        sys.exit(128 + number)
    except (ValueError, FloatingPointError, OSError, ImportError, SafetensorError) as error:
        full = no_space_left(error) and "Free" not in str(error)
        sys.exit(f"error: {error}" + f". Free some space on the disk of {folder}" * full)
    finally:
        if accelerator.is_main_process and folder.exists() and not goes_on(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    """Within it SIGTERM ends the work as Ctrl-C does, temporary files removed; the steps have a way of their own."""

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where signals cannot be taken
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def claimed(folder: Path) -> int:
    """A lock on the folder of a run, held until this process ends; the folder is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            sys.exit(f"error: {folder}, where the run would work, holds files of something else. Move them.")
        (folder / MARK).touch()
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        sys.exit(f"error: the folder {folder}, where the run would work, can't be made: {error}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another process is at work in {folder}. Wait for it, or choose another output_dir.")
    return handle


def prepare(args: RunArguments, accelerator: Accelerator) -> None:
    """The embedded default's data set and base model, where they are missing; once, on the main process."""
    if args.prepare == "openmoji":
        from examples.openmoji.prepare import prepare as prepare_openmoji

        with accelerator.main_process_first():
            prepare_openmoji(Path(args.dataset[0]), Path(args.model))


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
    model = load_model(args.model)
    wrapped = prepare_trainable(model, args)
    fingerprints = inputs.fingerprints(args)
    device = f"{device_description(accelerator.device)}, {accelerator.num_processes} processes"
    state = TrainerState(config=args.to_dict(), data=fingerprints, threads=threads(), device=device)
    checkpoints = Checkpoints(run_folder / "checkpoints", args.keep_last, accelerator)
    trainer = Trainer(
        args, seed, model, wrapped, inputs.planner(args, seed), inputs.images, accelerator,
        lambda trained: validate(args, trained, inputs), checkpoints, state,
        checkpoint_publisher(args, wrapped, inputs, run_folder),
    )  # fmt: skip
    with energy_of(args, accelerator) as energy:
        state = trainer.train(checkpoint_to_resume(args, checkpoints, state))
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return []
    save_adapters(wrapped, run_folder)
    model = merge_adapters(wrapped)
    if args.interpolate != 1:
        interpolate_weights(model, load_model(args.model).state_dict(), args.interpolate)
    model.save_pretrained(run_folder)
    inputs.processor.save_pretrained(run_folder)
    started = time.perf_counter()
    trained = embed_test(args, model, inputs)
    seconds = {"training": state.seconds, "evaluation": time.perf_counter() - started}
    model_folder = run_folder.relative_to(folder).as_posix()
    records = score(args, trained, "capivara", model_folder, seed)
    for language, embeddings in trained.items():
        facts = record_facts(args, language, "capivara", model_folder, seed)
        records += gain_records(baseline[language], embeddings, **facts)
    write_json(run_folder / "run.json", run_facts(args, seed, state, accelerator, seconds, inputs.skipped, energy))
    write_text(run_folder / "README.md", model_card(args, f"CAPIVARA ({args.language})"))
    plot_training_curves(state.curve, args.language, run_folder / "curves.png")
    draw_sheet(args, inputs, baseline, trained, run_folder / "retrieval.png")
    write_json(run_folder / "records.json", [asdict(record) for record in records])
    accelerator.wait_for_everyone()
    return records


def checkpoint_to_resume(args: RunArguments, checkpoints: Checkpoints, now: TrainerState) -> Path | None:
    """The checkpoint to go on from, checked to be of these settings and data; None for a run from the start."""
    checkpoints.clean()
    if args.resume is None or (args.resume == "auto" and not checkpoints.steps()):
        return None
    path = checkpoints.path(checkpoints.steps()[-1]) if args.resume == "auto" else Path(args.resume)
    there = read_state(path)
    check_same_run(there, now.config, now.data, path)
    logger.info("Going on from %s.", path)
    if there.device != now.device:
        logger.warning("The run was computed on %s, now on %s: its last bits will differ.", there.device, now.device)
    if there.threads != now.threads:
        logger.warning(
            "The run was computed with %s CPU threads, now there are %s: its last bits will differ. "
            "--num_threads %s keeps them.",
            there.threads, now.threads, there.threads,
        )  # fmt: skip
    return path


def check_settings_of_checkpoints(args: RunArguments, folder: Path) -> None:
    """Raise ValueError where what is to be resumed has other settings: before any long work, its data later."""
    if args.resume is None:
        return
    paths = [Path(args.resume)] if args.resume != "auto" else sorted(folder.rglob("checkpoints/step-*"))[-1:]
    for path in paths:
        check_files(path)
        check_same_run(read_state(path), args.to_dict(), {}, path)


def validate(args: RunArguments, model: CapivaraModel, inputs: Inputs) -> dict[str, float]:
    """Mean recall of the validation split in each direction, a share from 0 to 1, and its loss in nats."""
    model.eval()
    embeds = inputs.validation_embeds
    if embeds is None:
        embeds = embed_images(model, inputs.processor, inputs.validation.images(), args.embedding_batch_size)
    embeddings = embed_captions(model, inputs.processor, inputs.validation.captions(), embeds)
    return validation_measures(embeddings, model.logit_scale)


def embed_test(args: RunArguments, model: CapivaraModel, inputs: Inputs) -> dict[str, RetrievalEmbeddings]:
    """Language -> the test split in the model's space."""
    model.eval()
    embeds = inputs.test_embeds
    if args.towers == "both":
        images = inputs.test[args.language].images()
        embeds = embed_images(model, inputs.processor, images, args.embedding_batch_size, "Images, test")
    return {
        language: embed_captions(model, inputs.processor, split.captions(), embeds)
        for language, split in inputs.test.items()
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
        "dataset": short_name(args.evaluation_dataset),
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
    split = inputs.test[args.language]
    before, after = baseline[args.language], trained[args.language]
    texts = [text for texts in split.captions() for text in texts]
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(texts), generator=generator)[:SHEET_QUERIES].tolist()
    plot_retrieval_sheet(
        split.images(),
        [texts[i] for i in chosen],
        [int(after.image_of_text[i]) for i in chosen],
        {
            "Baseline": similarity_scores(before.text_embeds, before.image_embeds, chosen),
            "CAPIVARA": similarity_scores(after.text_embeds, after.image_embeds, chosen),
        },
        path,
    )


def report(args: RunArguments, records: list[Record], inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Result files, one a language, and the table of all."""
    for language in args.eval_languages:
        facts = header(
            dataset=args.evaluation_dataset,
            dataset_fingerprint=inputs.test[language].fingerprint,
            model=".",
            device=device_description(accelerator.device),
            precision="float32",
        )
        name = f"retrieval_{short_name(args.evaluation_dataset).replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(folder / "results" / name, [record for record in records if record.language == language], facts)
    write_text(folder / "table.md", retrieval_table(records))


if __name__ == "__main__":
    run_command(main)
