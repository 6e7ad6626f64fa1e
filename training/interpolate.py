"""Weights between a base and what was trained from it (WiSE-FT), without training again.

    python -m training.interpolate models/base runs/pt --share 0.5 --output models/half
    python -m training.interpolate models/base runs/pt --validation data --languages pt en --output models/best

With `--validation` eleven shares from 0 to 1 are measured, and the best is written: the one of the highest mean recall
in the first language among those that lose no more than `--max_loss` in the others. The processor and the configuration
are those of the trained model.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capivara_common.cli import at_least, between, flag, parse, run_command, user_errors
from capivara_common.files import whole_folder
from eval.capivara_metrics.metrics import mean_recall
from eval.records.schema import DIRECTIONS
from eval.retrieval import RetrievalArguments, embed_captions, load_data
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images
from training.rotate import load_rotation, rotate_, save_rotation
from training.trainable import interpolate_weights

SHARES = [number / 10 for number in range(11)]


@dataclass
class InterpolateArguments:
    """Arguments of `training.interpolate`."""

    base: str = flag(..., "Folder or Hub id of the model before training.", positional=True)
    trained: str = flag(..., "Folder or Hub id of the model after training.", positional=True)
    output: Path = flag(..., "Folder of the new model.")
    share: float = flag(0.5, "Of the trained weights, 0 to 1.")
    validation: str | None = flag(
        None,
        "Data set on which the share is chosen, in the forms of a training's; `share` is then not used.",
    )
    split: str = flag("validation", "Split of the data set.")
    languages: list[str] = flag(["pt", "en"], "Languages that are measured; the first is the one that was trained.")
    max_loss: float = flag(0.5, "Points of mean recall that a further language may lose in either direction.")

    def __post_init__(self) -> None:
        between(self, 0, 1, "share")
        at_least(self, 0, "max_loss")


def interpolate(args: InterpolateArguments) -> float:
    """Write a model folder with a share of the trained weights and the rest of the base's; returns the share.

    Raises:
        ValueError: an argument is out of its range, the models differ in shape, or the output is not empty.
    """
    output = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"The output folder {output} is not empty. Choose another one.")
    rotation = load_rotation(args.trained)
    start, model = load_model(args.base), load_model(args.trained)
    if rotation is not None:  # the space that was trained in is the base's, rotated
        rotate_(start, rotation)
    base, trained = start.state_dict(), load_model(args.trained).state_dict()
    if rotation is None and model.config.matryoshka_dims and not _same_images(base, trained):
        raise ValueError(
            f"{args.trained} was trained with matryoshka_dims, in a space that is rotated, and its "
            "rotation.safetensors is missing: nothing lies between its weights and the base's. Fetch the file."
        )
    shapes = {name: tensor.shape for name, tensor in trained.items()}
    if shapes != {name: tensor.shape for name, tensor in base.items()}:
        raise ValueError(f"{args.trained} was not trained from {args.base}: their tensors differ in name or shape.")
    processor, share = load_processor(args.trained), args.share
    if args.validation:
        recalls = measured_shares(args, model.eval(), processor, base, trained)
        share = best_share(recalls, args.languages, args.max_loss / 100)
        print(recall_table(recalls, share))
    model.load_state_dict(trained)
    interpolate_weights(model, base, share)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if rotation is not None:
            save_rotation(rotation, folder)
    return share


def measured_shares(
    args: InterpolateArguments,
    model: CapivaraModel,
    processor: CapivaraProcessor,
    base: dict[str, Tensor],
    trained: dict[str, Tensor],
) -> dict[float, dict[str, dict[str, float]]]:
    """Share -> language -> direction -> mean recall, from 0 to 1; images of a frozen tower are embedded once."""
    frozen = _same_images(base, trained)
    data = {
        language: load_data(
            RetrievalArguments(args.trained, args.validation, args.output, language=language, split=args.split)
        )
        for language in args.languages
    }
    images, recalls = None, {}
    for share in SHARES:
        model.load_state_dict(trained)
        interpolate_weights(model, base, share)
        if images is None or not frozen:
            first = data[args.languages[0]].images
            pictures = [first.image(row) for row in range(first.count)]
            images = embed_images(model, processor, pictures, progress="Images")
        recalls[share] = {}
        for language, split in data.items():
            embeddings = embed_captions(model, processor, split.captions, images)
            recalls[share][language] = {name: mean_recall(embeddings.ranks(name)) for name in DIRECTIONS}
    return recalls


def best_share(recalls: dict[float, dict[str, dict[str, float]]], languages: list[str], max_loss: float) -> float:
    """The share by the rule of the module's docstring; `max_loss` is a share of all queries, in any direction."""

    def kept(share: float) -> bool:
        lost = [
            recalls[0.0][language][name] - recalls[share][language][name]
            for language in languages[1:]
            for name in DIRECTIONS
        ]
        return max(lost, default=0.0) <= max_loss + 1e-9  # of rounding

    return max(filter(kept, recalls), key=lambda share: sum(recalls[share][languages[0]].values()))


def recall_table(recalls: dict[float, dict[str, dict[str, float]]], best: float) -> str:
    """The figures as lines, in per cent, with the best marked."""
    names = [f"{language} {direction.replace('_', ' ')}" for language in recalls[0.0] for direction in DIRECTIONS]
    lines = ["share  " + "  ".join(names)]
    for share, languages in recalls.items():
        values = [100 * value for by_direction in languages.values() for value in by_direction.values()]
        cells = "  ".join(f"{value:{len(name)}.1f}" for name, value in zip(names, values, strict=True))
        lines.append(f"{share:5.1f}  {cells}{'  <- best' * (share == best)}")
    return "\n".join(lines)


def _same_images(base: dict[str, Tensor], trained: dict[str, Tensor]) -> bool:
    """Whether both models embed images alike."""
    return all(torch.equal(base[name], trained[name]) for name in base if name.startswith(("vision_", "visual_")))


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(InterpolateArguments, __doc__, argv)
    share = interpolate(args)
    print(f"Written to {args.output}, with {share:g} of the trained weights.")


if __name__ == "__main__":
    run_command(main)
