"""Weights between a base and what was trained from it (WiSE-FT), without training again.

    python -m training.interpolate models/base runs/pt --share 0.5 --output models/half
    python -m training.interpolate models/base runs/pt --validation data --languages pt en --output models/best

With `--validation` eleven shares from 0 to 1 are measured, and the best is written: the one of the highest mean recall
in the first language among those that lose no more than `--max_loss` in the others. The processor and the configuration
are those of the trained model.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from capivara_common.cli import at_least, between, flag, parse, run_command, user_errors
from capivara_common.files import check_output_folder, whole_folder
from eval.retrieval import RetrievalArguments, embed_captions, load_data, validation_measures
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images
from training.rotate import load_rotation, rotate_, save_rotation
from training.trainable import interpolate_weights


@dataclass
class InterpolateArguments:
    """Arguments of `training.interpolate`."""

    base: str = flag(..., "Folder or Hub id of the model before training.", positional=True)
    trained: str = flag(..., "Folder or Hub id of the model after training.", positional=True)
    output: Path = flag(..., "Folder of the new model.")
    share: float = flag(0.5, "Of the trained weights, 0 to 1.")
    validation: str | None = flag(None, "Data set on which the share is chosen; `share` is then not used.")
    split: str = flag("validation", "Split of the data set.")
    languages: list[str] = flag(["pt", "en"], "Languages that are measured; the first is the one that was trained.")
    max_loss: float = flag(0.5, "Points of mean recall that a further language may lose in either direction.")

    def __post_init__(self) -> None:
        between(self, 0, 1, "share")
        at_least(self, 0, "max_loss")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(InterpolateArguments, __doc__, argv)
    check_output_folder(args.output)
    start, model = load_model(args.base), load_model(args.trained).eval()
    processor, rotation = load_processor(args.trained), load_rotation(args.trained)
    if rotation is not None:  # the space that was trained in is the base's, rotated
        rotate_(start, rotation)
    base = start.state_dict()
    trained = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if {key: tensor.shape for key, tensor in trained.items()} != {key: tensor.shape for key, tensor in base.items()}:
        raise ValueError(f"{args.trained} was not trained from {args.base}: their tensors differ in name or shape.")
    frozen = all(torch.equal(base[key], trained[key]) for key in base if key.startswith(("vision_", "visual_")))
    if rotation is None and model.config.matryoshka_dims and not frozen:
        raise ValueError(
            f"{args.trained} was trained with matryoshka_dims, in a space that is rotated, and its "
            "rotation.safetensors is missing: nothing lies between its weights and the base's. Fetch the file."
        )

    def move(share: float) -> None:
        model.load_state_dict(trained)
        interpolate_weights(model, base, share)

    share, images, rows, options = args.share, None, {}, {"output": args.output, "split": args.split}
    data = {
        code: load_data(RetrievalArguments(args.base, args.validation, language=code, **options))
        for code in (args.languages if args.validation else ())
    }
    for number in range(11) if data else ():
        move(number / 10)
        if images is None or not frozen:  # those of a frozen tower are embedded once
            pictures = data[args.languages[0]].images
            decoded = (pictures.image(row) for row in range(pictures.count))
            images = embed_images(model, processor, decoded, progress="Images")
        rows[number / 10] = {}
        for code, split in data.items():
            measures = validation_measures(embed_captions(model, processor, split.captions, images), model.logit_scale)
            rows[number / 10] |= {(code, name): value for name, value in measures.items() if name != "loss"}
    if rows:
        recalls = pd.DataFrame.from_dict(rows, orient="index")
        share = best_share(recalls, args.max_loss / 100)
        print(f"{(100 * recalls).round(1).to_string()}\nThe best share is {share:g}.")
    move(share)
    with whole_folder(args.output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if rotation is not None:
            save_rotation(rotation, folder)
    print(f"Written to {args.output}, with {share:g} of the trained weights.")


def best_share(recalls: pd.DataFrame, max_loss: float) -> float:
    """The share by the rule of the module's docstring; `max_loss` is a share of all queries, in any direction."""
    first = recalls.columns.get_level_values(0) == recalls.columns[0][0]
    lost = (recalls.loc[0.0] - recalls.loc[:, ~first]).max(axis=1).fillna(0)  # none where there is one language
    return recalls.loc[lost <= max_loss + 1e-9, first].sum(axis=1).idxmax()  # 1e-9: of rounding


if __name__ == "__main__":
    run_command(main)
