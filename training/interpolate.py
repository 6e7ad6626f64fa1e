"""Interpolate the weights of a base model and its fine-tuned version (WiSE-FT, arXiv 2109.01903), without training.

    python -m training.interpolate models/base runs/pt --share 0.7 --output models/between

Each parameter is the weighted mean of both models; `--share` is the weight of the fine-tuned model. A share of 0.7 is
recommended (docs/explanation/recipe.md): fine-tuning on one language can make a model worse in other languages, and the
mean keeps more of the base model's quality there. Compare shares with `python -m eval.retrieval`. Processor and
configuration are copied from the fine-tuned model.
"""

from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import check_between, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import check_output_folder_and_clean_leftovers
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES
from training.rotate import load_rotation, rotate_model_, save_model_folder
from training.trainable import interpolate_weights


@dataclass
class InterpolateArguments:
    """Command-line arguments of `training.interpolate`, which averages the weights of a base and a trained model."""

    base: str = flag(..., "Base model: folder or Hub id.", positional=True)
    trained: str = flag(..., "Model that was fine-tuned from the base: folder or Hub id.", positional=True)
    output: Path = flag(..., "Folder for the new model; it must be new or empty.")
    share: float = flag(0.5, "Weight of the trained model, from 0 (only the base model) to 1 (only the trained model).")

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "share")


def main(argv: list[str] | None = None) -> None:
    """Run the command: average the weights of a base and a trained model, and write the result to a new folder.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        ValueError: If the models differ in the names or shapes of their tensors. If `training.rotate` has rotated the
            trained model, and its file rotation.safetensors is missing.
    """
    args = parse_arguments(InterpolateArguments, __doc__, argv)
    check_output_folder_and_clean_leftovers(args.output)
    base_model, model = load_model(args.base), load_model(args.trained)
    rotation = load_rotation(args.trained)
    # If `training.rotate` has rotated the trained model, the base needs the same rotation. Otherwise the interpolated
    # weights would mix two embedding spaces.
    if rotation is not None:
        rotate_model_(base_model, rotation)
    base, trained = base_model.state_dict(), model.state_dict()
    if {key: tensor.shape for key, tensor in trained.items()} != {key: tensor.shape for key, tensor in base.items()}:
        raise ValueError(
            f"{args.trained} was not trained from {args.base}: their tensors differ in name or shape. Give the base "
            "model that it was trained from."
        )
    images_differ = weights_digest(base_model, IMAGE_ENCODER_PREFIXES) != weights_digest(model, IMAGE_ENCODER_PREFIXES)
    if rotation is None and getattr(model.config, "matryoshka_dims", None) and images_differ:
        raise ValueError(
            f"{args.trained} was rotated by training.rotate, but its rotation.safetensors is missing. Copy the file "
            "back into the folder."
        )
    interpolate_weights(model, base, args.share)
    save_model_folder(args.output, model, load_processor(args.trained), rotation)
    print(f"Wrote the interpolated model to {args.output}. The weight of the trained model is {args.share:g}.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
