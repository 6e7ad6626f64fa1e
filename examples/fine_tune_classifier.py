r"""Fine-tune an image classifier that starts from the embeddings of Portuguese class names (zero-shot classifier).

    python -m examples.fine_tune_classifier --image_size 96 --output_dir runs/classifier
    python -m examples.fine_tune_classifier --model MODEL --learning_rate 1e-5 --images DATA --benchmark cifar-10 \
        --output_dir runs/cifar-10

The first command uses scikit-learn's 1,797 handwritten digits and the base model of `python -m
examples.openmoji.prepare`. `--images` takes a saved Hugging Face dataset, a Hub id, or a folder with the subfolders
SPLIT/CLASS. Use the fine-tuned model with transformers:

    from transformers import pipeline
    import modeling_capivara

    print(pipeline("image-classification", "runs/classifier")("digit.png"))
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from transformers import EvalPrediction, Trainer, TrainingArguments

from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, write_json, write_text
from capivara_common.image_files import BadImage
from caption_data.labeled_images import LabeledImages, load_images_with_prompt_class_labels
from eval.capivara_metrics.metrics import top_k_accuracy
from eval.prompts import Prompts, load_prompts
from examples import build_trainer_options, collect_run_conditions
from modeling_capivara import CapivaraForImageClassification
from modeling_capivara.loading import load_model, load_processor

DIGITS_BENCHMARK = "mnist"  # this benchmark's class names and prompts also fit scikit-learn's digits
TEST_DIGITS = 450  # number of test images, a quarter of scikit-learn's 1,797 digits

CARD_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-classification
language: [pt]
tags: [capivara]
---

# Classifier of {benchmark}

`{model}` fine-tuned on the images of {images}; `results.json` has settings and accuracies. It inherits the licenses of
that model and of those images.
"""


@dataclass
class ClassifierArguments:
    """Command-line arguments of `examples.fine_tune_classifier`, which trains an image classifier.

    Raises:
        ValueError: If `image_size` is below 1.
    """

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    benchmark: str = flag(DIGITS_BENCHMARK, "Name of a file in eval/prompts/pt with class names and prompt templates.")
    images: str | None = flag(None, "Labeled images: folder, saved dataset or Hub id. Default: scikit-learn's digits.")
    output_dir: Path = flag(Path("runs/classifier"), "Folder for model and processor.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")
    train_split: str = flag("train", "Split of --images for training.")
    split: str = flag("test", "Split of --images for evaluation.")
    image_column: str | None = flag(None, "Name of the image column. Default: detected.")
    label_column: str | None = flag(None, "Name of the label column. Default: detected.")
    head_only: bool = flag(False, "Freeze the image tower and train only the classification head.")
    image_size: int | None = flag(
        None, "Side of the images in pixels. Only for convolutional towers. Default: the processor's size."
    )
    epochs: float = flag(3.0, "Passes over the training images.")
    batch_size: int = flag(32, "Images per optimizer step.")
    learning_rate: float = flag(1e-3, "Peak learning rate. 1e-5 is better for a large ViT.")
    seed: int = flag(0, "Seed of the image order and of the split of the digits.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "image_size")


def make_digits_dataset(names: list[str], seed: int) -> DatasetDict:
    """Build a small image classification dataset of scikit-learn's handwritten digits (8 x 8 pixels, 17 gray levels).

    Args:
        names: Names of the ten classes, from digit 0 to digit 9.
        seed: Seed of the random split into train and test, which is stratified by class.

    Returns:
        Dataset with the splits train and test (`TEST_DIGITS` images) and the columns image and labels (class index).
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    pixels = (pictures.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    columns = {"image": [PIL.Image.fromarray(picture) for picture in pixels], "labels": labels}
    rows = Dataset.from_dict(columns, features=Features({"image": Image(), "labels": ClassLabel(names=names)}))
    return rows.train_test_split(TEST_DIGITS, stratify_by_column="labels", seed=seed)


class LabeledRows:
    """Dataset of labeled images for transformers' `Trainer`. An image is decoded only when it is accessed.

    An item is `{"image": PIL image, "labels": class index}`. Images that can't be read are left out.

    Args:
        labeled_images: Images with their labels, from `load_images_with_prompt_class_labels`.
    """

    def __init__(self, labeled_images: LabeledImages):
        self.labeled_images = labeled_images
        # All images are decoded once, to find those that can't be read.
        decoded = labeled_images.images.decode_images(range(len(labeled_images.images)))
        self.rows = [row for row, image in enumerate(decoded) if not isinstance(image, BadImage)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {"image": self.labeled_images.images.load_image(row), "labels": self.labeled_images.labels[row]}


def _load_train_and_test_images(args: ClassifierArguments, prompts: Prompts) -> list[Dataset | LabeledRows]:
    """Load the labeled images for training and for evaluation.

    Args:
        args: Command-line arguments, which name the images, the splits and the columns.
        prompts: Class names of the benchmark.

    Returns:
        List of two datasets: the training images and the test images. An item of a dataset is `{"image": PIL image,
        "labels": class index}`.

    Raises:
        ValueError: If `--images` is missing for a benchmark other than the digits, or an image has several labels.
    """
    if args.images is None:
        if args.benchmark != DIGITS_BENCHMARK:
            raise ValueError(f"--benchmark {args.benchmark} needs --images: a folder, a saved dataset or a Hub id.")
        return list(make_digits_dataset(prompts.names, args.seed).values())
    columns = (args.image_column, args.label_column)
    splits = [
        load_images_with_prompt_class_labels(args.images, split, prompts.english_names, *columns)
        for split in (args.train_split, args.split)
    ]
    if any(isinstance(labeled_images.labels[0], list) for labeled_images in splits):
        rule = "this example supports one label per image"
        raise ValueError(f"{args.images} has several labels per image, but {rule}. Choose another dataset.")
    return [LabeledRows(labeled_images) for labeled_images in splits]


def main(argv: list[str] | None = None) -> None:
    """Run the command: measure accuracy, fine-tune, measure accuracy again, and save model, processor and results.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(ClassifierArguments, __doc__, argv)
    with atomic_folder(args.output_dir, args.overwrite_output_dir) as folder:
        prompts = load_prompts(args.benchmark)
        train, test = _load_train_and_test_images(args, prompts)
        processor = load_processor(args.model)
        if args.image_size:
            processor.image_processor.size = {"shortest_edge": args.image_size}
            processor.image_processor.crop_size = {"height": args.image_size, "width": args.image_size}
        # The class prompts are already complete sentences with the right articles, so the template adds nothing.
        labels = dict(zip(prompts.names, prompts.class_prompts, strict=True))
        model = CapivaraForImageClassification.from_zero_shot(load_model(args.model).eval(), processor, labels, ["{}"])
        if args.head_only:
            model.freeze_image_encoder()

        def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
            pixels = processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
            scores, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
            return {"accuracy": top_k_accuracy(scores, labels)}

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # By default, `Trainer` would remove the image column before `collate` can preprocess the images.
        options = build_trainer_options(args, folder, device) | {"remove_unused_columns": False}
        training = TrainingArguments(per_device_eval_batch_size=args.batch_size, **options)
        trainer = Trainer(model, training, collate, train, test, compute_metrics=compute_accuracy)
        accuracies = {"zero_shot": trainer.evaluate()["eval_accuracy"]}
        seconds = trainer.train().metrics["train_runtime"]
        accuracies["fine_tuned"] = trainer.evaluate()["eval_accuracy"]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        run = collect_run_conditions(args, device) | {"accuracy": accuracies, "training_s": seconds}
        write_json(folder / "results.json", run | {"train_images": len(train), "test_images": len(test)})
        images = run["config"]["images"] or "scikit-learn's digits"
        write_text(folder / "README.md", CARD_TEMPLATE.format(**run["config"] | {"images": images}))
    print(f"{args.benchmark}, accuracy on held-out images")
    for name, accuracy in accuracies.items():
        print(f"  {name.replace('_', '-'):10}  {100 * accuracy:6.2f} %")
    print(args.output_dir)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
