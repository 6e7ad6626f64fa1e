"""Caption and translate OpenMoji with a server of a language model, build a dataset, and train a model on it.

    python -m examples.openmoji.chat
    python -m examples.openmoji.chat --base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-3B-Instruct

Without `--base_url`, a stand-in server answers, which runs inside the command and needs no language model: it knows
the Portuguese names of all emoji, so that its answers show how the pipeline works, but not how good a model is. With
`--base_url`, the same requests go to a real server. docs/how-to/captions_server.md describes servers, prompts and
flags.

The base model is the small model of the search (`capivara_search/miniature.py`). The steps are those of any dataset:
a config (configs/openmoji_chat.yaml), `captions.build`, and `train_accelerate.py`. Finished steps are not repeated.
"""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict

from capivara_common.cli import check_at_least, flag, parse_arguments, read_yaml_config, run_command
from capivara_common.files import atomic_folder, write_text
from capivara_search.miniature import get_miniature_folder
from captions.build import BuildArguments, build_dataset
from captions.captioners.chat import to_data_url
from captions.chat.prompts import CaptionPrompts
from examples.chat_server import MODEL, ChatServer, run_chat_server
from examples.openmoji.concepts import load_concepts, split_concepts
from examples.openmoji.dataset import render_splits

ENGLISH, NAMES = "captions-en", "captions-pt"
# What the stand-in answers to the prompts for captions, in turn.
CAPTION_TEMPLATES = ("{}", "um desenho de {}", "um emoji que mostra {}", "{}, desenho simples em fundo branco")
TRAINER = Path(__file__).resolve().parents[2] / "train_accelerate.py"
MAX_BATCH_SIZE = 64
# Flags of the training, which is too short for a good model.
TRAINING = {"micro_batch_size": 32, "warmup_steps": 1, "learning_rate": 2e-5}
TRAINING |= {"caption_strategy": "all", "min_learning_rate": 0, "weight_decay": 0}
SERVER_SECTIONS = ("generate", "translate")  # sections of the config that need a server

logger = logging.getLogger("capivara")


@dataclass
class OpenMojiChatArguments:
    """Command-line flags of `python -m examples.openmoji.chat`."""

    base_url: list[str] = flag([], "Addresses of a real server. Default: a stand-in that runs inside the command.")
    model: str = flag(MODEL, "Name of the model on the server.")
    concurrency: int = flag(8, "Requests in flight at the same time.")
    images: int = flag(200, "Number of images of the split train.")
    evaluation_images: int = flag(50, "Number of images of each of the splits validation and test.")
    max_steps: int = flag(5, "Training steps.")
    config: Path = flag(Path("configs/openmoji_chat.yaml"), "Configuration of `captions.build` without a server.")
    output: Path = flag(Path("data/openmoji/chat"), "Folder of the dataset and of the run.")

    def __post_init__(self) -> None:
        # Recall among ten results is measured, which needs more images than results.
        check_at_least(self, 20, "images", "evaluation_images")
        check_at_least(self, 1, "max_steps", "concurrency")


@dataclass
class EmojiNames:
    """Answers of the stand-in: the Portuguese names of emoji.

    Attributes:
        translations: Portuguese name by English name.
        by_image: Portuguese name by digest of the data URL of the image.
        prompts: The prompts for captions, each of which has an answer of its own.
    """

    translations: dict[str, str] = field(default_factory=dict)
    by_image: dict[str, str] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    def answer(self, messages: list[dict[str, Any]]) -> str:
        """Return the translation of an English name, or a caption of an image.

        Args:
            messages: Messages of a request. Only the last one counts.
        """
        content = messages[-1]["content"]
        if isinstance(content, str):
            return self.translations.get(content, content)
        prompt = content[-1]["text"]
        place = self.prompts.index(prompt) if prompt in self.prompts else 0
        name = self.by_image.get(_digest(content[0].get("image_url", {}).get("url", "")), "imagem desconhecida")
        return CAPTION_TEMPLATES[place % len(CAPTION_TEMPLATES)].format(name)


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def render_pictures(args: OpenMojiChatArguments) -> DatasetDict:
    """Draw the images of each split, as many as the flags say. The dataset has English and Portuguese names."""
    counts = {"train": args.images, "validation": args.evaluation_images, "test": args.evaluation_images}
    splits = split_concepts(load_concepts())
    return render_splits({name: splits[name][:count] for name, count in counts.items()})


def save_english_dataset(source: DatasetDict, folder: Path) -> None:
    """Save the images with a single English name each, and without Portuguese, unless the folder exists."""
    if not folder.exists():
        with atomic_folder(folder) as new:
            english = source.remove_columns([NAMES])
            english.map(lambda row: {ENGLISH: row[ENGLISH][:1]}, desc="English names").save_to_disk(new)


def read_names(source: DatasetDict, image_side: int) -> EmojiNames:
    """Read the answers of the stand-in from the dataset with both languages.

    Args:
        source: OpenMoji dataset with images and with English and Portuguese names.
        image_side: Side of the images in requests, in pixels.
    """
    names = EmojiNames(prompts=CaptionPrompts(None, "pt").prompts)
    for row in (row for split in source.values() for row in split):
        names.translations[row[ENGLISH][0]] = row[NAMES][0]
        names.by_image[_digest(to_data_url(row["image"], image_side))] = row[NAMES][0]
    return names


@contextmanager
def open_server(args: OpenMojiChatArguments, names: EmojiNames) -> Iterator[list[str]]:
    """Yield the addresses of the server: those of the flags, or that of a stand-in that runs during the `with` block.

    Args:
        args: Flags of the command.
        names: Answers of the stand-in.
    """
    if args.base_url:
        yield args.base_url
        return
    logger.info(
        "No language model runs: a stand-in answers with the names of the emoji. For a real server, use --base_url and "
        "--model."
    )
    with run_chat_server(ChatServer(names.answer)) as server:
        yield [server.url]


def run_example(args: OpenMojiChatArguments) -> Path:
    """Build the dataset with a server, train a model on it, and return the folder of the run.

    Args:
        args: Flags of the command.

    Raises:
        ValueError: If the config or a flag is invalid, the server refuses requests, or `output` has results of other
            settings.
        ConnectionError: If the server cannot be reached.
        ImportError: If the packages of the extras `chat` and `demo` are not installed.
    """
    content, source = read_yaml_config(args.config), render_pictures(args)
    content |= {"dataset": str(args.output / "english"), "output": str(args.output)}
    save_english_dataset(source, args.output / "english")
    names = read_names(source, int(content["generate"]["image_side"]))
    with open_server(args, names) as urls:
        for section in SERVER_SECTIONS:
            content[section] |= {"base_url": urls, "model": args.model, "concurrency": args.concurrency}
        config = args.output / "config.yaml"
        write_text(config, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
        dataset = build_dataset(BuildArguments(config))
    run = args.output / "run"
    if not run.exists():
        flags = {
            "model": get_miniature_folder(),
            "dataset": dataset,
            "output_dir": run,
            "caption_strategy": "all",
            "resume": "auto",
        }
        flags |= {
            "effective_batch_size": min(MAX_BATCH_SIZE, args.images),
            "max_steps": args.max_steps,
            "eval_steps": args.max_steps,
            **TRAINING,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += ["--eval_languages", "pt", "en"]
        if status := subprocess.call([sys.executable, str(TRAINER), *words]):
            raise SystemExit(status)  # the trainer has printed the reason
    return run


def main(argv: list[str] | None = None) -> None:
    """Run the command, and print the folders of the dataset and of the run.

    Args:
        argv: Command-line arguments. Default: those of the process.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(OpenMojiChatArguments, __doc__, argv)
    run = run_example(args)
    print(f"Dataset and its card: {args.output / 'dataset'}\nTrained model, results and model card: {run}")


if __name__ == "__main__":
    run_command(main, resumable=True)
