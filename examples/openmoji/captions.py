"""OpenMoji through the caption pipeline: English captions out, Portuguese ones in, scored, selected, with a card.

    python -m examples.openmoji.captions
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --dataset data/openmoji/captions/dataset

What a person does between the two runs of `captions.build`, translating the tables, is done here with the Portuguese
Unicode names of the same emoji. The second command trains on what was selected.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, write_text
from captions.build import BuildArguments, ManualStepRequired, build_dataset, read_build_plan
from captions.select import REPORT_PAGE
from captions.translation_tables import escape_cell, unescape_cell
from examples.openmoji.dataset import load_dataset_with_images


@dataclass
class OpenMojiCaptionsArguments:
    """Arguments of `examples.openmoji.captions`."""

    source: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    config: Path = flag(Path("configs/openmoji_captions.yaml"), "Config of the build.")


def build_openmoji(args: OpenMojiCaptionsArguments) -> Path:
    """The data set of the config; returns its folder.

    Raises:
        ValueError: the data set or the base model is missing, or a folder is of other settings.
    """
    if not (args.source / "dataset_dict.json").is_file():
        raise ValueError(f"{args.source} is no data set. Make it first: python -m examples.openmoji.prepare")
    plan = read_build_plan(args.config)
    source = load_dataset_with_images(args.source)
    english = Path(next(iter(plan.steps.values()))[0].dataset)
    if not english.exists():
        with atomic_folder(english) as folder:
            # Without English aliases, too: Unicode has no Portuguese ones to translate them by.
            official = source.remove_columns(["captions-pt"])
            official.map(lambda row: {"captions-en": row["captions-en"][:1]}, desc="English names").save_to_disk(folder)
    try:
        return build_dataset(BuildArguments(args.config))
    except ManualStepRequired:
        fill_tables([step.import_file for step in plan.all_steps() if getattr(step, "import_file", None)], source)
    return build_dataset(BuildArguments(args.config))


def fill_tables(tables: list[Path], source: DatasetDict) -> None:
    """Put the Portuguese name of its emoji beside every English one, in those tables that are there."""
    portuguese = {
        row["captions-en"][0]: row["captions-pt"][0]
        for split in source.values()
        for row in split.select_columns(["captions-en", "captions-pt"])
    }
    for table in tables:
        if table.is_file():
            head, *lines = table.read_text(encoding="utf-8").splitlines()
            cells = (line.split("\t")[:2] for line in lines)
            filled = [
                f"{name}\t{sentence}\t{escape_cell(portuguese[unescape_cell(sentence)])}" for name, sentence in cells
            ]
            write_text(table, "\n".join([head, *filled]) + "\n")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = build_openmoji(parse_arguments(OpenMojiCaptionsArguments, __doc__, argv))
    report = folder.parent / "3-select" / "train" / REPORT_PAGE
    print(
        f"Data set: {folder}\nReport of the selection: {report}\nTrain on it: accelerate launch train_accelerate.py "
        f"--config configs/openmoji.yaml --dataset {folder}"
    )


if __name__ == "__main__":
    run_command(main, resumable=True)
