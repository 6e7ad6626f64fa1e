"""ONNX's part of a repository: each tower as a graph of its own, in float32 and in int8, compared with the model.

    onnx/vision_model.onnx  pixel_values (images, 3, side, side)               -> image_embeds (images, width)
    onnx/text_model.onnx    input_ids, attention_mask (texts, tokens), int64   -> text_embeds (texts, width)
                            of SigLIP, input_ids (texts, 64) alone
    onnx/model.onnx         all of these -> logits_per_image (images, texts), logits_per_text, text_embeds, image_embeds

Embeddings have unit length. Weights lie beside their graph in `.onnx_data`; int8 graphs end in `_quantized`, those of
float16 in `_fp16`: the names that transformers.js looks for.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capivara_common.environment import package_versions
from capivara_common.files import write_json
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.modeling_capivara import similarity_logits
from modeling_capivara.two_towers import (
    compute_image_embeds,
    compute_text_embeds,
    pad_batch,
    pads_to_max_length,
    random_images,
    random_texts,
    tokenize,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EMBEDDING_TOLERANCE = 1e-4  # of an embedding's numbers between model and float32 graph; they differ by some 1e-7
SCORE_TOLERANCE = 1e-3  # of scores, which are cosines times the temperature, up to 100
# Rounded are matrix products, and embeddings, most of a multilingual text tower. Convolutions stay float32: in 8 bits
# they lose the image (lowest cosine 0.56 with EfficientNet-Lite0, whose weights are 16 MB).
QUANTIZATION_BLOCK_SIZE = 128  # numbers of a weight's row that share a scale and a zero point
# Blocks, not one scale for all activations of a batch, as `quantize_dynamic` has it for MatMul: of the same bytes and
# speed, but its mean cosine on Portuguese captions is 0.986, that of the blocks 0.998 (text tower of the demo).
QUANTIZATION_METHOD = (
    f"by onnxruntime: weights of matrix products in 8 bits, with a scale and a zero point for {QUANTIZATION_BLOCK_SIZE} numbers, their "
    "activations too (MatMulNBits, onnxruntime from 1.22); embeddings in 8 bits with a scale and a zero point a column"
)
PRECISION_SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # of a graph's name
IMAGE_INPUTS, TEXT_INPUTS = ("pixel_values",), ("input_ids", "attention_mask")
SCORE_OUTPUTS = ("logits_per_image", "logits_per_text")
GRAPH_SIGNATURES = {  # name -> inputs, outputs
    "vision_model": (IMAGE_INPUTS, ("image_embeds",)),
    "text_model": (TEXT_INPUTS, ("text_embeds",)),
    "model": ((*TEXT_INPUTS, *IMAGE_INPUTS), (*SCORE_OUTPUTS, "text_embeds", "image_embeds")),
}
TOWER_GRAPHS = ("vision_model", "text_model")


class EmbeddingGraph(nn.Module):
    """Images, tokens or both to embeddings of unit length, and scores; float32 in and out for any weights."""

    def __init__(self, model: PreTrainedModel, outputs: Sequence[str]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs, in their order."""
        model, found = self.model, {}
        if pixel_values is not None:
            pixel_values = pixel_values.to(next(model.vision_model.parameters()).dtype)
            found["image_embeds"] = compute_image_embeds(model, pixel_values)
        if input_ids is not None:
            found["text_embeds"] = compute_text_embeds(model, input_ids, attention_mask)
        if len(found) == 2:
            scale = model.logit_scale, getattr(model, "logit_bias", None)
            found["logits_per_text"] = similarity_logits(found["text_embeds"], found["image_embeds"], *scale)
            found["logits_per_image"] = found["logits_per_text"].T
        return tuple(found[name].float() for name in self.outputs)


def write_onnx(
    folder: Path,
    source: Path | None = None,
    graphs: Sequence[str] = TOWER_GRAPHS,
    precisions: Sequence[str] = ("float32", "int8"),
) -> None:
    """Write `graphs` of the model in `source`, else in `folder`, to `onnx/` there, and `quantisation.json` about them.

    `precisions` are of `PRECISION_SUFFIXES`: int8, which is made of float32, after it, and float16 last. Raises ValueError where a
    float32 graph differs from the model by more than `EMBEDDING_TOLERANCE` or `SCORE_TOLERANCE`.
    """
    model, processor, onnx = load_model(source or folder).eval(), load_processor(source or folder), folder / "onnx"
    # Six of each, and one of each alone: both of other sizes than the exporter sees.
    pictures = [image.convert("RGB") for image in random_images()]  # not every processor does it
    batches = [
        pad_batch(processor, tokenize(processor, random_texts()[:n]))
        | {"pixel_values": processor(images=pictures[:n], return_tensors="pt")["pixel_values"]}
        for n in (6, 1)
    ]
    with torch.inference_mode():
        expected = [model(**batch) for batch in batches]
    images, texts, tokens = (torch.export.Dim(name, min=1) for name in ("images", "texts", "tokens"))
    length = {} if pads_to_max_length(processor) else {1: tokens}
    shapes = {key: {0: images} if key in IMAGE_INPUTS else {0: texts} | length for key in batches[0]}
    example = {
        key: of[:3] if key in IMAGE_INPUTS else of[:2, : 7 if length else None] for key, of in batches[0].items()
    }
    onnx.mkdir()
    paths = []
    for precision in precisions:
        if precision == "float16":
            exact = {name: value.data.clone() for name, value in model.named_parameters() if name.startswith("logit_")}
            model.half()
            for key, value in exact.items():
                getattr(model, key).data = value
        for name in graphs:
            inputs, outputs = GRAPH_SIGNATURES[name]
            paths.append(onnx / f"{name}{PRECISION_SUFFIXES[precision]}.onnx")
            if precision == "int8":
                _quantize_weights(onnx / f"{name}.onnx", paths[-1])
                continue
            given, dims = ({key: of[key] for key in inputs if key in of} for of in (example, shapes))
            export_graph(EmbeddingGraph(model, outputs), given, outputs, paths[-1], dims)
    del model  # before graphs are in memory, whole
    found = {path.name: _measure_graph(path, batches, expected) for path in paths}
    versions = {**package_versions(), **{name: version(name) for name in ONNX_PACKAGES}}
    write_json(onnx / "quantisation.json", {"method": QUANTIZATION_METHOD, "graphs": found, "versions": versions})


def open_session(path: Path) -> "InferenceSession":
    """A graph in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def weights_file(graph: Path) -> Path:
    """Where the weights of a graph lie."""
    return graph.with_name(f"{graph.name}_data")


def export_graph(
    module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], path: Path, shapes: dict | None = None
) -> None:
    """Export a module with example `inputs`, weights beside it; dimensions without a name in `shapes` are fixed."""
    with _silence_logging(), torch.no_grad():
        # In evaluation mode: the exporter restores what it finds, and would leave dropout on.
        program = torch.onnx.export(
            module.eval(), (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=list(inputs), output_names=list(outputs),
        )  # fmt: skip
        program.save(path, external_data=True)
    _strip_exporter_notes(path)


def _strip_exporter_notes(path: Path) -> None:
    """Take the exporter's notes out of a graph: they hold the stack of every operation, with this machine's paths.

    The weights get the name that transformers.js looks for.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph, parts = model.graph, [model.graph, *model.functions]
    owners = [model, *graph.input, *graph.output, *graph.initializer]
    for owner in [*owners, *parts, *(item for part in parts for item in (*part.node, *part.value_info))]:
        owner.ClearField("metadata_props")
        owner.ClearField("doc_string")
    data = path.with_name(f"{path.name}.data").replace(weights_file(path))
    for entry in (entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"):
        entry.value = data.name
    onnx.save(model, path)


def _quantize_weights(source: Path, target: Path) -> None:
    """Make the int8 graph of a float32 one."""
    with _silence_logging():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        unsigned = {"per_channel": True, "weight_type": QuantType.QUInt8}
        quantize_dynamic(source, target, op_types_to_quantize=["Gather"], **unsigned)
        # Level 4 is arithmetic in 8 bits.
        quantiser = MatMulNBitsQuantizer(
            onnx.load(target),
            bits=8,
            block_size=QUANTIZATION_BLOCK_SIZE,
            accuracy_level=4,
            op_types_to_quantize=("MatMul",),
        )
        quantiser.process()
        onnx.save(quantiser.model.model, target, save_as_external_data=True, location=weights_file(target).name)


def _measure_graph(path: Path, batches: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Bytes of a graph and its weights, and how far it is from the model on some inputs."""
    session, size = open_session(path), sum(part.stat().st_size for part in (path, weights_file(path)))
    inputs, outputs = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
    differences, cosines = [], []
    for batch, wanted in zip(batches, expected, strict=True):
        found = dict(zip(outputs, session.run(None, {name: batch[name].numpy() for name in inputs}), strict=True))
        ours = {name: wanted[name].numpy() for name in outputs}
        differences.append(float(np.abs(found[outputs[0]] - ours[outputs[0]]).max()))
        cosines += [float((found[k] * ours[k]).sum(axis=-1).min()) for k in outputs if k.endswith("_embeds")]
    is_float32, has_scores = path.stem in GRAPH_SIGNATURES, outputs[0] in SCORE_OUTPUTS
    if is_float32:
        check_difference(path, max(differences), SCORE_TOLERANCE if has_scores else EMBEDDING_TOLERANCE)
    facts = {"bytes": size, "lowest_cosine": min(cosines)}
    if has_scores:
        return facts | {"largest_score_difference": max(differences)}
    return {"bytes": size, "largest_difference": max(differences)} if is_float32 else facts


def check_difference(graph: Path, difference: float, tolerance: float = EMBEDDING_TOLERANCE) -> None:
    """Raise ValueError where a graph differs from the model by more than a tolerance, or by what is no number."""
    if not difference <= tolerance:
        raise ValueError(
            f"The graph {graph.parent.name}/{graph.name} differs from the model by {difference:.3g}, above "
            f"{tolerance:g}; nothing was kept. Leave its format out of --formats."
        )


@contextmanager
def _silence_logging() -> Iterator[None]:
    """Without the exporter's and the quantiser's remarks on their own workings, one of which sets up all logging."""
    root = logging.root
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
