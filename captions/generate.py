"""Captions of images, each begun by a prefix: BLIP-2 with its image encoder run once an image, or another captioner.

    python -m captions.generate --dataset data/images --output data/generated
    python -m captions.generate --dataset data/images --output data/generated --precision fp16 --workers 4

Every row gets `generated-captions-en`: one caption a prefix, which is the prefix, a blank and the generated text. The
ten prefixes of CAPIVARA's authors are in captions/prefixes.json; --prefixes takes another file of that form. Rows whose
image can't be used are left out and listed. The same command does what is missing, with the same captions.

What an image's prefixes share is computed once: of BLIP-2 the vision encoder, the Q-Former, and the language model's
reading of the image. BLIP, GIT and vision-encoder-decoder models encode the image anew for every prefix.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from capivara_common.cli import run_command
from capivara_common.environment import torch_device
from capivara_common.files import read_json
from capivara_common.hub_cache import check_reachable
from capivara_common.image_files import BadImage, BadRow, ImageFiles, by_threads, decode_image
from caption_data.rows import CAPTIONS
from captions.captioner import KINDS, Captioner
from captions.stage_arguments import GenerateArguments
from captions.stages import Phase, RowStage, StageReport, run_stage, stage_main
from captions.translators import DTYPES
from modeling_capivara.loading import checked_config, weights_digest

COLUMN = "generated-captions-en"


def generate(args: GenerateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """Write the parts of one task that are missing."""
    stage = RowStage(args, rank, world_size)  # before the model: what is wrong with the data is said at once
    if report := stage.done:
        return report
    prefixes = read_prefixes(args.prefixes)
    captioner = load_captioner(args)
    settings = {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,  # whatever folder it is in
        "revision": getattr(captioner.model.config, "_commit_hash", None),
        "weights": weights_digest(captioner.model),
        "prefixes": prefixes,
        "max_new_tokens": args.max_new_tokens,
        "precision": args.precision,
        "sampling": None,  # what earlier versions could do
    }
    return stage.run({COLUMN: CAPTIONS}, settings, GenerateProcess(captioner, prefixes, args), "Captions")


PHASES = {"rows": Phase(generate, shared=True, uses_model=True)}


def load_captioner(args: GenerateArguments) -> Captioner:
    """The model of the arguments. Raises ValueError or OSError where it is none, or none that continues a prefix."""
    if not Path(args.model).exists() and args.model.count("/") != 1:
        raise ValueError(f"{args.model!r} is neither a folder nor a Hub id such as {GenerateArguments.model}.")
    check_reachable(args.model, revision=args.revision)
    kind = checked_config(args.model, revision=args.revision).model_type
    if kind not in KINDS:
        raise ValueError(
            f"{args.model} is a model of the kind {kind!r}, which captions.generate does not know. Take one of "
            f"{', '.join(KINDS)}, such as {GenerateArguments.model}."
        )
    device, dtype = torch_device(args.device), DTYPES[args.precision]
    model = AutoModelForImageTextToText.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    return KINDS[kind](
        model.eval().to(device),
        AutoImageProcessor.from_pretrained(args.model, revision=args.revision),
        AutoTokenizer.from_pretrained(args.model, revision=args.revision),
        args.max_new_tokens,
        args.micro_batch_size,
    )


def read_prefixes(path: Path) -> list[str]:
    """What captions begin with, from a file of the form of captions/prefixes.json. Raises ValueError, OSError."""
    prefixes = read_json(path, prefixes=list)["prefixes"]
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise ValueError(f'{path} must hold {{"prefixes": [texts]}}, as captions/prefixes.json does.')
    prefixes = [prefix.strip() for prefix in prefixes]
    if not prefixes or not all(prefixes) or len(set(prefixes)) < len(prefixes):
        raise ValueError(f"{path} must hold one prefix at least, none blank and none twice; it holds {prefixes}.")
    return prefixes


@dataclass
class GenerateProcess:
    """Rows with an image -> their captions: a `Process`."""

    captioner: Captioner
    prefixes: list[str]
    args: GenerateArguments
    any_caption: bool = False  # since the start

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        """Raises ValueError where the memory does not suffice, or no image has got a caption since the start."""
        prepared = by_threads(self._prepared, rows)
        good = [image for image in prepared if not isinstance(image, BadRow)]
        if not good:
            return prepared
        try:
            captions = self.captioner.written(torch.cat(good), self.prefixes)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Out of memory with {len(good)} images and {self.args.micro_batch_size} captions at "
                f"once. Lower --micro_batch_size, then --batch_rows, or take --precision bf16 or fp16. ({error})"
            ) from error
        self.any_caption = self.any_caption or any(not isinstance(texts, BadRow) for texts in captions)
        if not self.any_caption:
            raise ValueError(f"No image has got a caption: {captions[0]}. Does the model work in this --precision?")
        rest = iter(captions)
        found = [image if isinstance(image, BadRow) else next(rest) for image in prepared]
        return [texts if isinstance(texts, BadRow) else {COLUMN: texts} for texts in found]

    def _prepared(self, row: dict[str, Any]) -> Tensor | BadRow:
        """Pixels (1, 3, height, width), or why there are none; the image is not kept."""
        try:
            image = decode_image(row[self.args.image_column], ImageFiles(max_pixels=self.args.max_pixels))
            image = image.convert("LA") if image.mode == "La" else image  # PIL has no way from La to RGB
            return self.captioner.pixels([image.convert("RGB")])
        except BadRow as error:
            return error
        except (ValueError, OSError) as error:
            return BadImage("unreadable image", str(error))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    stage_main(GenerateArguments, __doc__, argv, partial(run_stage, phases=PHASES))


if __name__ == "__main__":
    from captions import generate  # by its name, as other machines find it

    run_command(generate.main, resumes=True)
