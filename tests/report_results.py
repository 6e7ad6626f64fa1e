"""Result files as the evaluations write them, with figures of a seeded dice: for tests of the report."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from capivara_common.files import write_json
from eval.records.schema import Record, write_records
from eval.retrieval import DIRECTIONS, PROTOCOL

COLOURS = {"vermelho": "#c0392b", "azul": "#2471a3", "verde": "#1e8449", "amarelo": "#f1c40f", "roxo": "#7d3c98"}
SHAPES = ("círculo", "quadrado", "triângulo", "losango")
ATTACK = "<script>alert(1)</script> & um círculo"
CHANCES = {"recall@1": 0.003, "recall@5": 0.014, "recall@10": 0.029, "mean_recall": 0.015}


def make_results(folder: Path, benchmarks: tuple[str, ...] = ("cifar-10", "oxford-flower-102")) -> Path:
    """A folder as a suite leaves it: retrieval with three seeds, classification, a run, sheets of queries."""
    dice = np.random.default_rng(0)
    for language in ("pt", "en"):
        write_retrieval(folder / f"retrieval_{language}.json", language, dice)
    for benchmark in benchmarks:
        for role, lift in (("baseline", 0.0), ("capivara", 0.06)):
            for protocol in ("ours", "authors") if benchmark == benchmarks[0] else ("ours",):
                name = f"{benchmark}_{role}_{protocol}.json"
                write_classification(folder / "classification" / name, benchmark, role, protocol, lift, dice)
    write_json(folder / "run.json", run_content(dice))
    draw_shape("losango", COLOURS["azul"]).save(folder / "retrieval.png")
    for role in ("baseline", "capivara"):
        write_with_sheet(folder, role)
    return folder


def facts(dataset: str, model: str, **more) -> dict:
    known = {"dataset": dataset, "fingerprint": "e71647e1ea270c61", "model": model, "seconds": 12.5}
    return known | {"device": "AMD EPYC, 2 threads (cpu)", "precision": "float32"} | more


def write_retrieval(path: Path, language: str, dice: np.random.Generator) -> None:
    """Of a training run: a baseline, three seeds, and their gains."""
    records = []
    for model, seed in (("baseline", None), ("capivara", 0), ("capivara", 1), ("capivara", 2)):
        place = {"task": "retrieval", "dataset": "openmoji/dataset", "split": "test", "language": language}
        place |= {"protocol": PROTOCOL, "n": 350, "model": model, "seed": seed}
        place |= {"model_folder": "data/openmoji/base" if seed is None else f"seed-{seed}"}
        for direction in DIRECTIONS:
            base = 0.07 + 0.015 * (model == "capivara") + 0.004 * dice.standard_normal()
            for metric, factor in (("recall@1", 1), ("recall@5", 2.4), ("recall@10", 3.3), ("mean_recall", 2.2)):
                value, chance = base * factor, CHANCES[metric]
                records.append(Record(**place, direction=direction, metric=metric, value=value, chance=chance))
            if seed is not None:
                gain = 0.028 - 0.02 * (language == "en") + 0.004 * dice.standard_normal()
                interval = (gain - 0.019, gain + 0.021)
                more = {"direction": direction, "metric": "mean_recall_gain", "value": gain}
                records.append(Record(**place, **more, interval_95=interval))
    write_records(path, records, **facts("data/openmoji/dataset", "."))


def write_classification(
    path: Path, benchmark: str, role: str, protocol: str, lift: float, dice: np.random.Generator
) -> None:
    """Of `eval.classification`: two images that could not be read."""
    classes, images = {"cifar-10": (10, 360), "oxford-flower-102": (102, 4040)}[benchmark]
    accuracy = 0.55 + lift - 0.05 * (protocol == "authors") + 0.02 * dice.standard_normal()
    place = {"task": "classification", "dataset": benchmark, "split": "test", "language": "pt", "protocol": protocol}
    place |= {"direction": "", "n": images, "model": role}
    place |= {"model_folder": "data/openmoji/base" if role == "baseline" else "runs/openmoji-pt-001"}
    records = [Record(**place, metric="accuracy", value=accuracy, chance=1 / classes)]
    records.append(Record(**place, metric="top_5_accuracy", value=min(1, accuracy + 0.2)))
    reason = "UnidentifiedImageError: cannot identify image file '/home/maria/fotos/0017.jpg'"
    parts = {"notes": ["“<b>macarrão</b>” was corrected."], "skipped": {"17": reason, "203": reason}}
    write_records(path, records, **facts(f"data/{benchmark}", place["model_folder"], **parts))


def run_content(dice: np.random.Generator) -> dict:
    """A `run.json`, its curve and the facts beside it."""
    curve = [{"step": 0, "validation": {"text_to_image": 0.26, "image_to_text": 0.25, "loss": 4.3}}]
    for step in range(1, 31):
        loss = 2.9 - 0.6 * step / 30 + 0.05 * dice.standard_normal()
        curve.append({"step": step, "loss": loss, "learning_rate": 5e-5 * (1 - step / 30)})
        if step % 10 == 0:
            curve[-1]["validation"] = {"text_to_image": 0.26 + step / 600, "image_to_text": 0.25 + step / 700}
    config = {"model": "data/openmoji/base", "dataset": ["data/openmoji/dataset"], "language": "pt"}
    return {"schema_version": 2, "config": config, "seed": 0, "steps": 30, "pairs": 15360, "curve": curve} | {
        "device": "AMD EPYC, 2 threads (cpu)",
        "skipped_rows": {"no caption": 2},
    }


def write_with_sheet(folder: Path, role: str) -> None:
    """Of a small data set, with the sheet of queries that `eval.retrieval` draws beside it."""
    place = {"task": "retrieval", "dataset": ATTACK, "split": "test", "language": "pt", "protocol": PROTOCOL}
    place |= {"n": 20, "model": role, "model_folder": f"models/{role}", "direction": "text_to_image"}
    value = 0.5 if role == "capivara" else 0.25
    records = [
        Record(**place, metric="recall@1", value=value, chance=0.05),
        Record(**place, metric="mean_recall", value=value + 0.2, chance=0.2),
        Record(**place, metric="median_rank", value=2.0 if role == "capivara" else 4.0),
    ]
    write_records(folder / f"sheet_{role}.json", records, **facts("formas", f"models/{role}"))
    draw_shape("losango", COLOURS["azul"]).save(folder / f"sheet_{role}.queries.png")


def draw_shape(shape: str, colour: str) -> Image.Image:
    image = Image.new("RGB", (240, 180), "#f4f4f4")
    draw = ImageDraw.Draw(image)
    box, middle = (60, 30, 180, 150), 120
    if shape == "círculo":
        draw.ellipse(box, fill=colour)
    elif shape == "quadrado":
        draw.rectangle(box, fill=colour)
    elif shape == "triângulo":
        draw.polygon([(middle, 30), (60, 150), (180, 150)], fill=colour)
    else:
        draw.polygon([(middle, 25), (60, 90), (middle, 155), (180, 90)], fill=colour)
    return image
