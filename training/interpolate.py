"""Weights between a base and what was trained from it (WiSE-FT), without training again.

    python -m training.interpolate models/base runs/pt --share 0.5 --output models/half

The processor and the configuration are those of the trained model. What a figure gains or loses by it, `eval` tells.
"""

import argparse
import sys
from pathlib import Path

from artifacts import whole_folder
from modeling_capivara.loading import load_model, load_processor
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
    model, base_state = load_model(trained), load_model(base).state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in base_state.items()}:
        raise ValueError(f"{trained} was not trained from {base}: their tensors differ in name or shape.")
    interpolate_weights(model, base_state, share)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        load_processor(trained).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of the model before training")
    parser.add_argument("trained", help="folder or Hub id of the model after training")
    parser.add_argument("--share", type=float, default=0.5, help="of the trained weights, 0 to 1")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new model")
    args = parser.parse_args(argv)
    try:
        interpolate(args.base, args.trained, args.share, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
