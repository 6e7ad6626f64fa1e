"""`benchmarks.quantize`: what quantization does to the embeddings of a trained model."""

import json

import pytest
import torch

from benchmarks import quantize


def test_compare_returns_mean_and_lowest_cosine():
    reference = torch.eye(2)
    embeds = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert quantize.compare(reference, embeds) == {
        "mean_cosine": pytest.approx(0.8),
        "min_cosine": pytest.approx(0.6),
    }


@pytest.mark.slow
def test_every_kind_is_measured(tiny_folder, tiny_dataset_folder, tmp_path, capsys):
    pytest.importorskip("torchao")
    output = tmp_path / "quantize.json"
    dataset = str(tiny_dataset_folder)
    quantize.main(["--model", str(tiny_folder), "--dataset", dataset, "--rows", "8", "--output", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["rows"] == 8 and set(results["measured"]) == set(quantize.quantizers())
    assert results["measured"]["float32"]["texts"]["min_cosine"] == pytest.approx(1)
    assert 0.5 < results["measured"]["torchao int8, weights"]["texts"]["mean_cosine"] < 1
