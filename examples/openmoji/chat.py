"""Caption OpenMoji's pictures and translate the captions with a chat server, then train a model on the dataset.

    python -m examples.openmoji.chat
    python -m examples.openmoji.chat --base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-3B-Instruct

Without `--base_url`, a stand-in server inside this command answers with the Portuguese names of the emoji. It shows how
the pipeline works, but not how good a language model is. With `--base_url`, the requests go to a real server.
docs/how-to/captions_server.md describes servers, prompts and flags.

The steps are the same as for any other dataset. If you run the command again, finished steps are not repeated.
"""

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict

from capivara_common.cli import check_at_least, flag, parse_arguments, read_yaml_config, run_main_and_report_user_errors
from capivara_common.files import write_text
from capivara_search.miniature_model import get_or_build_miniature_folder
from captions.build import BuildArguments, build_dataset
from captions.captioners.chat import convert_image_to_jpeg_data_url
from captions.chat.prompts import CaptionPrompts
from examples.chat_server import MODEL, ChatServer, run_stand_in_chat_server
from examples.openmoji.concepts import load_emoji_by_concept, split_concepts
from examples.openmoji.dataset import render_emoji_splits_as_dataset, save_dataset_with_english_names

# Captions that the stand-in server answers, one template per prompt. {} becomes the Portuguese name of the emoji.
CAPTION_TEMPLATES = ("{}", "um desenho de {}", "um emoji que mostra {}", "{}, desenho simples em fundo branco")
TRAINER = Path(__file__).resolve().parents[2] / "train_accelerate.py"
MAX_BATCH_SIZE = 64
# Flags of the training. It is too short for a good model, because it only has to show that all steps work.
TRAINING = {"micro_batch_size": 32, "warmup_steps": 1, "learning_rate": 2e-5}
TRAINING |= {"caption_strategy": "all", "min_learning_rate": 0, "weight_decay": 0}

logger = logging.getLogger("capivara")


@dataclass
class OpenMojiChatArguments:
    """Command-line arguments of `examples.openmoji.chat`, which captions emoji with a chat server.

    Raises:
        ValueError: If `images` or `evaluation_images` is below 20, or `max_steps` or `concurrency` is below 1.
    """

    base_url: list[str] = flag([], "Addresses of a real chat server. Default: a stand-in server inside this command.")
    model: str = flag(MODEL, "Name of the model on the server.")
    concurrency: int = flag(8, "Number of requests that are sent at the same time.")
    images: int = flag(200, "Number of images of the split train.")
    evaluation_images: int = flag(50, "Number of images of each of the splits validation and test.")
    max_steps: int = flag(5, "Training steps.")
    config: Path = flag(Path("configs/openmoji_chat.yaml"), "YAML config of `captions.build`, without server settings.")
    output: Path = flag(Path("data/openmoji/chat"), "Folder for the dataset and the training run.")

    def __post_init__(self) -> None:
        # The evaluation measures recall@10. With ten images or fewer, it would always be 1, so 20 are required.
        check_at_least(self, 20, "images", "evaluation_images")
        check_at_least(self, 1, "max_steps", "concurrency")


def _render_emoji_dataset(args: OpenMojiChatArguments) -> DatasetDict:
    """Build a dataset of emoji images with their English and Portuguese names.

    Args:
        args: Command-line arguments, which set the number of images of each split.
    """
    counts = {"train": args.images, "validation": args.evaluation_images, "test": args.evaluation_images}
    splits = split_concepts(load_emoji_by_concept())
    return render_emoji_splits_as_dataset({name: splits[name][:count] for name, count in counts.items()})


def _build_stand_in_answers(source: DatasetDict, image_side: int) -> Callable[[list[dict[str, Any]]], str]:
    """Build the function that answers chat requests from the Portuguese names of emoji, without a language model.

    Args:
        source: OpenMoji dataset with images and with English and Portuguese names.
        image_side: Side in pixels to which `captions.build` scales images for requests.

    Returns:
        Function that gets the messages of a request in OpenAI's format and returns the answer. It translates an English
        name, or captions an image by one of `CAPTION_TEMPLATES`. An unknown name is returned unchanged. An unknown
        image is called "imagem desconhecida".
    """
    # Prompt number i of `CaptionPrompts` gets template number i. An image is recognized by its bytes, so `image_side`
    # must be the side that `captions.build` uses.
    prompts, translations, by_image = CaptionPrompts(None, "pt").prompts, {}, {}
    for row in (row for split in source.values() for row in split):
        translations[row["captions-en"][0]] = row["captions-pt"][0]
        by_image[convert_image_to_jpeg_data_url(row["image"], image_side)] = row["captions-pt"][0]

    def answer(messages: list[dict[str, Any]]) -> str:
        content = messages[-1]["content"]
        if isinstance(content, str):
            return translations.get(content, content)
        prompt = content[-1]["text"]
        place = prompts.index(prompt) if prompt in prompts else 0
        name = by_image.get(content[0].get("image_url", {}).get("url"), "imagem desconhecida")
        return CAPTION_TEMPLATES[place % len(CAPTION_TEMPLATES)].format(name)

    return answer


def _build_dataset_and_train_model(args: OpenMojiChatArguments) -> Path:
    """Build the dataset with a chat server, train a model on it, and return the folder of the training run.

    Args:
        args: Command-line arguments.

    Raises:
        ValueError: If the config or a flag is invalid, if the server refuses requests, or if `output` has results of
            other settings.
        ConnectionError: If the server can't be reached.
        ImportError: If the packages of the extras `chat` and `demo` are not installed.
    """
    content, source = read_yaml_config(args.config), _render_emoji_dataset(args)
    content |= {"dataset": str(args.output / "english"), "output": str(args.output)}
    save_dataset_with_english_names(source, args.output / "english")
    with ExitStack() as stack:
        urls = args.base_url
        if not urls:
            logger.info(
                "No language model is used: a stand-in server answers with the names of the emoji. To use a real "
                "server, pass --base_url and --model."
            )
            answer = _build_stand_in_answers(source, int(content["generate"]["image_side"]))
            urls = [stack.enter_context(run_stand_in_chat_server(ChatServer(answer))).url]
        for section in ("generate", "translate"):
            content[section] |= {"base_url": urls, "model": args.model, "concurrency": args.concurrency}
        config = args.output / "config.yaml"
        write_text(config, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
        dataset = build_dataset(BuildArguments(config))
    run = args.output / "run"
    if not run.exists():
        flags = {"model": get_or_build_miniature_folder(), "dataset": dataset, "output_dir": run, "resume": "auto"}
        flags |= {"max_steps": args.max_steps, "eval_steps": args.max_steps, **TRAINING}
        flags["effective_batch_size"] = min(MAX_BATCH_SIZE, args.images)
        words = [*(f"--{name}={value}" for name, value in flags.items()), "--eval_languages", "pt", "en"]
        if status := subprocess.call([sys.executable, str(TRAINER), *words]):
            raise SystemExit(status)  # no message, because the trainer has already printed the reason
    return run


def main(argv: list[str] | None = None) -> None:
    """Run the command: build the dataset with a chat server, train a model on it, and print both folders.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(OpenMojiChatArguments, __doc__, argv)
    run = _build_dataset_and_train_model(args)
    print(f"Dataset and its card: {args.output / 'dataset'}\nTrained model, results and model card: {run}")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
