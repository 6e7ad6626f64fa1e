"""Weights between a base and what was trained from it (WiSE-FT), without training again.

    python -m training.interpolate models/base runs/pt --share 0.5 --output models/half

The processor and the configuration are those of the trained model. `eval` measures what is gained and lost.
"""

from common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("training.arguments:InterpolateArguments", __doc__)

from pathlib import Path

from common.cli import parse, run_command, user_errors
from common.files import whole_folder
from modeling_capivara.loading import load_model, load_processor
from training.arguments import InterpolateArguments
from training.matryoshka import load_rotation, rotate_, save_rotation
from training.trainable import interpolate_weights


def interpolate(base: str, trained: str, share: float, output: Path) -> None:
    """Write a model folder with `share` of the trained weights and the rest of the base's.

    Raises:
        ValueError: the share is not from 0 to 1, the two models differ in shape, or `output` is not empty.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share:g}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"The output folder {output} is not empty. Choose another one.")
    model, before, rotation = load_model(trained), load_model(base), load_rotation(trained)
    if rotation is not None:  # the trained model's space is the base's, turned
        rotate_(before, rotation)
    base_state = before.state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in base_state.items()}:
        raise ValueError(f"{trained} was not trained from {base}: their tensors differ in name or shape.")
    interpolate_weights(model, base_state, share)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        load_processor(trained).save_pretrained(folder)
        if rotation is not None:
            save_rotation(rotation, folder)


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(InterpolateArguments, __doc__, argv)
    interpolate(args.base, args.trained, args.share, args.output)
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    run_command(main)
