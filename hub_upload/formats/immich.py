"""Export a model for the machine-learning service of the photo server Immich (tested with Immich 1.134 and 2.5).

These files are written:

    config.json                                   embedding width, and maximum number of tokens in a text
    textual/model.onnx                            token ids (1, tokens), int32 -> embedding (1, width), unit length
    textual/tokenizer.json, tokenizer_config.json tokenizer and its pad_token; texts are padded to the full length
    visual/model.onnx                             image (1, 3, side, side), float32 -> embedding (1, width)
    visual/preprocess_cfg.json                    size, interpolation, mean, std, resize_mode

Copy the folder to clip/NAME in Immich's model cache, where NAME is a model in Immich's fixed list. With a base model
(`--base`), only the text encoder is exported, without `visual/`, and its files replace the base model's files there.
docs/how-to/immich.md describes the steps.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.files import write_json
from capivara_common.model_kinds import KINDS
from hub_upload.formats import max_text_tokens, resolve_compatible_base_folder, write_tokenizer_json_with_normalizer
from hub_upload.formats.onnx import check_difference, export_graph, open_session, weights_file
from modeling_capivara import two_towers
from modeling_capivara.convert_open_clip import to_preprocess_cfg
from modeling_capivara.loading import load_model, load_processor

XLM_R_TOKENS, SIGLIP_2_TOKENS = 250_002, 256_000  # vocabulary sizes of the published models
# Maps an architecture to the name of the model with this architecture in Immich's list (immich_ml/models/constants.py).
# The key is a tuple: number of tokens in the published vocabulary, width of the image tower, patch size and image size
# in pixels.
IMMICH_NAMES_BY_SIZE = {
    (XLM_R_TOKENS, 768, 32, 224): "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k",
    (XLM_R_TOKENS, 1280, 14, 224): "XLM-Roberta-Large-ViT-H-14__frozen_laion5b_s13b_b90k",
    (SIGLIP_2_TOKENS, 768, 32, 256): "ViT-B-32-SigLIP2-256__webli",
    (SIGLIP_2_TOKENS, 768, 16, 224): "ViT-B-16-SigLIP2__webli",
    (SIGLIP_2_TOKENS, 1024, 16, 256): "ViT-L-16-SigLIP2-256__webli",
    (SIGLIP_2_TOKENS, 1024, 16, 384): "ViT-L-16-SigLIP2-384__webli",
    (SIGLIP_2_TOKENS, 1024, 16, 512): "ViT-L-16-SigLIP2-512__webli",
    (SIGLIP_2_TOKENS, 1152, 14, 224): "ViT-SO400M-14-SigLIP2__webli",
    # Google's checkpoint states an image size of 384 pixels, but Immich's name has 378: only 27 whole patches of 14
    # pixels fit into 384 pixels, and 27 x 14 = 378.
    (SIGLIP_2_TOKENS, 1152, 14, 384): "ViT-SO400M-14-SigLIP2-378__webli",
    (SIGLIP_2_TOKENS, 1152, 16, 256): "ViT-SO400M-16-SigLIP2-256__webli",
    (SIGLIP_2_TOKENS, 1152, 16, 384): "ViT-SO400M-16-SigLIP2-384__webli",
    (SIGLIP_2_TOKENS, 1152, 16, 512): "ViT-SO400M-16-SigLIP2-512__webli",
    (SIGLIP_2_TOKENS, 1536, 16, 256): "ViT-gopt-16-SigLIP2-256__webli",
    (SIGLIP_2_TOKENS, 1536, 16, 384): "ViT-gopt-16-SigLIP2-384__webli",
}
logger = logging.getLogger("capivara")


class ImmichTower(nn.Module):
    """Module to export to ONNX: the text or image encoder of a model, with the inputs that Immich passes to it.

    Immich passes padded token ids without an attention mask, or preprocessed pixels of images.

    Args:
        model: Model with both towers.
        pad_id: Id of the padding token, from which the attention mask is computed. None: the model uses no mask.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int | None):
        super().__init__()
        self.model, self.pad_id = model, pad_id

    def forward(self, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Embed texts or images.

        Args:
            text: (texts, tokens), int32, padded token ids. None if `image` is given.
            image: (images, 3, height, width), preprocessed pixels. None if `text` is given.

        Returns:
            (texts or images, width), unit length.
        """
        if image is not None:
            return two_towers.compute_image_embeds(self.model, image)
        ids = text.long()
        mask = None if self.pad_id is None else (ids != self.pad_id).long()
        return two_towers.compute_text_embeds(self.model, ids, mask)


def write_immich(source: Path, folder: Path, config: PreTrainedConfig, base: str | None = None) -> None:
    """Write a CAPIVARA or SigLIP model in the folder layout that the photo server Immich reads.

    The module docstring lists the files.

    Args:
        source: Folder of the model.
        folder: Folder to write to.
        config: Configuration of the model.
        base: Folder or Hub id of the base model. If given, only the text encoder is written.

    Raises:
        ValueError: If the two models have different image encoders, the model is damaged, an encoder exceeds 2 GB,
            Immich can't represent the model, or an ONNX graph gives other embeddings than the model.
    """
    if base is not None:
        resolve_compatible_base_folder(source, base)
    processor, is_capivara = load_processor(source), KINDS[config.model_type].is_native
    width = two_towers.embedding_width(config)
    # Immich needs only these settings from config.json. The config.json files that Immich publishes for SigLIP also
    # contain `"clean": "canonicalize"`, which makes Immich remove punctuation from texts. This setting is left out,
    # because the model was trained with punctuation.
    write_json(folder / "config.json", {"embed_dim": width, "text_cfg": {"context_length": max_text_tokens(processor)}})
    ids = _write_and_check_tokenizer(processor, folder / "textual", is_capivara)
    model = load_model(source).eval()
    tower = ImmichTower(model, None if two_towers.pads_to_max_length(processor) else processor.tokenizer.pad_token_id)
    _write_and_check_graph(tower, "text", ids, folder / "textual/model.onnx")
    if base is None:
        steps = to_preprocess_cfg(processor.image_processor)
        pictures = [image.convert("RGB") for image in two_towers.random_images()]
        pixels = processor(images=pictures, return_tensors="np")["pixel_values"]
        write_json(folder / "visual/preprocess_cfg.json", {"size": [*pixels.shape[2:]], "mode": "RGB", **steps})
        _write_and_check_graph(tower, "image", [image[None] for image in pixels], folder / "visual/model.onnx")
    name = find_immich_name_by_architecture(config)
    logger.info(
        "Copy the folder to clip/NAME in Immich's model cache. NAME must be a model in Immich's list with an embedding "
        "width of %d; %s.",
        width, f"for this architecture, it is {name}" if name else "none has this architecture",
    )  # fmt: skip


def find_immich_name_by_architecture(config: PreTrainedConfig) -> str | None:
    """Find the model in Immich's list that has the same architecture, and return its name or None.

    Args:
        config: Configuration of a CAPIVARA or SigLIP model. If the vocabulary was trimmed (tokens of other languages
            were removed), the original size counts.
    """
    trimmed = getattr(config, "trimmed_vocabulary", None)
    tokens = trimmed["of"] if trimmed else config.text_config.vocab_size
    sizes = (getattr(config.vision_config, name, None) for name in ("hidden_size", "patch_size", "image_size"))
    return IMMICH_NAMES_BY_SIZE.get((tokens, *sizes))


def _write_and_check_tokenizer(processor: ProcessorMixin, textual: Path, is_capivara: bool) -> list[np.ndarray]:
    """Write the tokenizer for Immich, and check that it gives the same token ids as the tokenizer of the model.

    Args:
        processor: Processor of the model.
        textual: Folder to write to, `textual/` of the export.
        is_capivara: Whether it is CAPIVARA's own tokenizer.

    Returns:
        Token ids of example texts, each (1, tokens), int32.

    Raises:
        ValueError: If the tokenizer can't be written as tokenizer.json, or Immich would tokenize a text differently.
    """
    from tokenizers import Tokenizer

    tokenizer, length = processor.tokenizer, max_text_tokens(processor)
    if not tokenizer.is_fast:
        class_name = type(tokenizer).__name__
        raise ValueError(f"Immich needs a tokenizer.json, but a {class_name} has none. Use a fast tokenizer.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    write_tokenizer_json_with_normalizer(textual, content | {"padding": None, "truncation": None}, is_capivara)
    write_json(textual / "tokenizer_config.json", {"pad_token": tokenizer.pad_token})
    written, texts = Tokenizer.from_file(str(textual / "tokenizer.json")), ["um gato", *two_towers.random_texts()]
    written.enable_padding(length=length, pad_token=tokenizer.pad_token, pad_id=tokenizer.pad_token_id)
    written.enable_truncation(max_length=length)
    ids = [np.array([written.encode(text).ids], np.int32) for text in texts]
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    for text, immich_ids, model_ids in zip(texts, ids, expected, strict=True):
        if immich_ids[0].tolist() != model_ids:
            raise ValueError(
                f"The export was removed, because Immich would tokenize {text[:80]!r} differently from the model. "
                "Leave immich out of --formats."
            )
    return ids


def _write_and_check_graph(tower: ImmichTower, input_name: str, examples: list[np.ndarray], path: Path) -> None:
    """Export the text or image encoder to one ONNX file, including weights, and compare outputs of file and model.

    Args:
        tower: Module to export.
        input_name: "text" to export the text encoder, "image" to export the image encoder.
        examples: Input arrays for the comparison. The first array is also the example input of the export.
        path: File to write.

    Raises:
        ValueError: If a component of an embedding differs by more than `EMBEDDING_TOLERANCE`.
    """
    import onnx

    with torch.inference_mode():
        expected = np.concatenate([tower(**{input_name: torch.from_numpy(example)}).numpy() for example in examples])
    export_graph(tower, {input_name: torch.from_numpy(examples[0])}, [f"{input_name}_embeds"], path)
    # Save the graph again with the weights inside the file, because Immich expects a single file. A file of more than
    # 2 GB, the limit of ONNX, causes a ValueError.
    onnx.save(onnx.load(path), path)
    weights_file(path).unlink()
    session = open_session(path)
    outputs = np.concatenate([session.run(None, {input_name: example})[0] for example in examples])
    check_difference(path, float(np.abs(outputs - expected).max()))
