"""Retrieval and zero-shot classification give the figures of clip-benchmark for the same model and data."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from eval.prompts import load_prompts
from modeling_capivara.loading import load_model, load_processor

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Adapter(torch.nn.Module):
    """A CAPIVARA model with the methods that clip-benchmark calls."""

    def __init__(self, folder):
        super().__init__()
        self.model, self.processor = load_model(folder).eval(), load_processor(folder)

    def encode_image(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output

    def encode_text(self, tokens):
        return self.model.get_text_features(tokens).pooler_output

    def tokenizer(self, texts):
        return self.processor(text=list(texts), return_tensors="pt", padding=True)["input_ids"]

    def pixels(self, image):
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def make_images(count: int) -> list[PIL.Image.Image]:
    """Make noisy images, each in a random color."""
    rng = np.random.default_rng(0)
    pixels = [(rng.random((40, 48, 3)) * 90 + rng.random(3) * 160).astype(np.uint8) for _ in range(count)]
    return [PIL.Image.fromarray(array) for array in pixels]


def stack_images(batch: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[list[str]]]:
    return torch.stack([image for image, _ in batch]), [texts for _, texts in batch]


def test_retrieval_agrees_with_clip_benchmark(tiny_folder, tmp_path):
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate as evaluate_clip_benchmark

    from eval.retrieval import main

    words = ("gato", "casa", "céu", "pão", "uma foto de um cachorro azul", "árvore verde")
    captions = [[f"{word} {i}" for word in words[: 2 + i % 4]] for i in range(60)]
    images = make_images(60)
    (tmp_path / "d" / "test").mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(tmp_path / "d" / "test" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "captions-pt": texts}) for i, texts in enumerate(captions)]
    (tmp_path / "d" / "test" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    main(["--model", str(tiny_folder), "--dataset", str(tmp_path / "d"), "--output", str(tmp_path / "r.json")])
    ours = {(r["direction"], r["metric"]): r["value"] for r in json.loads((tmp_path / "r.json").read_text())["records"]}

    adapter = Adapter(tiny_folder)
    rows = list(zip(map(adapter.pixels, images), captions, strict=True))
    loader = DataLoader(rows, 7, collate_fn=stack_images)
    expected = evaluate_clip_benchmark(adapter, loader, adapter.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert 0 < expected["image_retrieval_recall@5"] < 1
    for k in (1, 5, 10):
        assert ours["text_to_image", f"recall@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert ours["image_to_text", f"recall@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-4)


def test_classification_agrees_with_clip_benchmark(tiny_folder, tmp_path):
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    from sklearn.metrics import top_k_accuracy_score

    from eval.classification import main

    images, labels = make_images(50), [i % 10 for i in range(50)]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "d" / CIFAR[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    arguments = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(tmp_path / "d")]
    main([*arguments, "--output", str(tmp_path / "r.json")])
    ours = {r["metric"]: r["value"] for r in json.loads((tmp_path / "r.json").read_text())["records"]}

    adapter, prompts = Adapter(tiny_folder), load_prompts("cifar-10")
    loader = DataLoader(list(zip(map(adapter.pixels, images), labels, strict=True)), batch_size=8)
    templates = dict(zip(prompts.names, prompts.class_prompts, strict=True))
    classifier = zero_shot_classifier(adapter, adapter.tokenizer, prompts.names, templates, "cpu", amp=False)
    # Its own accuracy function needs numpy 1.
    logits, target = run_classification(adapter, classifier, loader, "cpu", amp=False)
    for k, metric in ((1, "accuracy"), (5, "top_5_accuracy")):
        assert ours[metric] == pytest.approx(top_k_accuracy_score(target, logits, k=k), abs=1e-6)
