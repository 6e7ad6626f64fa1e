"""A language other than Portuguese and English: data, training, all evaluations, report and model card."""

import contextlib
import json

import numpy as np
import PIL.Image
import pytest
from card_run import card_of, split_card
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from tiny import save_model

import train_accelerate
from eval import classification, linear_probe, report, retrieval
from eval.records.result_files import read_records
from hub_upload import card

COLORS = {"rojo": (255, 0, 0), "azul": (0, 0, 255), "verde": (0, 255, 0)}
CLASSES = {"dataset": "colores", "language": "es", "classes": list(COLORS), "templates": ["una imagen de color {}"]}
TRAINING = ["--effective_batch_size", "10", "--micro_batch_size", "5", "--max_steps", "1", "--warmup_steps", "0"]


def pictures(number: int) -> list[tuple[str, PIL.Image.Image]]:
    """Return noisy images of a single color with the Spanish names of the colors."""
    rng = np.random.default_rng(number)
    names = [list(COLORS)[row % len(COLORS)] for row in range(number)]
    noise = rng.random((number, 40, 36, 3)) * 60
    pixels = [0.7 * np.array(COLORS[name]) + image_noise for name, image_noise in zip(names, noise, strict=True)]
    return [(name, PIL.Image.fromarray(array.astype(np.uint8))) for name, array in zip(names, pixels, strict=True)]


def make_data(folder, splits: dict[str, int]) -> None:
    """Write `captions` (a saved dataset), `photos` (one folder per split and class) and `colores.json`."""
    features = Features({"image": Image(), "captions-es": List(Value("string"))})
    captions = {}
    for split, number in splits.items():
        named_pictures = pictures(number)
        rows = {"image": [picture for _, picture in named_pictures]}
        rows |= {"captions-es": [[f"foto {row} {name}"] for row, (name, _) in enumerate(named_pictures)]}
        captions[split] = Dataset.from_dict(rows, features=features)
        for row, (name, picture) in enumerate(named_pictures):
            (folder / "photos" / split / name).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "photos" / split / name / f"{row}.png")
    DatasetDict(captions).save_to_disk(folder / "captions")
    (folder / "colores.json").write_text(json.dumps(CLASSES), encoding="utf-8")


@pytest.mark.slow
def test_spanish_from_end_to_end(tmp_path, tiny_processor):
    make_data(tmp_path, {"train": 20, "validation": 12, "test": 14})
    save_model(tmp_path / "base", tiny_processor)
    with contextlib.chdir(tmp_path):
        flags = ["--model", "base", "--dataset", "captions", "--language", "es", "--output_dir", "run"]
        train_accelerate.main([*flags, *TRAINING, "--learning_rate", "1e-3"])
        for role, model in (("baseline", "base"), ("capivara", "run")):
            benchmark = ["--benchmark", "colores.json", "--images", "photos"]
            for name, command, flags in (
                ("captions", retrieval, ["--dataset", "captions", "--language", "es", "--dataset_name", "again"]),
                ("classes", classification, benchmark),
                ("probe", linear_probe, [*benchmark, "--validation_split", "validation"]),
            ):
                output = f"run/results/{role}-{name}.json"
                command.main(["--model", model, "--role", role, "--output", output, *flags])
        records = [record for path in (tmp_path / "run/results").glob("*.json") for record in read_records(path)]
        assert {(r.task, r.language) for r in records} == {
            ("retrieval", "es"), ("classification", "es"), ("linear_probe", ""),
        }  # fmt: skip
        assert {r.protocol for r in records if r.task == "classification"} == {"own"}
        assert {r.chance for r in records if r.dataset == "colores"} == {1 / 3}
        report.main(["run", "--output", "report"])
        card.main(["--model", "run"])
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Classification, own, in es, split test" in page and "Retrieval, captions, in es" in page
    assert "own: class names and templates of the user&#39;s file" in page and "of this project" not in page
    (entry,) = split_card(card_of(tmp_path / "run"))[0]["model-index"]
    class_results = [result for result in entry["results"] if result["dataset"]["name"] == "colores"]
    configs = {result["dataset"].get("config") for result in class_results}
    assert configs == {"es", None}, "the linear probe uses no text"
    assert all(result["dataset"]["config"] == "es" for result in entry["results"] if result not in class_results)
