"""What a run starts with: processes, log, threads, device, precision, optional packages and tracker."""

import atexit
import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from capivara_common.environment import require
from capivara_common.files import partial_folder
from training.arguments import RunArguments
from training.optimiser import hopeless_rate
from training.outputs import check_country

PROCESS_TIMEOUT = timedelta(hours=24)  # the others wait while the main one prepares, checks and measures
logger = logging.getLogger("capivara")


def resolve_precision(requested: str, device: torch.device) -> str:
    """ "auto" as "bf16" where the device computes in it natively, else "no"; anything else as it is.

    Without instructions of its own for bfloat16 a CPU emulates it, and is slower than in float32.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "no"


def join_processes() -> PartialState:
    """Accelerate's processes.

    Raises:
        ValueError: it has not joined those that were started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and of accelerate launch
    # Accelerate joins processes without a GPU only where `cpu` is set.
    options = {"timeout": PROCESS_TIMEOUT} if started > 1 else {}
    state = PartialState(cpu=started > 1 and not torch.cuda.is_available(), **options)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate has joined {state.num_processes}: each would train on a "
            "batch of its own. Launch with --num_processes 1, or with one of configs/accelerate/."
        )
    if started > 1:
        atexit.register(state.destroy_process_group)  # its threads may abort a process that ends beside them
    return state


def set_up_logging() -> None:
    """Show the run's messages in the terminal, one line each; of libraries only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("accelerate", "httpx", "httpx2"):  # the client of the Hub would show every request
        logging.getLogger(name).setLevel(logging.WARNING)


def create_accelerator(args: RunArguments, output_dir: Path) -> Accelerator:
    """Device, precision, processes and tracker of the run; nothing is written yet.

    Raises:
        ValueError: the settings do not fit the device or the number of processes.
        ImportError: a package that the settings need is not installed.
    """
    set_up_logging()
    # `accelerate launch` starts a lone process with one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if args.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU; use bf16, no or auto.")
    processes, micro_batches = PartialState().num_processes, args.micro_batches_per_step
    if processes > micro_batches:
        raise ValueError(
            f"{processes} processes can't share the {micro_batches} micro-batches of {args.micro_batch_size} in a "
            f"batch of {args.effective_batch_size}: each needs one. Use a smaller --micro_batch_size."
        )
    if (warning := hopeless_rate(args)) and PartialState().is_main_process:
        logger.warning("Warning: %s", warning)
    if args.carbon_country:
        require("--carbon_country", "carbon", "codecarbon")
        check_country(args.carbon_country)
    if args.lora_rank:
        require("--lora_rank", "lora", "peft")
    if args.tracker == "none":
        return Accelerator(mixed_precision=args.mixed_precision)
    require(f"--tracker {args.tracker}", "trackers" if args.tracker == "tensorboard" else None, args.tracker)
    folder = str(partial_folder(output_dir) / "trackers")
    return Accelerator(mixed_precision=args.mixed_precision, log_with=args.tracker, project_dir=folder)


def start_tracker(args: RunArguments, accelerator: Accelerator) -> None:
    """Let the tracker write into the folder of the run, the settings first; nothing without a tracker."""
    settings = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in args.to_dict().items()
    }
    accelerator.init_trackers("capivara", config=settings)
