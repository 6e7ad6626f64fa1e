"""A language that is neither Portuguese nor English: from its data to training, all measurements, report and card."""

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
from eval.records.schema import read_records
from hub_upload import card

COLOURS = {"rojo": (255, 0, 0), "azul": (0, 0, 255), "verde": (0, 255, 0)}
CLASSES = {"dataset": "colores", "language": "es", "classes": list(COLOURS), "templates": ["una imagen de color {}"]}
TRAINING = ["--effective_batch_size", "10", "--micro_batch_size", "5", "--max_steps", "1", "--warmup_steps", "0"]


def pictures(number: int) -> list[tuple[str, PIL.Image.Image]]:
    generator = np.random.default_rng(number)
    names = [list(COLOURS)[row % len(COLOURS)] for row in range(number)]
    noise = generator.random((number, 40, 36, 3)) * 60
    pixels = [0.7 * np.array(COLOURS[name]) + one for name, one in zip(names, noise, strict=True)]
    return [(name, PIL.Image.fromarray(one.astype(np.uint8))) for name, one in zip(names, pixels, strict=True)]


def make_data(folder, splits: dict[str, int]) -> None:
    """`captions`, a saved data set; `photos`, a folder a split and class; `colores.json`."""
    features = Features({"image": Image(), "captions-es": List(Value("string"))})
    captions = {}
    for split, number in splits.items():
        found = pictures(number)
        rows = {"image": [one for _, one in found]}
        rows |= {"captions-es": [[f"foto {row} {name}"] for row, (name, _) in enumerate(found)]}
        captions[split] = Dataset.from_dict(rows, features=features)
        for row, (name, picture) in enumerate(found):
            (folder / "photos" / split / name).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "photos" / split / name / f"{row}.png")
    DatasetDict(captions).save_to_disk(folder / "captions")
    (folder / "colores.json").write_text(json.dumps(CLASSES), encoding="utf-8")


@pytest.mark.slow
def test_spanish_from_end_to_end(tmp_path, tiny_processor):
    make_data(tmp_path, {"train": 20, "validation": 12, "test": 14})
    save_model(tmp_path / "base", tiny_processor)
    with contextlib.chdir(tmp_path):
        given = ["--model", "base", "--dataset", "captions", "--language", "es", "--output_dir", "run"]
        train_accelerate.main([*given, *TRAINING, "--learning_rate", "1e-3"])
        for role, model in (("baseline", "base"), ("capivara", "run")):
            own = ["--benchmark", "colores.json", "--images", "photos"]
            for name, command, words in (
                ("captions", retrieval, ["--dataset", "captions", "--language", "es", "--dataset_name", "again"]),
                ("classes", classification, own),
                ("probe", linear_probe, [*own, "--validation_split", "validation"]),
            ):
                output = f"run/results/{role}-{name}.json"
                command.main(["--model", model, "--role", role, "--output", output, *words])
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
    assert "those of the benchmark&#39;s own file" in page and "this project" not in page
    (entry,) = split_card(card_of(tmp_path / "run"))[0]["model-index"]
    of_classes = [one for one in entry["results"] if one["dataset"]["name"] == "colores"]
    assert {one["dataset"].get("config") for one in of_classes} == {"es", None}, "the probe reads no text"
    assert all(one["dataset"]["config"] == "es" for one in entry["results"] if one not in of_classes)
