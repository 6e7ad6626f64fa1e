"""ONNX's part of a repository: each tower as a graph of its own, in float32 and in int8, compared with the model.

    onnx/vision_model.onnx  pixel_values (images, 3, side, side)               -> image_embeds (images, width)
    onnx/text_model.onnx    input_ids, attention_mask (texts, tokens), int64   -> text_embeds (texts, width)

Embeddings have unit length. Weights lie beside their graph in `.onnx_data`, and int8 graphs end in `_quantized`: the
names that transformers.js looks for, so that both read the same files.
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

from capivara_common.environment import package_versions
from capivara_common.files import write_json
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.embedder import random_images, random_texts
from modeling_capivara.loading import load_model, load_processor

if TYPE_CHECKING:
    from onnx import GraphProto
    from onnxruntime import InferenceSession

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of an embedding's numbers between model and float32 graph; they differ by some 1e-7
# Rounded are matrix products, and embeddings, most of a multilingual text tower. Convolutions stay float32: in 8 bits
# they lose the image (lowest cosine 0.56 with EfficientNet-Lite0, whose weights are 16 MB).
BLOCK = 128  # numbers of a weight's row that share a scale and a zero point
WORTH_IT = 0.8  # an int8 graph whose weights take more than this share of the float32 bytes is not kept
# Blocks, not one scale for all activations of a batch, as `quantize_dynamic` has it for MatMul: of the same bytes and
# speed, but its mean cosine on Portuguese captions is 0.986, that of the blocks 0.998 (text tower of the demo).
METHOD = (
    f"by onnxruntime: weights of matrix products in 8 bits, with a scale and a zero point for {BLOCK} numbers, their "
    "activations too (MatMulNBits, onnxruntime from 1.22); embeddings in 8 bits with a scale and a zero point a column"
)
ENDINGS = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # of a graph's name
OUTPUTS = {"vision": "image_embeds", "text": "text_embeds"}
TOWERS = tuple(OUTPUTS)
logger = logging.getLogger("capivara")


class Tower(nn.Module):
    """Images or tokens to `image_embeds` or `text_embeds`, of unit length; float32 in and out for any weights."""

    def __init__(self, model: CapivaraModel, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Tensor:
        """(rows, projection_dim), unit length, of the texts or of the images."""
        pixel_values = None if pixel_values is None else pixel_values.to(self.model.dtype)
        return self.model(input_ids, attention_mask, pixel_values)[self.output].float()


def write_onnx(folder: Path, source: Path | None = None, towers: Sequence[str] = TOWERS) -> None:
    """Write the graphs of a model to `onnx/` of a folder, and `onnx/quantisation.json` about the int8 ones.

    Args:
        folder: where `onnx/` is made.
        source: folder of the model; `folder` itself where None.
        towers: of `TOWERS`, those that are written.

    Raises ValueError where a float32 graph differs from the model by more than `TOLERANCE`.
    """
    model, processor = load_model(source or folder).eval(), load_processor(source or folder)
    onnx = folder / "onnx"
    onnx.mkdir()
    write_towers(model, processor, onnx, "float32", towers)
    found = {}
    for kind in towers:
        found |= _quantised(onnx, kind)
    _compare(model, processor, onnx, found)
    versions = {**package_versions(), **{name: version(name) for name in ONNX_PACKAGES}}
    facts = {"method": METHOD, "graphs": found, "versions": versions}
    write_json(onnx / "quantisation.json", facts)


def write_towers(
    model: CapivaraModel, processor: CapivaraProcessor, onnx: Path, precision: str, towers: Sequence[str] = TOWERS
) -> None:
    """Export towers of a model, whose weights have that precision ("float32", "float16"), to a folder."""
    side = processor.image_processor.crop_size["height"]
    images, texts, tokens = (torch.export.Dim(name, min=1) for name in ("images", "texts", "tokens"))
    ids = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    inputs = {"vision": {"pixel_values": torch.zeros(2, 3, side, side)}, "text": ids}
    shapes = {"vision": {"pixel_values": {0: images}}, "text": {name: {0: texts, 1: tokens} for name in ids}}
    for kind in towers:
        path = onnx / f"{kind}_model{ENDINGS[precision]}.onnx"
        write_graph(Tower(model, OUTPUTS[kind]), inputs[kind], shapes[kind], OUTPUTS[kind], path)


def graphs(folder: Path, precision: str) -> dict[str, Path]:
    """Tower -> graph in a precision, of those there are; the float32 one stands in where a tower has none in int8."""
    found = {}
    for kind in TOWERS:
        # `_int8` is what exports of before the names of transformers.js have.
        endings = (ENDINGS[precision], *(("_int8", "") if precision == "int8" else ()))
        paths = [folder / "onnx" / f"{kind}_model{ending}.onnx" for ending in endings]
        if there := [path for path in paths if path.is_file()]:
            found[kind] = there[0]
    return found


def open_graph(path: Path) -> "InferenceSession":
    """A graph in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def data_file(graph: Path) -> Path:
    """Where the weights of a graph lie."""
    return graph.with_name(f"{graph.name}_data")


def move_weights(graph: "GraphProto", file: Path) -> None:
    """Make a graph read its outer weights from another file of its folder."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = file.name


def write_graph(tower: nn.Module, inputs: dict[str, Tensor], shapes: dict | None, output: str, path: Path) -> None:
    """Export a tower with some example `inputs`, weights beside it; dimensions without a name in `shapes` are fixed."""
    with _quiet(), torch.no_grad():
        # In evaluation mode: the exporter restores what it finds, and would leave dropout on.
        program = torch.onnx.export(
            tower.eval(), (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=list(inputs), output_names=[output],
        )  # fmt: skip
        program.save(path, external_data=True)
    _strip(path)


def _strip(path: Path) -> None:
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
    move_weights(graph, path.with_name(f"{path.name}.data").replace(data_file(path)))
    onnx.save(model, path)


def _quantised(onnx: Path, kind: str) -> dict[str, dict[str, int]]:
    """Make a tower's int8 graph, unless it would save little; name of each graph that there is -> its bytes."""
    source, target = onnx / f"{kind}_model.onnx", onnx / f"{kind}_model{ENDINGS['int8']}.onnx"
    with _quiet():
        _round_weights(source, target)
    share = _weight_bytes(target) / _weight_bytes(source)
    if share > WORTH_IT:
        target.unlink()
        data_file(target).unlink()
        logger.info(
            "ONNX: no int8 graph of the %s tower. Convolutions stay float32, and the rest would save %.0f %% of it.",
            kind, 100 * (1 - share),
        )  # fmt: skip
    files = [path for path in (source, target) if path.is_file()]
    return {path.name: {"bytes": sum(part.stat().st_size for part in onnx.glob(f"{path.name}*"))} for path in files}


def _round_weights(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    unsigned = {"per_channel": True, "weight_type": QuantType.QUInt8}
    quantize_dynamic(source, target, op_types_to_quantize=["Gather"], **unsigned)
    # Level 4 is arithmetic in 8 bits.
    quantiser = MatMulNBitsQuantizer(
        onnx.load(target), bits=8, block_size=BLOCK, accuracy_level=4, op_types_to_quantize=("MatMul",)
    )
    quantiser.process()
    onnx.save(quantiser.model.model, target, save_as_external_data=True, location=data_file(target).name)


def _weight_bytes(path: Path) -> int:
    import onnx

    tensors, dtype = onnx.load(path, load_external_data=False).graph.initializer, onnx.helper.tensor_dtype_to_np_dtype
    return sum(int(np.prod(tensor.dims)) * dtype(tensor.data_type).itemsize for tensor in tensors)


@torch.inference_mode()
def _compare(model: CapivaraModel, processor: CapivaraProcessor, onnx: Path, found: dict[str, dict]) -> None:
    """Add to every graph its distance to the model on random images and texts."""
    # All of them, and an image or a short text alone: other sizes than the exporter has seen.
    images, texts = ((items, items[:1]) for items in (random_images(), random_texts()))
    batches = {"vision": [processor(images=some, return_tensors="pt") for some in images]}
    batches["text"] = [processor(text=some, return_tensors="pt") for some in texts]
    for name, about in found.items():
        kind, session = name.split("_")[0], open_graph(onnx / name)
        ours = torch.cat([model(**batch)[OUTPUTS[kind]] for batch in batches[kind]])
        rows = [session.run(None, {key: value.numpy() for key, value in batch.items()})[0] for batch in batches[kind]]
        theirs = torch.from_numpy(np.concatenate(rows))
        if name.endswith(f"{ENDINGS['int8']}.onnx"):
            about["lowest_cosine"] = (ours * theirs).sum(dim=-1).min().item()
            continue
        about["largest_difference"] = difference = (ours - theirs).abs().max().item()
        if not difference <= TOLERANCE:  # also when it is not a number
            raise ValueError(
                f"The graph {name} differs from the model by {difference:.3g}, above {TOLERANCE:g}; nothing was kept. "
                "Leave onnx out of --formats."
            )


@contextmanager
def _quiet() -> Iterator[None]:
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
