"""Measure how much quantization changes the embeddings and the retrieval recall of a trained model.

    pip install "torchao>=0.18"
    python -m benchmarks.quantize --output benchmarks/results/quantize.json

For each kind of quantization, two things are measured on the test split: the cosines between the embeddings of the
quantized model and of the float32 model, and the mean recall of retrieval. Only the linear layers of the towers are
quantized, unless the name of the kind says otherwise.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.tools import output_results_with_conditions
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_search.miniature_model import get_or_build_miniature_folder
from eval.capivara_metrics.metrics import cross_modal_ranks, mean_recall
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

GROUP_SIZE = 32  # number of weights that share one scale in 4-bit quantization, as usual in torchao


@dataclass
class QuantizeArguments:
    """Command-line arguments of `benchmarks.quantize`, which measures how quantization changes results."""

    model: str | None = flag(None, "Folder or Hub id of a trained model. Default: the miniature model of the search.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji dataset. Only its test split is used.")
    language: str = flag("pt", "Language of the captions.")
    rows: int = flag(350, "Number of rows to use, from the start of the test split.")
    output: Path | None = flag(None, "JSON file for the results.")


# One outlier in a projection can spoil all embeddings, so most kinds do not quantize the projections.
def _in_tower(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "projection" not in name


def _in_tower_or_table(module: nn.Module, name: str) -> bool:
    return _in_tower(module, name) or isinstance(module, nn.Embedding)


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def _make_torchao_quantizer(config: Any, selects: Callable[[nn.Module, str], bool] = _in_tower) -> Callable:
    """Return a function that quantizes some layers of a model with torchao, and returns the model.

    Args:
        config: Quantization config of torchao.
        selects: Function that gets a module and its name, and returns whether the module is quantized. By default, the
            linear layers of the towers are quantized.
    """

    def quantize(model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(model, config, filter_fn=selects)
        return model

    return quantize


def _apply_dynamic_quantization(model: nn.Module) -> nn.Module:
    """Quantize the linear layers of both towers with PyTorch's own dynamic quantization, and return the model."""
    for tower in ("text_model", "vision_model"):
        setattr(model, tower, torch.ao.quantization.quantize_dynamic(getattr(model, tower), {nn.Linear}))
    return model


def build_quantizers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Build one function for each kind of quantization that the benchmark compares, such as int8 or 4-bit weights.

    Returns:
        `{name of the kind: function}`. Each function gets a model, quantizes it in place and returns the quantized
        model. The kind "float32" changes nothing and serves as the reference.
    """
    from torchao import quantization

    int8 = quantization.Int8WeightOnlyConfig()
    int8_rows = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=quantization.PerAxis(0))
    groups = quantization.PerGroup(GROUP_SIZE)
    four_bits = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
    int8_activations = quantization.Int8DynamicActivationInt8WeightConfig()
    return {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.to(torch.bfloat16),
        "torchao int8, weights": _make_torchao_quantizer(int8),
        "torchao int8, weights and token embeddings": _make_torchao_quantizer(int8_rows, _in_tower_or_table),
        "torchao int8, weights, with projections": _make_torchao_quantizer(int8, _is_linear),
        "torchao int8, weights and activations": _make_torchao_quantizer(int8_activations),
        "torch dynamic int8": _apply_dynamic_quantization,
        f"4 bits, weights in groups of {GROUP_SIZE}": _make_torchao_quantizer(four_bits),
    }


def compute_mean_and_lowest_cosine(reference: Tensor, embeds: Tensor) -> dict[str, float]:
    """Measure how close a quantized model's embeddings are to those of the float32 model, by cosine similarity.

    Args:
        reference: Embeddings of the float32 model, (rows, width), unit length.
        embeds: Embeddings of the same inputs by the quantized model, (rows, width), unit length.

    Returns:
        `{"mean_cosine": mean over the rows, "min_cosine": lowest of the rows}`. 1 means that nothing changed.
    """
    cosines = (reference * embeds).sum(dim=-1).tolist()
    return {"mean_cosine": statistics.mean(cosines), "min_cosine": min(cosines)}


def main(argv: list[str] | None = None) -> None:
    """Run the quantization benchmark: quantize the model in several ways, evaluate each, and print JSON results."""
    args = parse_arguments(QuantizeArguments, __doc__, argv)
    # A trained model is necessary: quantization errors depend on outliers, which random weights do not have.
    source = args.model or str(get_or_build_miniature_folder())
    split = load_dataset_and_refuse_image_paths(args.dataset)["test"]
    rows = split.select(range(min(args.rows, len(split))))
    texts, images = [captions[0] for captions in rows[f"captions-{args.language}"]], list(rows["image"])
    processor, groups = load_processor(source), torch.arange(len(texts))
    reference, measured = None, {}
    for name, quantize in tqdm(build_quantizers().items(), unit="kind"):
        model = quantize(load_model(source).eval())
        embeds = embed_texts(model, processor, texts).float(), embed_images(model, processor, images).float()
        reference = embeds if name == "float32" else reference
        text_ranks, image_ranks = cross_modal_ranks(*embeds, groups, groups)
        measured[name] = {
            "texts": compute_mean_and_lowest_cosine(reference[0], embeds[0]),
            "images": compute_mean_and_lowest_cosine(reference[1], embeds[1]),
            "text_to_image": mean_recall(text_ranks),
            "image_to_text": mean_recall(image_ranks),
        }
    what = {"model": args.model or "miniature", "rows": len(texts), "language": args.language}
    output_results_with_conditions(what | {"measured": measured}, args.output, "torchao")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
