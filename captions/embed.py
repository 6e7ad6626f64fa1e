r"""Replace the images of a dataset by their embeddings, so that others can train on it without the images.

    python -m captions.embed --model data/openmoji/base --dataset data/openmoji/dataset --split all \
        --output data/openmoji/embedded
    python train_accelerate.py --config configs/openmoji.yaml --dataset data/openmoji/embedded

The output is a dataset with a card, which `hub_upload.push` can publish. Instead of the image, each row has the
embedding of the image, a hash of the image file, and a hash of the image encoder. Training and other commands can use
the dataset if their model has the same image encoder.

Rows whose image can't be used are skipped, and listed in skipped.jsonl. To continue an interrupted run, run the same
command again: finished rows are stored in the folder OUTPUT.parts.
"""

import glob
import logging
import re
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.executors import PhaseStep, run_phases
from capivara_common.files import check_output_folder_and_clean_leftovers, locked_folder
from capivara_common.privacy import get_publishable_model_or_dataset_name
from capivara_common.tasks import Phase
from caption_data.rows import CAPTION_COLUMN_RE
from caption_data.sources import list_splits
from captions.build import BUILD_FILE, BuildPlan, write_dataset
from captions.embedding_stage import EmbedArguments
from captions.stages import StageArguments
from modeling_capivara.loading import read_card_metadata

logger = logging.getLogger("capivara")


@dataclass
class EmbedCommandArguments(EmbedArguments):
    """Command-line arguments of `captions.embed`, which replaces the images of a dataset by their embeddings."""

    split: str = flag("train", "Name of the split to embed, or all to embed every split of the dataset.")
    license: str | None = flag(
        None, "License of the output, an identifier of the Hub such as cc-by-4.0. Default: the license of the dataset."
    )


def _read_inherited_card_values(args: EmbedCommandArguments) -> dict[str, Any]:
    """Return the values for the card of the output that come from the card of the source dataset.

    Args:
        args: Command-line arguments.

    Returns:
        A dict with the keys of the section `card` of a build config, such as "license" and "sources", and with the key
        "translations" (`{language code: "human" or "machine"}`).

    Raises:
        ValueError: If neither the flags nor the card of the dataset state a license. A license is never guessed.
    """
    path, url, hint = Path(args.dataset), None, "Set it with --license."
    card_path = (path if path.is_dir() else path.parent) / "README.md"
    if not path.exists() and not glob.has_magic(args.dataset):
        url = f"{constants.ENDPOINT}/datasets/{args.dataset}"
        try:
            card_path = Path(hf_hub_download(args.dataset, "README.md", repo_type="dataset"))
        except (OSError, ValueError):
            hint = "There is no such folder or file, and the Hub gave no card. Check --dataset, or set --license."
    card = read_card_metadata(card_path)
    license_id = args.license or card.get("license")
    if not isinstance(license_id, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise ValueError(
            f"The license of {args.dataset} must be one identifier of the Hub such as cc-by-4.0, got {license_id!r}. "
            f"{hint}"
        )
    keys = ("attribution",) if args.license else ("attribution", "license_name", "license_link")
    inherited = {key: card[key] for key in keys if card.get(key)}
    name = get_publishable_model_or_dataset_name(args.dataset)
    return inherited | {
        "license": license_id,
        "pretty_name": f"{card.get('pretty_name') or name}: image embeddings",
        "description": "Captions with embeddings of their images, to train image-text models on without the images.",
        "sources": [{"name": name, "url": url, "license": str(card.get("license") or license_id)}],
        "translations": card.get("translations") or {},
    }


def _plan_phases(args: EmbedCommandArguments, parts: Path) -> list[PhaseStep]:
    """Check everything that can be checked without a run, and return the phases of the command. Nothing is written.

    A phase is a step of the command. Several processes can share the work of the phases that embed images.

    Args:
        args: Command-line arguments.
        parts: Folder for the finished rows of each split.

    Returns:
        The phases, in the order in which they run: those that embed the images of each split, and the phase that writes
        the dataset.

    Raises:
        ValueError: If the license is missing. If the model or the dataset can't be used. If the output folder has other
            files.
    """
    card = _read_inherited_card_values(args)
    args.check_model()
    if not (args.output / BUILD_FILE).is_file():
        check_output_folder_and_clean_leftovers(args.output)
    steps: dict[str, list[StageArguments]] = {}
    for split in list_splits(args.dataset) if args.split == "all" else [args.split]:
        step = replace(args, split=split, output=parts / "1-embed" / split, logging_dir=args.log_folder / split)
        step.rerun_command, step.translations = args.command(), card["translations"]
        steps[split] = [step]
    columns = [name for name in step.source().columns if CAPTION_COLUMN_RE.fullmatch(name)]
    language = columns[0].split("captions-", 1)[1] if columns else ""
    plan = BuildPlan(steps, parts, language, card, args.output)
    phases = [phase for (step,) in steps.values() for phase in PhaseStep.from_phases(step, step.phases, step.title)]
    return [*phases, PhaseStep(Phase(write_dataset), plan, args.log_folder / "dataset", "dataset")]


def main(argv: list[str] | None = None) -> None:
    """Run the command: replace the images of a dataset by their embeddings.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse_arguments(EmbedCommandArguments, __doc__, argv)
    parts = args.output.with_name(args.output.name + ".parts")
    phases = _plan_phases(args, parts)
    if args.dry_run:
        print(f"Dataset, license and model can be used. The command would write {args.output}.")
        return
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(parts))
        except BlockingIOError as error:
            raise ValueError(f"Another process is writing {args.output}. Wait for it, or change --output.") from error
        if run_phases(phases, args):
            folder = shlex.quote(str(args.output))
            print(f"The dataset is in {args.output}. Train on it with --model {args.model} --dataset {folder}.")
            print(f"Publish it with: python -m hub_upload.push --model {folder} --repo_id YOU/NAME --repo_type dataset")


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import embed

    run_main_and_report_user_errors(embed.main, resumable=True)
