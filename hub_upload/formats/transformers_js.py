"""transformers.js's part of a repository, beside the graphs of `formats/onnx.py`: what it loads by name alone.

    onnx/model.onnx               input_ids, attention_mask, pixel_values -> logits_per_image (images, texts),
                                  logits_per_text, text_embeds, image_embeds
    onnx/*_fp16.onnx, *_quantized.onnx   the same in float16 and int8; float32 goes in and comes out
    config.json                   transformers.js_config: whose weights lie beside the graph
    preprocessor_config.json      the image processor, under a name that it knows
    tokenizer.json                the same tokens by steps that it knows, curly quotation marks read as plain ones
    tokenizer_config.json         the longest text, and that white space is collapsed

`model.onnx` is made of both towers' graphs: `model.onnx_data` and `model.onnx_data_1` are the towers' own files, again,
under the names that transformers.js asks for. They are copies, since onnx reads no weights through a link, and one
object on the Hub, which keeps files by their content.
Source: its `models/session.js` and `utils/model-loader.js`, 4.3.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from capivara_common.files import read_json, write_json, write_text
from hub_upload.formats import with_plain_quotes
from hub_upload.formats.onnx import ENDINGS, OUTPUTS, data_file, graphs, move_weights, open_graph, write_towers
from modeling_capivara import CapivaraImageProcessor
from modeling_capivara.embedder import random_images, random_texts
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.text_repair_capivara import CONTEXT_LENGTH

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-3  # of scores between model and float32 graph; they are cosines times the temperature, up to 100
OPTION = "transformers.js_config"  # its part of config.json
PIXELS = (
    *("do_resize", "size", "do_center_crop", "crop_size", "do_convert_rgb", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)  # settings of the image processor that it knows
# The steps of a normaliser that it has, and what stands for the one of the tokenizers library that it lacks: control
# characters out, other white space as blanks (`do_nmt` of tokenizers' normalizers/unicode.rs).
KNOWN_STEPS = (
    *("BertNormalizer", "Precompiled", "Sequence", "Replace", "NFC", "NFD", "NFKC", "NFKD"),
    *("Strip", "StripAccents", "Lowercase", "Prepend"),
)
NMT = {
    r"[\u0001-\u0008\u000B\u000E-\u001F\u007F\u008F\u009F]": "",
    r"[\u0009\u000A\u000C\u000D\u1680\u200B-\u200F\u2028\u2029\u2581\uFEFF\uFFFD]": " ",
}
# Its own bicubic resize leaves out pixels of larger pictures; LANCZOS is the filter that does not, and is the nearest
# to ours. In a browser it is the canvas that resizes, whatever is named.
LANCZOS = 1


def write_transformers_js(folder: Path) -> None:
    """Add what transformers.js reads to a repository that has the graphs of `onnx.write_onnx`.

    Raises ValueError where the scores of the float32 graph differ from the model's by more than `TOLERANCE`.
    """
    onnx, processor = folder / "onnx", load_processor(folder)
    model = load_model(folder).eval()
    inputs = processor(images=random_images(), text=random_texts(), return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
        expected = {name: output[name].numpy() for name in (*OUTPUTS.values(), "logits_per_image")}
    scale = float(model.logit_scale.detach().double().exp())
    write_towers(model.half(), processor, onnx, "float16")
    del model
    join_graphs(folder, scale)
    found = {}
    for ending in ENDINGS.values():
        path = onnx / f"model{ending}.onnx"
        found |= {part.name: {"bytes": _size(part)} for part in onnx.glob(f"*_model{ending}.onnx")}
        found[path.name] = {"bytes": _size(path)} | _distance(path, inputs, expected)
    facts = read_json(onnx / "quantisation.json")
    for name, about in found.items():
        facts["graphs"][name] = about | facts["graphs"].get(name, {})
    write_json(onnx / "quantisation.json", facts)
    _write_settings(folder, processor.image_processor)


def join_graphs(folder: Path, scale: float) -> None:
    """Make `model.onnx` of every precision of the towers in a repository; `scale` is that of its scores."""
    _name_all_quantised(folder)
    for ending in ENDINGS.values():
        _join(folder / "onnx", ending, scale)


def _name_all_quantised(folder: Path) -> None:
    """Give a tower that has no int8 graph its float32 graph under that name, too, since it is asked for by name."""
    import onnx

    for kind, path in graphs(folder, "int8").items():
        named = path.with_name(f"{kind}_model{ENDINGS['int8']}.onnx")
        if not named.is_file():
            model = onnx.load(path, load_external_data=False)
            move_weights(model.graph, data_file(named))
            onnx.save(model, named)
            shutil.copyfile(data_file(path), data_file(named))


def _join(folder: Path, ending: str, scale: float) -> None:
    """Make `model.onnx` of a precision out of its towers, whose weights it reads under names of its own."""
    import onnx
    from onnx.compose import add_prefix

    path, towers = folder / f"model{ending}.onnx", {}
    for kind in OUTPUTS:
        tower = folder / f"{kind}_model{ending}.onnx"
        model = onnx.load(tower, load_external_data=False)
        weights = data_file(path) if kind == "vision" else path.with_name(f"{data_file(path).name}_1")
        move_weights(model.graph, weights)
        shutil.copyfile(data_file(tower), weights)
        towers[kind] = add_prefix(model, f"{kind}/", rename_inputs=False, rename_outputs=False)
    onnx.save(_with_scores(*towers.values(), scale), path)


def _with_scores(vision: "ModelProto", text: "ModelProto", scale: float) -> "ModelProto":
    """One graph of both, and behind them the scores, as `similarity_logits` has them."""
    from onnx import TensorProto, helper, numpy_helper

    parts = (text.graph, vision.graph)  # inputs in the order of `CapivaraModel.forward`
    steps = [
        helper.make_node("Transpose", ["text_embeds"], ["texts_across"], perm=[1, 0]),
        helper.make_node("MatMul", ["image_embeds", "texts_across"], ["cosines"]),
        helper.make_node("Mul", ["cosines", "logit_scale"], ["logits_per_image"]),
        helper.make_node("Transpose", ["logits_per_image"], ["logits_per_text"], perm=[1, 0]),
    ]
    scores = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("logits_per_image", ["images", "texts"]), ("logits_per_text", ["texts", "images"]))
    ]
    graph = helper.make_graph(
        [*(node for part in parts for node in part.node), *steps],
        "capivara",
        [value for part in parts for value in part.input],
        [*scores, *(value for part in parts for value in part.output)],
        [
            *(tensor for part in parts for tensor in part.initializer),
            numpy_helper.from_array(np.float32(scale), "logit_scale"),
        ],
    )
    opsets: dict[str, int] = {}
    for entry in (*text.opset_import, *vision.opset_import):
        opsets[entry.domain] = max(entry.version, opsets.get(entry.domain, 0))
    return helper.make_model(
        graph,
        functions=[*text.functions, *vision.functions],
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=max(text.ir_version, vision.ir_version),
        producer_name="capivara",
    )


def _size(graph: Path) -> int:
    """Bytes of a graph and its weights."""
    return sum(part.stat().st_size for part in graph.parent.glob(f"{graph.name}*"))


def _distance(path: Path, inputs: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """How far a graph is from the model: the lowest cosine of its embeddings, the largest difference of its scores."""
    session = open_graph(path)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {name: value.numpy() for name, value in inputs.items()}), strict=True))
    difference = float(np.abs(found["logits_per_image"] - expected["logits_per_image"]).max())
    if path.stem == "model" and not difference <= TOLERANCE:  # also when it is not a number
        raise ValueError(
            f"The scores of the graph {path.name} differ from the model's by {difference:.3g}, above {TOLERANCE:g}; "
            "nothing was kept. Leave transformers_js out of --formats."
        )
    cosines = [float((found[name] * expected[name]).sum(axis=-1).min()) for name in OUTPUTS.values()]
    return {"lowest_cosine": min(cosines), "largest_score_difference": difference}


def _write_settings(folder: Path, image_processor: CapivaraImageProcessor) -> None:
    """Configuration and image processor; of the former, Python reads the rest, and of the latter nothing."""
    onnx = folder / "onnx"
    weights = {path.name: len([*onnx.glob(f"{path.name}_data*")]) for path in sorted(onnx.glob("*.onnx"))}
    settings: dict[str, Any] = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {OPTION: {"use_external_data_format": weights}})
    ours = image_processor.to_dict()
    pixels = {name: ours[name] for name in PIXELS} | {"image_processor_type": "CLIPImageProcessor", "resample": LANCZOS}
    write_json(folder / "preprocessor_config.json", pixels)


def readable_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` in steps that transformers.js has; ValueError where there is none for one of them."""
    tokenizer = read_json(folder / "tokenizer.json")
    return tokenizer | {"normalizer": _known_steps(tokenizer["normalizer"])}


def write_tokenizer(folder: Path) -> None:
    """Make the tokenizer of a folder readable to transformers.js, its ids of repaired texts as they were."""
    tokenizer = with_plain_quotes(readable_tokenizer(folder))
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    settings = read_json(folder / "tokenizer_config.json")
    longest = min(settings.get("model_max_length", CONTEXT_LENGTH), CONTEXT_LENGTH)
    write_json(folder / "tokenizer_config.json", settings | {"model_max_length": longest, "remove_space": True})


def _known_steps(normaliser: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same normaliser without `Nmt`."""
    if normaliser is None:
        return None
    if normaliser["type"] == "Sequence":
        return normaliser | {"normalizers": [_known_steps(step) for step in normaliser["normalizers"]]}
    if normaliser["type"] == "Nmt":
        steps = [{"type": "Replace", "pattern": {"Regex": kind}, "content": by} for kind, by in NMT.items()]
        return {"type": "Sequence", "normalizers": steps}
    if normaliser["type"] not in KNOWN_STEPS:
        raise ValueError(
            f"transformers.js has no normaliser {normaliser['type']}, which tokenizer.json names, so that no browser "
            "reads the model. Leave transformers_js out of --formats, or --static."
        )
    return normaliser
