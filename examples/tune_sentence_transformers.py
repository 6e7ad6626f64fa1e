r"""Fine-tune a CAPIVARA model with the trainer of sentence-transformers, on images with captions.

    python -m hub_upload.export --model data/openmoji/base --output repository \
        --formats transformers,sentence_transformers
    python -m examples.tune_sentence_transformers --model repository --dataset data/openmoji/dataset --language pt \
        --output_dir runs/tuned

This example is for users who already train with sentence-transformers. It needs the extra `sentence-transformers`. The
loss equals CLIP's loss. Gradient caching (GradCache, arXiv 2101.06983) allows batches of any size. Each image has the
same random caption during the whole training.

The output folder gets the model, which sentence-transformers and `CapivaraModel.from_pretrained` can load, and
`results.json`.
"""

import html
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import TrainerCallback

import modeling_capivara  # noqa: F401  registers the Auto classes, so that no code of the model folder is executed
from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, write_json, write_text
from eval.capivara_metrics.metrics import RECALL_CUTOFFS
from eval.retrieval import check_and_flatten_captions
from examples import build_trainer_options, collect_run_conditions
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths
from modeling_capivara.modeling_capivara import similarity_logits
from training.trainable import clamp_logit_scale

CARD_TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language: ["{language}"]
tags: [capivara]
---

# {model}, fine-tuned

Fine-tuned on the images and captions of {dataset}; `results.json` has settings and recall. It inherits the licenses of
that model and of those data.
"""


@dataclass
class SentenceTuningArguments:
    """Command-line arguments of `examples.tune_sentence_transformers`, which fine-tunes a CAPIVARA model."""

    model: Path = flag(..., "Folder of a model that was exported in the format sentence_transformers.")
    dataset: Path = flag(..., "Saved Hugging Face dataset with the columns image and captions-LANGUAGE.")
    language: str = flag("pt", "Language of the captions.")
    output_dir: Path = flag(Path("runs/tuned"), "Folder for the model and results.json.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")
    train_split: str = flag("train", "Split for training.")
    split: str = flag("test", "Split for evaluation, before and after training.")
    epochs: float = flag(3.0, "Number of passes over the training images, each with one random caption.")
    batch_size: int = flag(256, "Batch size of the contrastive loss, in image-caption pairs.")
    mini_batch_size: int = flag(32, "Pairs that are encoded at the same time. Changes memory use, not the result.")
    learning_rate: float = flag(1e-5, "Peak learning rate.")
    seed: int = flag(0, "Seed of the image order and of the choice of captions.")

    def __post_init__(self) -> None:
        check_at_least(self, 2, "batch_size")
        check_at_least(self, 1, "mini_batch_size")


def load_images_with_one_random_caption(dataset: Path, split: str, language: str, seed: int = 0) -> Dataset:
    """Load the pairs of a dataset split: each image with one randomly chosen caption.

    Args:
        dataset: Folder of the saved dataset.
        split: Name of the split, such as "train".
        language: Code of the captions' language, such as "pt".
        seed: Seed of the random choice among the captions of an image.

    Returns:
        Dataset with one row per image and the columns text, `{"text": caption}`, and image, in this order.

    Raises:
        ValueError: If the dataset has no such split or column, or an image has no caption.
    """
    data = load_dataset_and_refuse_image_paths(dataset)
    if split not in data:
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(data)}.")
    column = f"captions-{language}"
    if not {"image", column} <= set(data[split].column_names):
        raise ValueError(f"{dataset} needs the columns image and {column}; it has {data[split].column_names}.")
    captions = [[cell] if isinstance(cell, str) else cell for cell in data[split][column]]
    check_and_flatten_captions(captions)  # only for the check: raises ValueError if a caption is missing
    rng = random.Random(seed)
    # Texts are dicts, because sentence-transformers would try to open a string that looks like a URL or file name. The
    # loss requires the column text before the column image.
    texts = [{"text": rng.choice(image_captions)} for image_captions in captions]
    return data[split].select_columns("image").add_column("text", texts).select_columns(["text", "image"])


def build_clip_loss(encoder: SentenceTransformer, mini_batch_size: int) -> CachedMultipleNegativesRankingLoss:
    """Build a sentence-transformers loss that equals CLIP's contrastive loss of the whole batch.

    Use it on a single device and without gradient accumulation. Gradient caching (GradCache) makes large batches fit
    into memory.

    Args:
        encoder: CAPIVARA model that sentence-transformers has loaded.
        mini_batch_size: Number of caption-image pairs that are encoded at the same time.

    Returns:
        The loss for the trainer of sentence-transformers.
    """
    # Three options make this loss equal to `modeling_capivara.clip_loss`: the learned scale, both retrieval directions,
    # and a separate softmax for each direction. With gradient accumulation, the gradient of the scale would not be
    # divided by the number of steps. Several devices would need `gather_across_devices`, which has not been tested.
    return CachedMultipleNegativesRankingLoss(
        encoder,
        scale=1.0,  # `similarity_fct` already multiplies by the learned scale
        similarity_fct=partial(similarity_logits, logit_scale=encoder[0].auto_model.logit_scale),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        mini_batch_size=mini_batch_size,
    )


def build_recall_evaluator(rows: Dataset) -> InformationRetrievalEvaluator:
    """Build an evaluator that measures text-to-image retrieval: each caption must find its own image.

    Args:
        rows: Dataset with the columns text and image, from `load_images_with_one_random_caption`.

    Returns:
        The evaluator of sentence-transformers. Call it with a model to get the recalls as a dict.
    """
    # The evaluator's accuracy@k equals the recall@k of `eval.retrieval`, unless two images have the same similarity.
    names = [f"{row:08}" for row in range(len(rows))]
    return InformationRetrievalEvaluator(
        dict(zip(names, rows["text"], strict=True)), dict(zip(names, rows["image"], strict=True)),
        {name: {name} for name in names}, accuracy_at_k=[*RECALL_CUTOFFS],
        precision_recall_at_k=[*RECALL_CUTOFFS], write_csv=False,
    )  # fmt: skip


class ClampLogitScaleCallback(TrainerCallback):
    """Trainer callback that keeps the learned logit scale between 1 and 100 during training, as CLIP does.

    The logit scale is the factor that multiplies cosine similarities. The model stores its natural logarithm.
    """

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Clamp the model's `logit_scale` after an optimizer step. The `Trainer` of transformers calls this method."""
        clamp_logit_scale(model[0].auto_model.logit_scale)


def main(argv: list[str] | None = None) -> None:
    """Run the command: measure recall, fine-tune, measure recall again, and save the model and the results.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(SentenceTuningArguments, __doc__, argv)
    if not (args.model / "modules.json").is_file():
        fault = "was not exported in the format sentence_transformers (modules.json is missing)"
        raise ValueError(f"{args.model} {fault}. Export it with hub_upload.export.")
    rows = load_images_with_one_random_caption(args.dataset, args.train_split, args.language, args.seed)
    if len(rows) < args.batch_size:
        raise ValueError(
            f"--batch_size must be at most the number of images in the split {args.train_split}, {len(rows)}, "
            f"got {args.batch_size}."
        )
    evaluator = build_recall_evaluator(load_images_with_one_random_caption(args.dataset, args.split, args.language))
    with atomic_folder(args.output_dir, args.overwrite_output_dir) as folder:
        encoder = SentenceTransformer(str(args.model))
        # Frozen as in the CAPIVARA paper (arXiv 2310.13683). Unlike in `train_accelerate.py`, the loss still encodes
        # every image twice per epoch.
        encoder[0].auto_model.freeze_image_encoder()
        # If the last batch had a single pair, its CLIP loss would be 0. An incomplete last batch is therefore dropped.
        training = Arguments(dataloader_drop_last=True, **build_trainer_options(args, folder, encoder.device))
        loss = build_clip_loss(encoder, args.mini_batch_size)
        trainer = SentenceTransformerTrainer(encoder, training, rows, loss=loss, callbacks=[ClampLogitScaleCallback()])
        metrics = {"before": evaluator(encoder.eval())}
        seconds = trainer.train().metrics["train_runtime"]
        metrics["after"] = evaluator(encoder.eval())
        recalls = {
            time: {f"recall@{k}": float(values[f"cosine_accuracy@{k}"]) for k in RECALL_CUTOFFS}
            for time, values in metrics.items()
        }
        encoder.save_pretrained(str(folder), create_model_card=False)
        run = collect_run_conditions(args, encoder.device, "sentence-transformers")
        card_values = {name: html.escape(run["config"][name]) for name in ("model", "dataset", "language")}
        write_json(folder / "results.json", run | {"text_to_image": recalls, "training_s": seconds})
        write_text(folder / "README.md", CARD_TEMPLATE.format(**card_values))
    for time, values in recalls.items():
        print(f"{time:8}" + "".join(f"{name:>12} {100 * value:6.2f} %" for name, value in values.items()))
    print(args.output_dir)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
