r"""Replace the images of a dataset by their embeddings, so that others can train on it without the images.

    python -m captions.embed --model data/openmoji/base --dataset data/openmoji/dataset --split all \
        --output data/openmoji/embedded
    python train_accelerate.py --config configs/openmoji.yaml --dataset data/openmoji/embedded

The output is a dataset with a card, which `datasets.load_dataset` opens and `hub_upload.push` publishes. It has all
columns but the image, and the columns of `caption_data.embedded`: the embedding, the digest of the image file, and the
digest of the image encoder. All commands that take images take it instead, with any model that has this image encoder.

Rows whose image cannot be used are skipped, and listed in skipped.jsonl. The folder OUTPUT.parts holds finished parts.
To finish an interrupted run, run the same command again.
"""

import glob
import logging
import os
import re
import shlex
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
from datasets import Value
from huggingface_hub import constants, hf_hub_download

from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.embedding_store import embed_batch
from capivara_common.executors import PhaseStep, run_phases
from capivara_common.files import check_output_folder, lock_folder
from capivara_common.image_files import BadImage, BadRow
from capivara_common.privacy import short_name
from capivara_common.tasks import Phase
from caption_data.augmentation import augment_view, describe_augmentation
from caption_data.embedded import DIGEST_COLUMN, EMBEDS_COLUMN, ENCODER_COLUMN, embeds_feature, image_encoder_of
from caption_data.rows import CAPTION_COLUMN_RE
from caption_data.sources import list_splits
from captions.stages import DECODED_KEY, RowStage, StageArguments
from modeling_capivara.loading import read_card_metadata
from modeling_capivara.two_towers import Embedder, load_embedder

logger = logging.getLogger("capivara")


@dataclass
class EmbedArguments(StageArguments):
    """Flags of the stage that replaces images by their embeddings."""

    uses_model = decodes_images = True
    accepts_embeds = keeps_images = False
    translations: ClassVar[dict[str, str]] = {}  # who translated each language, for the dataset card
    rerun_command: ClassVar[str] = ""  # command that writes missing rows; default: the command of this stage
    model: str | None = flag(
        None,
        "Model whose image encoder embeds the images (required): folder or Hub id of a CAPIVARA, SigLIP or CLIP model, "
        "open_clip:NAME:PRETRAINED, or open_clip:local-dir:FOLDER.",
    )
    views: int = flag(
        1, "Embeddings per image. 1: the image itself. N above 1: N augmentations, for --augmented_views N of training."
    )
    seed: int = flag(0, "Seed of the augmentations (with --views).")
    batch_rows: int = flag(64, "Rows to process at the same time.")
    embedding_batch_size: int = flag(32, "Images to embed at the same time.")
    precision: Literal["float32", "bf16"] = flag(
        "float32", "Data type of activations. bf16 is faster on most GPUs. Embeddings are stored in float16."
    )
    device: str | None = flag(None, "cpu or cuda. Default: cuda if a GPU is available, otherwise cpu.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("--model is missing. Choose the base model of the training.")
        check_at_least(self, 1, "views", "embedding_batch_size")
        check_at_least(self, 0, "seed")

    def command(self) -> str:
        """Return the shell command that writes missing rows."""
        return self.rerun_command or super().command()

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the model whose image encoder embeds the images.

        Args:
            stage: The opened rows; not used.

        Returns:
            The positional arguments of `RowStage.run`: columns, settings, and the function that embeds rows.

        Raises:
            ValueError, OSError, ImportError: If the model cannot be loaded.
        """
        embedder = load_embedder(self.model, self.device, True, self.precision)
        width = embedder.embed_images([PIL.Image.new("RGB", (32, 32))], 1).shape[1]
        settings = {
            "model": self.model,
            "encoder": image_encoder_of(self.model, embedder.fingerprint),
            "width": width,
            "precision": self.precision,
            "views": self.views,
            "augmentation": describe_augmentation(self.seed) if self.views > 1 else None,
        }
        columns = {EMBEDS_COLUMN: embeds_feature(width, self.views)}
        columns |= dict.fromkeys((DIGEST_COLUMN, ENCODER_COLUMN), Value("string"))
        return columns, settings, lambda rows: embed_rows(embedder, self, settings["encoder"], rows)


def embed_rows(
    embedder: Embedder, args: EmbedArguments, encoder: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any] | BadRow]:
    """Embed the images of rows.

    Args:
        embedder: Model that embeds images.
        args: Flags of the stage.
        encoder: Digest of the model's image encoder.
        rows: Rows with an image file, and its decoded image under the key `DECODED_KEY`.

    Returns:
        For each row, a dict with the new columns, or a BadImage if the image cannot be used.
    """
    digests = [blake2b(row[args.image_column]["bytes"], digest_size=16).hexdigest() for row in rows]
    images: list[PIL.Image.Image | BadImage] = []
    for row, digest in zip(rows, digests, strict=True):
        try:
            views = [augment_view(row[DECODED_KEY], digest, view, args.seed) for view in range(args.views)]
            images += views if args.views > 1 else [row[DECODED_KEY]]
        except ValueError as error:
            images += [BadImage("unreadable image", str(error))] * args.views
    vectors = embed_batch(images, partial(embedder.embed_images, batch_size=args.embedding_batch_size), True)
    results = []
    for number, digest in enumerate(digests):
        views = vectors[number * args.views : (number + 1) * args.views]
        bad = next((vector for vector in views if isinstance(vector, BadImage)), None)
        embeds = None if bad else [vector.numpy().astype(np.float16) for vector in views]
        row = {DIGEST_COLUMN: digest, ENCODER_COLUMN: encoder, EMBEDS_COLUMN: embeds}
        results.append(bad or (row if args.views > 1 else row | {EMBEDS_COLUMN: embeds[0]}))
    return results


# The command


@dataclass
class EmbedCommandArguments(EmbedArguments):
    """Command-line flags of `captions.embed`."""

    split: str = flag("train", "Split to embed; all: every split of the dataset.")
    license: str | None = flag(
        None, "License of the output, an identifier of the Hub such as cc-by-4.0. Default: the license of the dataset."
    )


def inherit_card(args: EmbedCommandArguments) -> dict[str, Any]:
    """Return the values that the card of the output takes from the card of the dataset.

    Args:
        args: Flags of the command.

    Returns:
        The section `card` of a build config, and the key `translations`.

    Raises:
        ValueError: If neither the flags nor the card of the dataset state a license. A license is never guessed.
    """
    path, url = Path(args.dataset), None
    card_path = (path if path.is_dir() else path.parent) / "README.md"
    if not path.exists() and not glob.has_magic(args.dataset):
        url = f"{constants.ENDPOINT}/datasets/{args.dataset}"
        with suppress(OSError, ValueError):
            card_path = Path(hf_hub_download(args.dataset, "README.md", repo_type="dataset"))
    card = read_card_metadata(card_path)
    license_id = args.license or card.get("license")
    if not isinstance(license_id, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise ValueError(
            f"The license of {args.dataset} must be one identifier of the Hub such as cc-by-4.0, got {license_id!r}. "
            "State it with --license."
        )
    inherited = {key: card[key] for key in ("license_name", "license_link", "attribution") if card.get(key)}
    name = short_name(args.dataset)
    return inherited | {
        "license": license_id,
        "pretty_name": f"{card.get('pretty_name') or name}: image embeddings",
        "description": "Captions with embeddings of their images, to train image-text models on without the images.",
        "sources": [{"name": name, "url": url, "license": str(card.get("license") or license_id)}],
        "translations": card.get("translations") or {},
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command `captions.embed`.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse_arguments(EmbedCommandArguments, __doc__, argv)
    card, parts = inherit_card(args), args.output.with_name(args.output.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.callback(os.close, lock_folder(parts))
        except BlockingIOError as error:
            raise ValueError(f"Another process is writing {args.output}. Wait for it, or change --output.") from error
        except OSError:  # some file systems have no locks
            logger.debug("%s can't be locked.", parts)
        if write_embedded_dataset(args, card, parts):
            folder = shlex.quote(str(args.output))
            print(f"The dataset is in {args.output}. Train on it with --model {args.model} --dataset {folder}.")
            print(f"Publish it with: python -m hub_upload.push --model {folder} --repo_id YOU/NAME --repo_type dataset")


def write_embedded_dataset(args: EmbedCommandArguments, card: dict[str, Any], parts: Path) -> bool:
    """Embed the images of all requested splits, and write the dataset.

    Args:
        args: Flags of the command.
        card: Values for the dataset card, from `inherit_card`.
        parts: Folder for the parts of each split.

    Returns:
        True if the dataset is complete. False if jobs were submitted to Slurm and are still to run.

    Raises:
        ValueError: If the dataset or the model can't be used, or the output folder has other files.
        OSError: If the disk is full. The same command then writes the rest.
    """
    from captions.build import BUILD_FILE, BuildPlan, write_dataset  # `captions.build` imports this module

    if not (args.output / BUILD_FILE).is_file():
        check_output_folder(args.output)
    steps: dict[str, list[StageArguments]] = {}
    flags = {field.name: getattr(args, field.name) for field in fields(EmbedArguments)}
    for split in list_splits(args.dataset) if args.split == "all" else [args.split]:
        step = EmbedArguments(**flags | {"split": split, "output": parts / "1-embed" / split})
        step = replace(step, logging_dir=args.log_folder / split)
        step.rerun_command, step.translations = args.command(), card["translations"]
        steps[split] = [step]
    columns = [name for name in step.source().columns if CAPTION_COLUMN_RE.fullmatch(name)]
    language = columns[0].split("captions-", 1)[1] if columns else ""
    plan = BuildPlan(steps, parts, language, card, args.output)
    phases = [phase for (step,) in steps.values() for phase in PhaseStep.from_phases(step, step.phases, step.title)]
    phases.append(PhaseStep(Phase(write_dataset), plan, args.log_folder / "dataset", "dataset"))
    return run_phases(phases, args)


if __name__ == "__main__":
    # Import this file as a named module, so that other processes can unpickle its classes.
    from captions import embed

    run_command(embed.main, resumable=True)
