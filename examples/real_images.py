"""Evaluate models on real images from PyPI packages, for machines without access to the Hub.

    python -m examples.real_images --baseline data/openmoji/base --model runs/openmoji-pt-001 --output runs/real_images
    python -m eval.report runs/real_images --output report

The models are evaluated on three tasks:

- retrieval on OpenMoji's test split, in Portuguese and in English;
- zero-shot classification with Portuguese class names, of OpenMoji's test images, of scikit-learn's digits and of
  scikit-image's photographs;
- a linear probe on scikit-learn's digits.

The output folder gets one result file per task and model. The datasets are kept in `data/real_images`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, read_json, write_json
from eval import classification, linear_probe, prompts, retrieval
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths

# Photographs in PyPI packages, by name. Each has a short name and a sentence about it, in English and Portuguese.
PHOTOGRAPHS = read_json(Path(__file__).parent / "photographs.json")
# The photographs of scikit-image. Each of them is a class in the dataset `photos`. Only their entries have the gender
# of the Portuguese name, which the prompt templates need for the right article.
CLASS_PHOTOGRAPHS = {name: entry for name, entry in PHOTOGRAPHS.items() if "gender" in entry}
PHOTO_TEMPLATES = [
    "uma foto de {um}.",
    "uma foto {do}.",
    "uma imagem de {um}.",
    "uma imagem que mostra {o}.",
    "{nome}.",
]
DIGIT_SIDE_PIXELS = 96  # side to which scikit-learn's digits (8 x 8 pixels) are enlarged, without smoothing


@dataclass
class RealImagesArguments:
    """Command-line arguments of `examples.real_images`, which evaluates models on the images of PyPI packages."""

    model: str = flag(..., "Folder of the trained model, such as the output folder of configs/openmoji.yaml.")
    baseline: str = flag("data/openmoji/base", "Folder or Hub id of the base model to compare with.")
    openmoji: str = flag("data/openmoji/dataset", "OpenMoji dataset that `examples.openmoji.prepare` writes.")
    data: Path = flag(Path("data/real_images"), "Folder for the datasets; existing datasets are used as they are.")
    output: Path = flag(Path("runs/real_images"), "Folder for the result files.")
    device: str | None = flag(None, "cpu or cuda. Default: the GPU if there is one.")


def _write_missing_datasets(folder: Path, openmoji: str) -> None:
    """Write the datasets digits, photos and concepts if they do not exist yet.

    Each dataset gets a subfolder with its images (`data`) and with its class names and prompt templates (classes.json).

    Args:
        folder: Folder for the three subfolders.
        openmoji: Folder of the OpenMoji dataset, from which the dataset concepts is made.
    """
    makers = {
        "digits": _make_digits_dataset_and_classes,
        "photos": _make_photo_dataset_and_classes,
        "concepts": partial(_make_concept_dataset_and_classes, openmoji),
    }
    for name, make_dataset in makers.items():
        if not (folder / name).exists():
            with atomic_folder(folder / name) as dataset_folder:
                data, classes = make_dataset()
                data.save_to_disk(dataset_folder / "data")
                write_json(dataset_folder / "classes.json", classes)


def _make_digits_dataset_and_classes() -> tuple[DatasetDict, dict]:
    """Make a dataset of scikit-learn's 1,797 handwritten digits.

    Returns:
        Tuple of the dataset and the content of classes.json. Every fourth digit is in the split test, all others are in
        train. The class names and prompt templates are those of MNIST.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = prompts.load_prompts("mnist").english_names
    # scikit-learn's digits are bright on dark, from 0 to 16. They become dark on white, as on paper, from 0 to 255.
    pixels = np.rint(255 - digits.images * (255 / 16)).astype(np.uint8)
    size = (DIGIT_SIDE_PIXELS, DIGIT_SIDE_PIXELS)
    images = [PIL.Image.fromarray(digit).resize(size, PIL.Image.Resampling.NEAREST).convert("RGB") for digit in pixels]
    is_test = np.arange(len(images)) % 4 == 0
    splits = {
        name: _build_labeled_dataset([images[i] for i in np.flatnonzero(rows)], digits.target[rows].tolist(), names)
        for name, rows in (("train", ~is_test), ("test", is_test))
    }
    classes_file = read_json(prompts.PROMPTS_FOLDER / "pt" / "mnist.json")
    classes_file |= {"dataset": "sklearn-digits", "title": "Digits of scikit-learn"}
    return DatasetDict(splits), classes_file


def _make_photo_dataset_and_classes() -> tuple[DatasetDict, dict]:
    """Make a dataset of scikit-image's photographs, each of which is a class of its own.

    Returns:
        Tuple of the dataset, with the single split test, and the content of classes.json.
    """
    classes = [{key: entry[key] for key in ("en", "pt", "gender", "number")} for entry in CLASS_PHOTOGRAPHS.values()]
    images, title = [load_example_photo(name) for name in CLASS_PHOTOGRAPHS], "Photographs of scikit-image"
    return _make_dataset_with_one_class_per_image(images, "skimage-photos", title, classes, PHOTO_TEMPLATES)


def load_example_photo(name: str) -> PIL.Image.Image:
    """Load one photograph that is installed with scikit-image, scikit-learn or matplotlib.

    Args:
        name: Name of the photograph, a key of `PHOTOGRAPHS`.

    Returns:
        The photograph in RGB.
    """
    import skimage.data

    if name == "grace_hopper":
        from matplotlib.cbook import get_sample_data

        return PIL.Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    if name not in CLASS_PHOTOGRAPHS:
        from sklearn.datasets import load_sample_image

        return PIL.Image.fromarray(load_sample_image(f"{name}.jpg"))
    pixels = getattr(skimage.data, name)()
    # A stereo pair is a tuple, of which only the left image is used.
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    pixels = pixels if pixels.dtype == np.uint8 else (255 * (pixels / pixels.max())).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert("RGB")


def _make_concept_dataset_and_classes(openmoji: str) -> tuple[DatasetDict, dict]:
    """Make a classification dataset of OpenMoji's test images, each of which is a class of its own.

    The Portuguese name of a class is the first Portuguese caption of its image.

    Args:
        openmoji: Folder of the OpenMoji dataset.

    Returns:
        Tuple of the dataset, with the single split test, and the content of classes.json.
    """
    rows = load_dataset_and_refuse_image_paths(Path(openmoji))["test"]
    classes = [{"en": row["emoji"], "pt": row["captions-pt"][0]} for row in rows.remove_columns("image")]
    title = "Concepts of OpenMoji"
    return _make_dataset_with_one_class_per_image(rows["image"], "openmoji-concepts", title, classes, ["{nome}"])


def _evaluate_model_and_write_results(args: RealImagesArguments, model: str, role: str) -> None:
    """Evaluate one model on retrieval and zero-shot classification, and write a result file for each task.

    Args:
        args: Command-line arguments, which name the datasets, the output folder and the device.
        model: Folder of the model.
        role: Role of the model in the comparison: "baseline" or "capivara" (the trained model).
    """
    shared = {"role": role, "device": args.device}
    for language in ("pt", "en"):
        output = args.output / f"openmoji-{language}-{role}.json"
        task = retrieval.RetrievalArguments(model, args.openmoji, output, language=language, **shared)
        retrieval.evaluate_retrieval_and_write_result(task)
    for name in ("concepts", "digits", "photos"):
        classes, images = str(args.data / name / "classes.json"), str(args.data / name / "data")
        output = args.output / f"{name}-{role}.json"
        task = classification.ClassificationArguments(model, classes, images, output, **shared)
        classification.evaluate_zero_shot_and_write_result(task)


def _evaluate_linear_probe_and_write_results(args: RealImagesArguments) -> None:
    """Evaluate the base model with a linear probe on scikit-learn's digits, and write the result files.

    The result is also valid for the trained model, because CAPIVARA's training freezes the image encoder and a linear
    probe does not use the text encoder.

    Args:
        args: Command-line arguments, which name the base model, the datasets, the output folder and the device.
    """
    classes, images = str(args.data / "digits" / "classes.json"), str(args.data / "digits" / "data")
    shared = {"role": "baseline", "device": args.device}
    for name, shots in (("full", []), ("few", [1, 2, 4, 8, 16])):
        output = args.output / f"digits-probe-{name}.json"
        task = linear_probe.LinearProbeArguments(args.baseline, classes, images, output, shots=shots, **shared)
        linear_probe.evaluate_linear_probe_and_write_result(task)


def _build_labeled_dataset(images: list, labels: list[int], names: list[str]) -> Dataset:
    """Build a dataset of labeled images.

    Args:
        images: PIL images.
        labels: Class index of each image.
        names: Class names, in the order of the class indices.

    Returns:
        Dataset with the columns image and label.
    """
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def _make_dataset_with_one_class_per_image(
    images: list, dataset: str, title: str, classes: list[dict], templates: list[str]
) -> tuple[DatasetDict, dict]:
    """Make a classification dataset in which each image is a class of its own.

    Args:
        images: PIL images.
        dataset: Identifier of the dataset.
        title: Title of the dataset in reports.
        classes: For each image `{"en": English name, "pt": Portuguese name}` of its class. Templates that contain an
            article also need the keys "gender" and "number" of the Portuguese name.
        templates: Portuguese prompt templates, such as "uma foto de {um}.".

    Returns:
        Tuple of the dataset, with the single split test, and the content of classes.json, which tells `eval.prompts`
        how to make the prompts. The metric is accuracy.
    """
    data = _build_labeled_dataset(images, list(range(len(classes))), [entry["en"] for entry in classes])
    shared = {"dataset": dataset, "language": "pt", "title": title, "metric": "accuracy"}
    return DatasetDict(test=data), {**shared, "classes": classes, "templates": templates}


def main(argv: list[str] | None = None) -> None:
    """Run the command: write the datasets, then evaluate the base model and the trained model.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(RealImagesArguments, __doc__, argv)
    _write_missing_datasets(args.data, args.openmoji)
    _evaluate_model_and_write_results(args, args.baseline, "baseline")
    _evaluate_model_and_write_results(args, args.model, "capivara")
    _evaluate_linear_probe_and_write_results(args)
    print(f"Results: {args.output}. To make an HTML report: python -m eval.report {args.output} --output report")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
