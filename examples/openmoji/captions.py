"""Try the caption pipeline on OpenMoji's emoji: translate captions, score and select them, and write a dataset card.

    python -m examples.openmoji.captions
    accelerate launch train_accelerate.py --config configs/openmoji.yaml --dataset data/openmoji/captions/dataset

Usually, the pipeline `captions.build` stops, so that a person translates tables of captions. This example fills in the
Portuguese Unicode names of the emoji instead. The second command trains a model on the selected captions.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict, concatenate_datasets

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import write_text
from captions.build import BuildArguments, ManualStepRequired, build_dataset, read_build_plan
from captions.select import REPORT_PAGE
from captions.translation_tables import escape_cell, unescape_cell
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths, save_dataset_with_english_names


@dataclass
class OpenMojiCaptionsArguments:
    """Command-line arguments of `examples.openmoji.captions`, which builds a caption dataset of emoji."""

    source: Path = flag(Path("data/openmoji/dataset"), "OpenMoji dataset that `examples.openmoji.prepare` writes.")
    config: Path = flag(Path("configs/openmoji_captions.yaml"), "YAML file with the config of `captions.build`.")


def build_openmoji_caption_dataset(args: OpenMojiCaptionsArguments) -> Path:
    """Build a Portuguese caption dataset from OpenMoji's English names, with the pipeline `captions.build`.

    The translations are the Portuguese Unicode names of the emoji.

    Args:
        args: Command-line arguments: the folder of the OpenMoji dataset and the config of the pipeline.

    Returns:
        Folder of the finished dataset.

    Raises:
        ValueError: If the OpenMoji dataset or the base model is missing, or if an output folder was built with other
            settings.
    """
    if not (args.source / "dataset_dict.json").is_file():
        raise ValueError(f"{args.source} is not a dataset. Make it first: python -m examples.openmoji.prepare")
    plan = read_build_plan(args.config)
    source = load_dataset_and_refuse_image_paths(args.source)
    english = Path(next(iter(plan.steps.values()))[0].dataset)
    save_dataset_with_english_names(source, english)
    try:
        return build_dataset(BuildArguments(args.config))
    except ManualStepRequired:
        # The pipeline has exported tables for a person to translate.
        tables = [step.import_file for step in plan.all_steps() if getattr(step, "import_file", None)]
        _write_portuguese_names_into_table_files(tables, source)
    return build_dataset(BuildArguments(args.config))


def _write_portuguese_names_into_table_files(tables: list[Path], source: DatasetDict) -> None:
    """Fill in the translations in tables of English names, with the Portuguese names of the same emoji.

    Args:
        tables: TSV files that `captions.build` exported. Their columns are a row key, the English name and the
            translation. Files that do not exist are skipped.
        source: OpenMoji dataset with English and Portuguese names.
    """
    columns = concatenate_datasets([*source.values()]).select_columns(["captions-en", "captions-pt"])
    portuguese = {row["captions-en"][0]: row["captions-pt"][0] for row in columns}
    for table in tables:
        if table.is_file():
            lines = table.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines[1:], 1):
                key, english = line.split("\t")[:2]
                lines[number] = f"{key}\t{english}\t{escape_cell(portuguese[unescape_cell(english)])}"
            write_text(table, "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command: build the caption dataset, and print its folder and the command that trains on it.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = build_openmoji_caption_dataset(parse_arguments(OpenMojiCaptionsArguments, __doc__, argv))
    report = folder.parent / "3-select" / "train" / REPORT_PAGE
    print(
        f"Dataset: {folder}\nReport of the selection: {report}\nTrain on it: accelerate launch train_accelerate.py "
        f"--config configs/openmoji.yaml --dataset {folder}"
    )


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
