"""Train one demo model per language on the same image embeddings, and measure how much each language's recall improves.

    python -m examples.openmoji.languages
    python -m examples.openmoji.languages --languages pt ja tr

The images are OpenMoji's, embedded once by `captions.embed`. The captions are the names of the emoji in all languages
of the package `emoji`. All languages are measured on the same unseen concepts. The base model is trained on English
names only.

The results are written after each language. docs/reference/languages.md shows them. To finish an interrupted run, or to
add languages, run the command again. A language takes about three minutes on two CPU threads.
"""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict, List, Value
from tqdm.auto import tqdm

import captions.embed
import train_accelerate
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import describe_device, package_versions
from capivara_common.files import atomic_folder, read_json, write_json, write_text
from eval.records.result_files import read_records
from examples.openmoji.concepts import EmojiPicture, load_emoji_by_concept, load_emoji_names, split_concepts
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths, render_emoji_splits_as_dataset
from examples.openmoji.prepare import train_and_save_base_model

# `{language code: English name}` for each language of the package `emoji`, without English.
LANGUAGES = {
    "pt": "Portuguese", "es": "Spanish", "it": "Italian", "fr": "French", "de": "German", "tr": "Turkish",
    "id": "Indonesian", "ru": "Russian", "ja": "Japanese", "ko": "Korean", "zh": "Chinese", "ar": "Arabic",
    "fa": "Persian",
}  # fmt: skip
CARD = """---
license: cc-by-sa-4.0
pretty_name: OpenMoji in {count} languages
attribution: "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
---

# OpenMoji in {count} languages

OpenMoji's pictures with their names in English and in the {further} other languages of the PyPI package `emoji`
(Unicode License v3). Pictures that share a name in any of the languages are in the same split.
"""
logger = logging.getLogger("capivara")


@dataclass
class LanguagesArguments:
    """Command-line arguments of `examples.openmoji.languages`, which trains one demo model per language.

    Raises:
        ValueError: If a language is unknown or no language is given.
    """

    languages: list[str] = flag([*LANGUAGES], "Codes of the languages to train, one model per language.")
    work: Path = flag(Path("data/openmoji/languages"), "Folder for dataset, base model, embeddings and runs.")
    config: Path = flag(Path("configs/openmoji.yaml"), "YAML file with the training flags.")
    output: Path = flag(Path("benchmarks/results/openmoji_languages.json"), "JSON file for the results.")

    def __post_init__(self) -> None:
        unknown = [code for code in self.languages if code not in LANGUAGES]
        if unknown or not self.languages:
            raise ValueError(f"languages must be some of {' '.join(LANGUAGES)}, got {' '.join(unknown) or 'none'}.")
        self.languages = list(dict.fromkeys(self.languages))


def _add_caption_columns(splits: dict[str, list[EmojiPicture]], data: DatasetDict) -> DatasetDict:
    """Add a column of captions for each language to a dataset of OpenMoji's images.

    Args:
        splits: Emoji of each split by its name, from `split_concepts`.
        data: Dataset of the same splits with English and Portuguese captions, from `render_emoji_splits_as_dataset`.

    Returns:
        The dataset with a column "captions-CODE" for each code of `LANGUAGES`.
    """
    results = DatasetDict()
    for split, pictures in splits.items():
        rows = data[split]
        for code in LANGUAGES:
            if code != "pt":  # the dataset already has Portuguese captions
                names = load_emoji_names(code, pictures)
                texts = [[names[picture.emoji]] for picture in pictures]
                rows = rows.add_column(f"captions-{code}", texts, feature=List(Value("string")))
        results[split] = rows
    return results


def _build_missing_base_model_and_embeddings(work: Path) -> tuple[Path, Path]:
    """Build the image dataset, the base model and the dataset of image embeddings, unless they exist.

    Args:
        work: Folder in which all three are stored.

    Returns:
        Tuple of the folder of the base model and the folder of the dataset of embeddings.

    Raises:
        ImportError: If a package of the `demo` extra is not installed.
    """
    dataset, base, embedded = work / "dataset", work / "base", work / "embedded"
    if not (dataset / "dataset_dict.json").is_file():
        # Images that share a name in any language share a split, so no language is tested on a concept of training.
        splits = split_concepts(load_emoji_by_concept([*LANGUAGES]))
        data = _add_caption_columns(splits, render_emoji_splits_as_dataset(splits))
        with atomic_folder(dataset) as folder:
            data.save_to_disk(folder)
            write_text(folder / "README.md", CARD.format(count=len(LANGUAGES) + 1, further=len(LANGUAGES)))
    if not (base / "config.json").is_file():
        logger.info("Preparing the base model in %s (once): it takes about ten minutes.", base)
        with atomic_folder(base) as folder:
            train_and_save_base_model(load_dataset_and_refuse_image_paths(dataset), folder, "contrastive", [*LANGUAGES])
    paths = {"model": base, "dataset": dataset, "output": embedded}
    captions.embed.main([f"--{name}={path}" for name, path in paths.items()] + ["--split=all", "--device=cpu"])
    return base, embedded


def _train_and_evaluate_language(code: str, args: LanguagesArguments, base: Path, embedded: Path) -> dict[str, Any]:
    """Train and evaluate a model for one language, unless this was done before, and return the results.

    Args:
        code: Code of the language.
        args: Command-line arguments.
        base: Folder of the base model.
        embedded: Folder of the dataset of embeddings.

    Returns:
        `{"name": English name of the language, "seconds": duration of training and evaluation, "records": mean recalls
        and their gains}`, of the base model and the trained model, for the language and for English.
    """
    folder = args.work / "runs" / code
    if not (folder / "run.json").is_file():
        flags = {"config": args.config, "model": base, "dataset": embedded, "language": code, "output_dir": folder}
        words = [f"--{name}={value}" for name, value in flags.items()]
        train_accelerate.main([*words, "--eval_languages", code, "en", "--resume", "auto"])
    records = [record for path in sorted(folder.glob("results/*.json")) for record in read_records(path)]
    chosen = [asdict(record) for record in records if record.metric in ("mean_recall", "mean_recall_gain")]
    seconds = sum(read_json(folder / "run.json")["seconds"].values())
    return {"name": LANGUAGES[code], "seconds": seconds, "records": chosen}


def main(argv: list[str] | None = None) -> None:
    """Run the command: train and measure a model for each requested language, and write the results after each.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(LanguagesArguments, __doc__, argv)
    base, embedded = _build_missing_base_model_and_embeddings(args.work)
    results: dict[str, Any] = {}
    conditions = {"date": time.strftime("%Y-%m-%d"), "device": describe_device(), "versions": package_versions("emoji")}
    for code in tqdm(args.languages, desc="Languages", unit="language"):
        results[code] = _train_and_evaluate_language(code, args, base, embedded)
        write_json(args.output, conditions | {"languages": results})
    print(f"Results: {args.output}. `python -m benchmarks.documentation_tables` updates the table.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
