"""Evaluation on real pictures that install from PyPI: what a model can be measured on where no Hub is reached.

    python -m examples.real_images --baseline data/openmoji/base --model runs/openmoji-pt-001 --output runs/real_images
    python -m eval.report runs/real_images --output report

Retrieval on OpenMoji's test split (Portuguese and English), zero-shot classification of its concepts, of the digits of
scikit-learn and of the photographs of scikit-image (Portuguese labels), and a linear probe on the digits. Data sets are
written below `data/real_images`, and a result file a task and model in the output folder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, read_json, write_json
from eval import classification, linear_probe, prompts, retrieval
from examples.openmoji.dataset import load_dataset_with_images

# Photographs that install from PyPI, by name: class in English and Portuguese, a sentence in both.
PHOTOGRAPHS = read_json(Path(__file__).parent / "photographs.json")
CLASS_PHOTOGRAPHS = {
    name: entry for name, entry in PHOTOGRAPHS.items() if "gender" in entry
}  # scikit-image's, the classes
PHOTO_TEMPLATES = [
    "uma foto de {um}.",
    "uma foto {do}.",
    "uma imagem de {um}.",
    "uma imagem que mostra {o}.",
    "{nome}.",
]
DIGIT_SIDE_PIXELS = 96  # pixels; the pictures have 8, and are enlarged without smoothing


@dataclass
class RealImagesArguments:
    """Arguments of `examples.real_images`."""

    model: str = flag(..., "Folder of the trained model, as a run of configs/openmoji.yaml leaves it.")
    baseline: str = flag("data/openmoji/base", "What it is compared with.")
    openmoji: str = flag("data/openmoji/dataset", "OpenMoji data set, as prepared.")
    data: Path = flag(Path("data/real_images"), "Where the data sets are written, once.")
    output: Path = flag(Path("runs/real_images"), "Folder of the result files.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")


def prepare_datasets(folder: Path, openmoji: str) -> None:
    """Write the data sets that are not there yet, each with the file of its classes."""
    for name, make in {
        "digits": make_digits_dataset,
        "photos": make_photos_dataset,
        "concepts": lambda: make_concepts_dataset(openmoji),
    }.items():
        if not (folder / name).exists():
            with atomic_folder(folder / name) as made:
                data, classes = make()
                data.save_to_disk(made / "data")
                write_json(made / "classes.json", classes)


def make_digits_dataset() -> tuple[DatasetDict, dict]:
    """scikit-learn's 1,797 handwritten digits, every fourth for the test, and MNIST's names for them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    names = prompts.load_prompts("mnist").english_names
    named = {"dataset": "sklearn-digits", "title": "Digits of scikit-learn"}
    pixels = np.rint(255 - found.images * (255 / 16)).astype(np.uint8)  # dark on white, as on paper
    side = (DIGIT_SIDE_PIXELS, DIGIT_SIDE_PIXELS)
    images = [PIL.Image.fromarray(one).resize(side, PIL.Image.Resampling.NEAREST).convert("RGB") for one in pixels]
    test = np.arange(len(images)) % 4 == 0
    splits = {
        name: _build_labeled_dataset([images[i] for i in np.flatnonzero(rows)], found.target[rows].tolist(), names)
        for name, rows in (("train", ~test), ("test", test))
    }
    return DatasetDict(splits), read_json(prompts.PROMPTS_FOLDER / "pt" / "mnist.json") | named


def make_photos_dataset() -> tuple[DatasetDict, dict]:
    """scikit-image's photographs, a class each."""
    classes = [{key: entry[key] for key in ("en", "pt", "gender", "number")} for entry in CLASS_PHOTOGRAPHS.values()]
    data = _build_labeled_dataset(
        [load_photo(name) for name in CLASS_PHOTOGRAPHS],
        list(range(len(CLASS_PHOTOGRAPHS))),
        [entry["en"] for entry in classes],
    )
    return DatasetDict(test=data), _build_classes_file(
        "skimage-photos", "Photographs of scikit-image", classes, PHOTO_TEMPLATES
    )


def load_photo(name: str) -> PIL.Image.Image:
    """A photograph of `PHOTOGRAPHS`, RGB: of scikit-image by the name of its function, scikit-learn or matplotlib."""
    import skimage.data

    if name == "grace_hopper":
        from matplotlib.cbook import get_sample_data

        return PIL.Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    if name not in CLASS_PHOTOGRAPHS:
        from sklearn.datasets import load_sample_image

        return PIL.Image.fromarray(load_sample_image(f"{name}.jpg"))
    pixels = getattr(skimage.data, name)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # a stereo pair: the left one
    pixels = pixels if pixels.dtype == np.uint8 else (255 * (pixels / pixels.max())).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert("RGB")


def make_concepts_dataset(openmoji: str) -> tuple[DatasetDict, dict]:
    """OpenMoji's test pictures, a class each, named by their first Portuguese caption."""
    rows = load_dataset_with_images(Path(openmoji))["test"]
    classes = [{"en": row["emoji"], "pt": row["captions-pt"][0]} for row in rows.remove_columns("image")]
    data = _build_labeled_dataset(rows["image"], list(range(len(rows))), [entry["en"] for entry in classes])
    return DatasetDict(test=data), _build_classes_file("openmoji-concepts", "Concepts of OpenMoji", classes, ["{nome}"])


def evaluate_model(args: RealImagesArguments, model: str, role: str) -> None:
    """All tasks of one model; a result file each."""
    shared = {"role": role, "device": args.device}
    for language in ("pt", "en"):
        output = args.output / f"openmoji-{language}-{role}.json"
        task = retrieval.RetrievalArguments(model, args.openmoji, output, language=language, **shared)
        retrieval.evaluate(task)
    for name in ("concepts", "digits", "photos"):
        classes, images = str(args.data / name / "classes.json"), str(args.data / name / "data")
        output = args.output / f"{name}-{role}.json"
        task = classification.ClassificationArguments(model, classes, images, output, **shared)
        classification.evaluate(task)


def run_linear_probe(args: RealImagesArguments) -> None:
    """Linear probe on the digits; the image tower is frozen in training, so that one model stands for both."""
    classes, images = str(args.data / "digits" / "classes.json"), str(args.data / "digits" / "data")
    shared = {"role": "baseline", "device": args.device}
    for name, shots in (("full", []), ("few", [1, 2, 4, 8, 16])):
        output = args.output / f"digits-probe-{name}.json"
        task = linear_probe.LinearProbeArguments(args.baseline, classes, images, output, shots=shots, **shared)
        linear_probe.evaluate(task)


def _build_labeled_dataset(images: list, labels: list[int], names: list[str]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def _build_classes_file(dataset: str, title: str, classes: list[dict], templates: list[str]) -> dict:
    shared = {"dataset": dataset, "language": "pt", "title": title, "metric": "accuracy"}
    return {**shared, "classes": classes, "templates": templates}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(RealImagesArguments, __doc__, argv)
    prepare_datasets(args.data, args.openmoji)
    evaluate_model(args, args.baseline, "baseline")
    evaluate_model(args, args.model, "capivara")
    run_linear_probe(args)
    print(f"Results: {args.output}. As a page: python -m eval.report {args.output} --output report")


if __name__ == "__main__":
    run_command(main, resumable=True)
