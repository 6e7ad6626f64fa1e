"""Measure what quantization does to embeddings and recall of a trained model.

    pip install "torchao>=0.18"
    python -m benchmarks.quantize --output benchmarks/results/quantize.json

Each kind of quantization is applied to a new copy of the model. Its embeddings of a test split are compared with the
embeddings of the float32 model (cosines), and ranked among themselves (mean recall). Random weights would not do:
quantization errors depend on the outliers that trained weights have. The linear layers of the towers are quantized, but
not the projections, except in the kind that says so: a single outlier in a projection can spoil all embeddings.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.timing import describe_conditions, report_results
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_search.miniature import get_miniature_folder
from eval.capivara_metrics.metrics import cross_modal_ranks, mean_recall
from examples.openmoji.dataset import load_dataset_with_images
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

GROUP_SIZE = 32  # weights that share a scale in 4 bits, torchao's usual size


@dataclass
class QuantizeArguments:
    """Command-line arguments of `benchmarks.quantize`."""

    model: str | None = flag(None, "Folder or Hub id of a trained model. Default: the miniature of `capivara`.")
    dataset: Path = flag(
        Path("data/openmoji/dataset"), "Dataset of `examples.openmoji.prepare`; its test split is used."
    )
    language: str = flag("pt", "Language of the captions.")
    rows: int = flag(350, "Number of rows of the test split, from the first one.")
    output: Path | None = flag(None, "JSON file for the results.")


def _in_tower(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "projection" not in name


def _in_tower_or_table(module: nn.Module, name: str) -> bool:
    return _in_tower(module, name) or isinstance(module, nn.Embedding)


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def _apply_torchao(config: Any, selects: Callable[[nn.Module, str], bool] = _in_tower) -> Callable:
    """Return a function that quantizes the selected layers of a model with torchao, and returns the model."""

    def quantize(model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(model, config, filter_fn=selects)
        return model

    return quantize


def _apply_dynamic(model: nn.Module) -> nn.Module:
    """Quantize the linear layers of both towers with PyTorch's own dynamic quantization, and return the model."""
    for tower in ("text_model", "vision_model"):
        setattr(model, tower, torch.ao.quantization.quantize_dynamic(getattr(model, tower), {nn.Linear}))
    return model


def quantizers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return the kinds of quantization: functions that quantize a model in place and return it, by name."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )

    int8_rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    four_bits = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP_SIZE))
    return {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.to(torch.bfloat16),
        "torchao int8, weights": _apply_torchao(Int8WeightOnlyConfig()),
        "torchao int8, weights and token embeddings": _apply_torchao(int8_rows, _in_tower_or_table),
        "torchao int8, weights, with projections": _apply_torchao(Int8WeightOnlyConfig(), _is_linear),
        "torchao int8, weights and activations": _apply_torchao(Int8DynamicActivationInt8WeightConfig()),
        "torch dynamic int8": _apply_dynamic,
        f"4 bits, weights in groups of {GROUP_SIZE}": _apply_torchao(four_bits),
    }


def compare(reference: Tensor, embeds: Tensor) -> dict[str, float]:
    """Return the mean and the lowest cosine between two lists of embeddings (rows, width) of unit length."""
    cosines = (reference * embeds).sum(dim=-1).tolist()
    return {"mean_cosine": statistics.mean(cosines), "min_cosine": min(cosines)}


def main(argv: list[str] | None = None) -> None:
    """Run the command: quantize, embed, compare, and print the results as JSON."""
    args = parse_arguments(QuantizeArguments, __doc__, argv)
    source = args.model or str(get_miniature_folder())
    split = load_dataset_with_images(args.dataset)["test"]
    rows = split.select(range(min(args.rows, len(split))))
    texts, images = [captions[0] for captions in rows[f"captions-{args.language}"]], list(rows["image"])
    processor, groups = load_processor(source), torch.arange(len(texts))
    reference, measured = None, {}
    for name, quantize in tqdm(quantizers().items(), unit="kind"):
        model = quantize(load_model(source).eval())
        embeds = embed_texts(model, processor, texts).float(), embed_images(model, processor, images).float()
        reference = embeds if name == "float32" else reference
        text_ranks, image_ranks = cross_modal_ranks(*embeds, groups, groups)
        measured[name] = {
            "texts": compare(reference[0], embeds[0]),
            "images": compare(reference[1], embeds[1]),
            "text_to_image": mean_recall(text_ranks),
            "image_to_text": mean_recall(image_ranks),
        }
    what = {"model": args.model or "miniature", "rows": len(texts), "language": args.language}
    report_results(describe_conditions("torchao") | what | {"measured": measured}, args.output)


if __name__ == "__main__":
    run_command(main)
