"""Export a model to ONNX graphs in float32, int8 and float16, and compare the outputs of graphs and model.

    onnx/vision_model.onnx  pixel_values (images, 3, side, side)               -> image_embeds (images, width)
    onnx/text_model.onnx    input_ids, attention_mask (texts, tokens), int64   -> text_embeds (texts, width)
                            SigLIP: only input_ids (texts, 64)
    onnx/model.onnx         all inputs -> logits_per_image (images, texts), logits_per_text, text_embeds, image_embeds

Embeddings have unit length. The file `<graph>.onnx_data` has the weights of a graph. The names of int8 graphs end in
`_quantized` and the names of float16 graphs in `_fp16`.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capivara_common.environment import package_versions
from capivara_common.files import write_json
from hub_upload.formats import EMBEDDING_TOLERANCE
from modeling_capivara import two_towers
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.modeling_capivara import similarity_logits

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Largest allowed difference of similarity scores between the model and its float32 graph. It is larger than
# `EMBEDDING_TOLERANCE`, because a score is a cosine times the logit scale, which may be up to 100. Embeddings usually
# differ by 1e-7.
SCORE_TOLERANCE = 1e-3
QUANTIZATION_BLOCK_SIZE = 128  # number of consecutive int8 weights that share a scale and a zero point
# At equal size and speed, MatMulNBits is more accurate than `quantize_dynamic`, which has a single scale for all
# activations of a batch. For Portuguese captions and the text tower of the demo model, the mean cosine with the float32
# embeddings is 0.998 with MatMulNBits and 0.986 with `quantize_dynamic`.
QUANTIZATION_METHOD = (
    "by onnxruntime: weights of matrix products in 8 bits, with a scale and a zero point for "
    f"{QUANTIZATION_BLOCK_SIZE} numbers, their activations too (MatMulNBits, onnxruntime from 1.22); embeddings in 8 "
    "bits with a scale and a zero point a column"
)
# transformers.js expects these suffixes.
PRECISION_SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # {precision: end of a graph's name}
IMAGE_INPUTS, TEXT_INPUTS = ("pixel_values",), ("input_ids", "attention_mask")
SCORE_OUTPUTS = ("logits_per_image", "logits_per_text")
GRAPH_SIGNATURES = {  # {name of a graph: (names of its inputs, names of its outputs)}
    "vision_model": (IMAGE_INPUTS, ("image_embeds",)),
    "text_model": (TEXT_INPUTS, ("text_embeds",)),
    "model": ((*TEXT_INPUTS, *IMAGE_INPUTS), (*SCORE_OUTPUTS, "text_embeds", "image_embeds")),
}
TOWER_GRAPHS = ("vision_model", "text_model")


class EmbeddingGraph(nn.Module):
    """Module to export to ONNX: a two-tower model that returns chosen outputs, such as embeddings or similarity scores.

    Embeddings have unit length. Scores are the logits of the model and need both images and texts. Pixels and outputs
    are float32, even if the model is float16.

    Args:
        model: Model with both towers.
        outputs: Names of the outputs: "image_embeds", "text_embeds", "logits_per_image" or "logits_per_text".
    """

    def __init__(self, model: PreTrainedModel, outputs: Sequence[str]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the embeddings and scores that `self.outputs` names.

        Args:
            input_ids: Token ids, shape (texts, tokens). None if no output needs texts.
            attention_mask: 1 for a token and 0 for padding, shape (texts, tokens). None if the model uses no mask.
            pixel_values: Preprocessed images, shape (images, 3, height, width). None if no output needs images.

        Returns:
            The outputs as float32 tensors, in the order of `self.outputs`.
        """
        model, results = self.model, {}
        if pixel_values is not None:
            pixel_values = pixel_values.to(next(model.vision_model.parameters()).dtype)
            results["image_embeds"] = two_towers.compute_image_embeds(model, pixel_values)
        if input_ids is not None:
            results["text_embeds"] = two_towers.compute_text_embeds(model, input_ids, attention_mask)
        if len(results) == 2:
            scale, bias = model.logit_scale, getattr(model, "logit_bias", None)
            results["logits_per_text"] = similarity_logits(results["text_embeds"], results["image_embeds"], scale, bias)
            results["logits_per_image"] = results["logits_per_text"].T
        return tuple(results[name].float() for name in self.outputs)


def write_onnx(
    folder: Path,
    source: Path | None = None,
    graphs: Sequence[str] = TOWER_GRAPHS,
    precisions: Sequence[str] = ("float32", "int8"),
) -> None:
    """Write ONNX graphs of a model to the subfolder `onnx`, and their sizes and accuracy to `onnx/quantisation.json`.

    Args:
        folder: Folder in which the subfolder `onnx` is created.
        source: Folder of the model. None: the model is in `folder`.
        graphs: Graphs to write: "vision_model", "text_model" or "model" (both towers with similarity scores).
        precisions: Number formats of each graph: "float32", "int8" and "float16". "int8" requires "float32" before it,
            and "float16" must be last.

    Raises:
        ValueError: If a float32 graph differs from the model by more than `EMBEDDING_TOLERANCE` or `SCORE_TOLERANCE`.
    """
    model, processor, onnx = load_model(source or folder).eval(), load_processor(source or folder), folder / "onnx"
    # The graphs are compared with the model on a batch of six images and texts, and on a batch of one image and text.
    # The exporter traces the model with three images and two texts, so the comparison also shows whether a graph works
    # for other batch sizes.
    pictures = [image.convert("RGB") for image in two_towers.random_images()]  # some processors don't convert to RGB
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    tokenized = two_towers.tokenize(processor, two_towers.random_texts())
    batches = [two_towers.pad_batch(processor, tokenized[:n]) | {"pixel_values": pixels[:n]} for n in (6, 1)]
    with torch.inference_mode():
        expected = [model(**batch) for batch in batches]
    images, texts, tokens = (torch.export.Dim(name, min=1) for name in ("images", "texts", "tokens"))
    # The example texts for tracing are cut to 7 tokens, unless the model needs texts of the full length.
    length, token_count = ({}, None) if two_towers.pads_to_max_length(processor) else ({1: tokens}, 7)
    shapes = {key: {0: images} if key in IMAGE_INPUTS else {0: texts} | length for key in batches[0]}
    example = {key: rows[:3] if key in IMAGE_INPUTS else rows[:2, :token_count] for key, rows in batches[0].items()}
    onnx.mkdir()
    paths = []
    for precision in precisions:
        if precision == "float16":
            # float16 must be the last precision, because the model itself is converted. The logit scale and the logit
            # bias belong to no child module, so they stay float32. Rounding them would change all scores.
            for module in model.children():
                module.half()
        for name in graphs:
            inputs, outputs = GRAPH_SIGNATURES[name]
            paths.append(onnx / f"{name}{PRECISION_SUFFIXES[precision]}.onnx")
            if precision == "int8":
                _quantize_weights(onnx / f"{name}.onnx", paths[-1])
                continue
            example_inputs = {key: example[key] for key in inputs if key in example}
            dynamic_shapes = {key: shapes[key] for key in inputs if key in shapes}
            export_graph(EmbeddingGraph(model, outputs), example_inputs, outputs, paths[-1], dynamic_shapes)
    del model  # frees memory before the graphs are loaded
    measurements = {path.name: _measure_size_and_accuracy(path, batches, expected) for path in paths}
    report = {"method": QUANTIZATION_METHOD, "graphs": measurements, "versions": package_versions(*ONNX_PACKAGES)}
    write_json(onnx / "quantisation.json", report)


def open_session(path: Path) -> "InferenceSession":
    """Load an ONNX graph with onnxruntime, to run it on the CPU with as many threads as PyTorch uses.

    Args:
        path: File of the graph.

    Returns:
        The onnxruntime session, whose method `run` computes the outputs of the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def weights_file(graph: Path) -> Path:
    """Return the path of the file that holds the weights of an ONNX graph.

    Args:
        graph: File of the graph, such as `onnx/text_model.onnx`. The result is then `onnx/text_model.onnx_data`.
    """
    return graph.with_name(f"{graph.name}_data")


def export_graph(
    module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], path: Path, shapes: dict | None = None
) -> None:
    """Export a PyTorch module as an ONNX graph, with the weights in a separate file (see `weights_file`).

    Args:
        module: Module to export.
        inputs: Dict {input name: example input}.
        outputs: Names of the outputs.
        path: File of the graph.
        shapes: Dimensions whose size may vary, in the form of `dynamic_shapes` of `torch.onnx.export`. None: no
            dimension may vary.
    """
    with _silence_logs_and_warnings(), torch.no_grad():
        # The exporter uses the current mode of the module. In training mode, dropout would become part of the graph, so
        # the module is set to evaluation mode first.
        program = torch.onnx.export(
            module.eval(), (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=list(inputs), output_names=list(outputs),
        )  # fmt: skip
        program.save(path, external_data=True)
    _strip_metadata_and_rename_weights_file(path)


def _strip_metadata_and_rename_weights_file(path: Path) -> None:
    """Remove the exporter's metadata from a graph file, and rename its weight file as transformers.js expects.

    The metadata must not be published: it contains a stack trace of every operation, with paths of this machine.

    Args:
        path: File of the graph, which is rewritten.
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
    """Write the int8 version of a float32 ONNX graph. Only matrix products and token embeddings are quantized.

    Args:
        source: File of the float32 graph.
        target: File of the int8 graph. The weights are written to a separate file in the same folder.
    """
    with _silence_logs_and_warnings():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        # Only token embeddings ("Gather") and matrix products ("MatMul") are quantized, because they have most weights.
        # int8 convolutions would make embeddings of the image tower EfficientNet-Lite0 (only 16 MB) unusable: the
        # lowest cosine with the float32 embeddings is 0.56.
        unsigned = {"per_channel": True, "weight_type": QuantType.QUInt8}
        quantize_dynamic(source, target, op_types_to_quantize=["Gather"], **unsigned)
        # At accuracy level 4, onnxruntime quantizes not only the weights but also the activations, so that it can
        # compute the products with 8-bit integers.
        options = {"bits": 8, "block_size": QUANTIZATION_BLOCK_SIZE, "accuracy_level": 4}
        quantizer = MatMulNBitsQuantizer(onnx.load(target), op_types_to_quantize=("MatMul",), **options)
        quantizer.process()
        onnx.save(quantizer.model.model, target, save_as_external_data=True, location=weights_file(target).name)


def _measure_size_and_accuracy(
    path: Path, batches: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Measure the size of an ONNX graph, and how much the outputs of graph and model differ.

    Args:
        path: File of the graph.
        batches: Inputs of the model, one dict {input name: tensor} per batch.
        expected: Outputs of the model, one dict {output name: tensor} per batch.

    Returns:
        A dict with some of these keys:

        - "bytes": size of graph and weights. All graphs have it.
        - "largest_difference": largest absolute difference of an embedding component. Only for float32 graphs without
          scores.
        - "lowest_cosine": lowest cosine similarity between an embedding of the graph and the same embedding of the
          model. For all other graphs.
        - "largest_score_difference": largest absolute difference of a similarity score. Only for graphs with scores.

    Raises:
        ValueError: If a float32 graph differs by more than `EMBEDDING_TOLERANCE` or `SCORE_TOLERANCE`.
    """
    session, size = open_session(path), sum(part.stat().st_size for part in (path, weights_file(path)))
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    differences, cosines = [], []
    for batch, model_outputs in zip(batches, expected, strict=True):
        values = session.run(None, {name: batch[name].numpy() for name in inputs})
        theirs, ours = dict(zip(outputs, values, strict=True)), {name: model_outputs[name].numpy() for name in outputs}
        differences.append(float(np.abs(theirs[outputs[0]] - ours[outputs[0]]).max()))
        cosines += [float((theirs[k] * ours[k]).sum(axis=-1).min()) for k in outputs if k.endswith("_embeds")]
    is_float32, has_scores = path.stem in GRAPH_SIGNATURES, outputs[0] in SCORE_OUTPUTS
    if is_float32:
        check_difference(path, max(differences), SCORE_TOLERANCE if has_scores else EMBEDDING_TOLERANCE)
    if has_scores:
        return {"bytes": size, "lowest_cosine": min(cosines), "largest_score_difference": max(differences)}
    if is_float32:
        return {"bytes": size, "largest_difference": max(differences)}
    return {"bytes": size, "lowest_cosine": min(cosines)}


def check_difference(graph: Path, difference: float, tolerance: float = EMBEDDING_TOLERANCE) -> None:
    """Check that the measured difference between an ONNX graph and the model is within a tolerance.

    Args:
        graph: File of the graph, for the error message.
        difference: Largest absolute difference between their outputs.
        tolerance: Largest allowed difference.

    Raises:
        ValueError: If `difference` is above `tolerance` or is NaN.
    """
    if not difference <= tolerance:
        raise ValueError(
            f"The export was removed, because the graph {graph.parent.name}/{graph.name} differs from the model by "
            f"{difference:.3g}, more than {tolerance:g}. Leave its format out of --formats."
        )


@contextmanager
def _silence_logs_and_warnings() -> Iterator[None]:
    """Return a context manager that hides warnings and the log messages of the ONNX exporter and quantizer.

    At the end, the root logger gets its old level and handlers back, because one of these libraries changes them.
    """
    root = logging.root
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
