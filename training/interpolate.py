"""Weights between a base and what was trained from it (WiSE-FT), without training again.

    python -m training.interpolate models/base runs/pt --share 0.7 --output models/between

0.7 is the recipe's (docs/recipe.md); `python -m eval.retrieval` measures what other shares gain and keep. The processor
and the configuration are those of the trained model.
"""

from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import check_between, flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, check_output_folder
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES
from training.rotate import load_rotation, rotate_model_, save_rotation
from training.trainable import interpolate_weights

MEASURED = "give --share, 0.7 as in docs/recipe.md, and measure models of several shares by `python -m eval.retrieval`"


@dataclass
class InterpolateArguments:
    """Arguments of `training.interpolate`."""

    gone = dict.fromkeys(("validation", "split", "languages", "max_loss"), MEASURED)

    base: str = flag(..., "Folder or Hub id of the model before training.", positional=True)
    trained: str = flag(..., "Folder or Hub id of the model after training.", positional=True)
    output: Path = flag(..., "Folder of the new model.")
    share: float = flag(0.5, "Of the trained weights, 0 to 1.")

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "share")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(InterpolateArguments, __doc__, argv)
    check_output_folder(args.output)
    start, model = load_model(args.base), load_model(args.trained)
    rotation = load_rotation(args.trained)
    if rotation is not None:  # the space that was trained in is the base's, rotated
        rotate_model_(start, rotation)
    base, trained = start.state_dict(), model.state_dict()
    if {key: tensor.shape for key, tensor in trained.items()} != {key: tensor.shape for key, tensor in base.items()}:
        raise ValueError(f"{args.trained} was not trained from {args.base}: their tensors differ in name or shape.")
    turned = weights_digest(start, IMAGE_ENCODER_PREFIXES) != weights_digest(model, IMAGE_ENCODER_PREFIXES)
    if rotation is None and getattr(model.config, "matryoshka_dims", None) and turned:
        raise ValueError(f"{args.trained} was rotated, and its rotation.safetensors is missing. Fetch the file.")
    interpolate_weights(model, base, args.share)
    with atomic_folder(args.output) as folder:
        model.save_pretrained(folder)
        load_processor(args.trained).save_pretrained(folder)
        if rotation is not None:
            save_rotation(rotation, folder)
    print(f"Written to {args.output}, with {args.share:g} of the trained weights.")


if __name__ == "__main__":
    run_command(main)
