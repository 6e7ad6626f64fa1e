"""One repository that every loader opens: transformers, open_clip, sentence-transformers, onnxruntime, transformers.js.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output repository
    python -m hub_upload.export --model MODEL --output repository --formats transformers,open_clip,sentence_transformers
    python -m hub_upload.export --model MODEL --output repository --formats transformers,onnx,transformers_js
    python -m hub_upload.export --model MODEL --output text_side --formats drop_in --base data/openmoji/base
    python -m hub_upload.export --model MODEL --output immich --formats immich      # with --base its text side alone

A format that can read another's weights gets no copy of its own. Weights are not loaded but mapped, and what open_clip
will read is compared with the model tensor by tensor. Nothing is written but what ALLOWED_FILES names, and no file may
hold a path of a machine or an access token.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedConfig, ProcessorMixin

import modeling_capivara
from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.files import check_inputs_stay, read_json, whole_folder, write_json, write_text
from capivara_common.privacy import hide_paths, short_name
from hub_upload import allowed_files as allowed
from hub_upload.formats import (
    check_tensors,
    drop_in,
    immich,
    onnx,
    open_clip,
    read_config,
    siglip,
    tensor_digests,
    transformers_js,
)
from hub_upload.formats.open_clip import OPEN_CLIP_WEIGHTS
from modeling_capivara import CapivaraConfig, CapivaraProcessor
from modeling_capivara.convert_open_clip import capivara_state_dict, write_open_clip_weights
from modeling_capivara.loading import WEIGHTS, load_processor, mapped_model, mapped_tensors

FORMATS = ("transformers", "open_clip", "sentence_transformers", "onnx")  # in one repository
KNOWN = (*FORMATS, "transformers_js", "drop_in", "immich")  # the last two each a folder of its own
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", *allowed.TOKENIZER_FILES)
GIT_ATTRIBUTES = "".join(
    f"{name} filter=lfs diff=lfs merge=lfs -text\n"
    for name in ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data*", "tokenizer.json", "*.model", "*.png")
)
logger = logging.getLogger("capivara")


@dataclass
class ExportArguments:
    """Arguments of `hub_upload.export`."""

    model: Path = flag(..., "Folder of a model of two towers, as a training run or `save_pretrained` leaves it.")
    output: Path = flag(..., "Folder of the repository. Must be missing or empty.")
    formats: str = flag(
        ",".join(FORMATS),
        f"What shall be able to load it, with commas between, of {', '.join(FORMATS)}. transformers is "
        "always among them: the others read its files. onnx needs the extra of its name and, for the full size, "
        "minutes. On demand, transformers_js: the same graphs, and more, for a browser and Node. Or one alone: "
        "drop_in, the text side for pictures that --base has embedded; immich, a folder for the machine-learning "
        "service of Immich.",
    )
    base: str | None = flag(
        None,
        "For drop_in and immich, which then has the text side alone: the model that the pictures were embedded with, "
        "which this one was trained from. A folder, of CAPIVARA also open_clip's, or a Hub id. Its image side must be "
        "the model's to the bit.",
    )
    text_config: str | None = flag(
        None,
        "Where open_clip finds the text tower's configuration. The published architecture needs none: it "
        "is that of XLM-RoBERTa base, on the Hub. For any other: a Hub id; or a folder that holds it, such as the "
        "model's own, to be copied to text_model/ in the repository, where open_clip finds it only when started "
        "in the downloaded folder, as local-dir:. Without it open_clip is left out.",
    )
    repo_id: str | None = flag(
        None,
        "Hub id, OWNER/NAME, under which the repository will be published. hf-hub: of open_clip then takes "
        "its tokenizer from there; without it, that of the text tower's Hub id.",
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")
    gone: ClassVar = {"textual_only": "with --base, immich is the text side alone"}

    def __post_init__(self) -> None:
        if self.repo_id is not None:
            allowed.check_repo_id(self.repo_id)


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(ExportArguments, __doc__, argv)
    files = export(
        args.model, args.output, args.formats.split(","), args.text_config, args.overwrite_output_dir,
        repo_id=args.repo_id, base=args.base,
    )  # fmt: skip
    for name, size in files:
        print(f"{size / 1e6:12,.2f} MB  {name}")
    print(f"{sum(size for _, size in files) / 1e6:12,.2f} MB  in {args.output}")


def export(
    model: Path,
    output: Path,
    formats: Sequence[str] = FORMATS,
    text_config: str | None = None,
    overwrite: bool = False,
    *,
    repo_id: str | None = None,
    base: str | None = None,
) -> list[tuple[str, int]]:
    """Write a folder for one place or several, whole or not at all.

    Args:
        model: folder of a model of two towers, CAPIVARA's or another class of transformers.
        output: the folder to be made.
        formats: of `KNOWN`, transformers among them or one alone.
        text_config: Hub id or folder of the text tower's configuration, for open_clip; see `text_config_source`.
        overwrite: replace what is at `output`.
        repo_id: where it will be published; open_clip then takes the tokenizer from there.
        base: folder or Hub id of the model whose pictures' embeddings a text side is for.

    Returns:
        Path relative to the folder and size in bytes of every file, in order.

    Raises:
        ValueError: an argument is wrong, the model is damaged or a format can't express it, or a file holds a path of a
            machine or an access token.
        ImportError: a package that a format needs is missing.
        OSError: the disk is full.
    """
    formats = _checked_formats(formats, text_config, base)
    check_inputs_stay(output, model, text_config, base)
    with whole_folder(output, overwrite) as folder:
        if formats == ["drop_in"]:
            drop_in.write(model, folder, str(base), repo_id)
        elif formats == ["immich"]:
            immich.write(model, folder, base)
        else:
            _write_repository(model, folder, formats, text_config, repo_id)
        return _finished(folder)


def _checked_formats(formats: Sequence[str], text_config: str | None, base: str | None) -> list[str]:
    """The formats without blanks, or ValueError, or ImportError where onnx lacks a package."""
    formats = [name.strip() for name in formats if name.strip()]
    if unknown := [name for name in formats if name not in KNOWN]:
        raise ValueError(f"There is no format {unknown[0]!r}; there are {', '.join(KNOWN)}.")
    alone = [name for name in formats if name in ("drop_in", "immich")]
    if alone and (len(formats) > 1 or text_config):
        raise ValueError(f"{alone[0]} is a folder of its own: name no other format beside it, and no --text_config.")
    if (base is not None and not alone) or (base is None and alone == ["drop_in"]):
        raise ValueError(
            "--base, the model that the pictures were embedded with, is for --formats drop_in, which needs it, and for "
            f"immich; got --base {base} with --formats {','.join(formats)}."
        )
    if not alone and "transformers" not in formats:
        raise ValueError(f"formats must hold transformers, whose files the others read, got {','.join(formats)!r}.")
    if "transformers_js" in formats and "onnx" not in formats:
        formats.append("onnx")  # whose graphs and weights it reads
    if "onnx" in formats:
        require("onnx in --formats (leave it out to do without)", "onnx", *onnx.ONNX_PACKAGES)
    return formats


def _write_repository(
    model: Path, folder: Path, formats: list[str], text_config: str | None, repo_id: str | None
) -> None:
    """The whole model; what a format can't express is said before weights are read."""
    config, processor = read_config(model), load_processor(model)
    is_own = isinstance(config, CapivaraConfig)
    if text_config and not is_own:
        raise ValueError(f"text_config is for CAPIVARA's own class; open_clip needs none for {config.model_type}.")
    if "transformers_js" in formats:
        transformers_js.readable_tokenizer(model)
    settings = None
    if "open_clip" in formats and is_own:
        settings = open_clip.open_clip_settings(config, processor.image_processor, text_config, repo_id)
    has_siglip = "open_clip" in formats and not is_own and _has_open_clip(config)
    _write_weights(model, folder, config, with_open_clip=settings is not None)
    _write_processor(model, folder, processor)
    if settings:
        open_clip.write_open_clip_config(folder, config, settings, processor.tokenizer)
    if has_siglip:
        siglip.write_open_clip(model, folder, repo_id or short_name(str(model)))
    if "sentence_transformers" in formats:
        open_clip.write_sentence_transformers(folder, processor)
    if "transformers_js" in formats:
        transformers_js.write_tokenizer(folder)
        onnx.write_onnx(folder, graphs=tuple(onnx.GRAPHS), precisions=("float32", "int8", "float16"))
        transformers_js.write_settings(folder)
    elif "onnx" in formats:
        onnx.write_onnx(folder)
    _write_records(model, folder)


def _has_open_clip(config: PreTrainedConfig) -> bool:
    """Whether open_clip has such a model of transformers' classes; says why it is left out."""
    try:
        siglip.check_open_clip(config)
    except (ValueError, ImportError) as error:
        logger.info("open_clip is left out: %s", error)
        return False
    return True


def _write_weights(model: Path, folder: Path, config: PreTrainedConfig, with_open_clip: bool) -> None:
    """Configuration, code and weights, for transformers and open_clip, each compared with the model by tensor.

    Memory holds one copy of the weights at a time: pages of the file that is read or compared.
    """
    mapped = mapped_model(model, config)
    expected = tensor_digests(mapped.state_dict())
    mapped.save_pretrained(folder)
    if with_open_clip:
        write_open_clip_weights(mapped, folder)
    del mapped
    check_tensors(folder / WEIGHTS, mapped_tensors([folder / WEIGHTS]), expected)
    if with_open_clip:
        written = capivara_state_dict(mapped_tensors([folder / OPEN_CLIP_WEIGHTS]))  # under transformers' names again
        check_tensors(folder / OPEN_CLIP_WEIGHTS, written, expected)
        logger.info("transformers and open_clip: %d tensors compared, all equal.", len(expected))


def _write_processor(model: Path, folder: Path, processor: ProcessorMixin) -> None:
    """All code of ours, and the processor's files, paths of this machine in them made relative."""
    for name in PROCESSOR_FILES:
        if not (model / name).is_file():
            continue
        shutil.copyfile(model / name, folder / name)
        if name.endswith("_config.json"):
            settings = hide_paths(read_json(model / name))
            for name_of_loading in ("is_local", "local_files_only"):
                settings.pop(name_of_loading, None)
            write_json(folder / name, settings)
    if not isinstance(processor, CapivaraProcessor):  # transformers has its code
        return
    package = Path(modeling_capivara.__file__).parent
    for name in allowed.MODEL_CODE:
        shutil.copyfile(package / name, folder / name)
    tokenizer = processor.tokenizer
    if read_json(folder / "tokenizer_config.json").get("tokenizer_class") != type(tokenizer).__name__:
        tokenizer.save_pretrained(folder)  # of an older folder: now it repairs texts also without the processor


def _write_records(model: Path, folder: Path) -> None:
    """Files that the card is made of, where the model's folder has them; paths of this machine are made relative."""
    results = model / "results"
    if not results.is_dir() and model.name.startswith("seed-"):
        results = model.parent / "results"  # of all seeds of a run
    records = {f"results/{path.name}": path for path in sorted(results.glob("*.json"))}
    if (model / "run.json").is_file():
        records["run.json"] = model / "run.json"
    for name, path in records.items():
        allowed.check_regular(path)
        write_json(folder / name, hide_paths(read_json(path)))
    card = (model / "README.md").read_text(encoding="utf-8") if (model / "README.md").is_file() else ""
    pictures = [path for path in model.glob("*.png") if path.name in allowed.RUN_PICTURES or path.name in card]
    for path in (model / "README.md", model / "LICENSE", model / "rotation.safetensors", *pictures):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    write_text(folder / ".gitattributes", GIT_ATTRIBUTES)


def _finished(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of all files, after a check that all may be uploaded."""
    allowed.check_contents(folder)
    return [(name.as_posix(), (folder / name).stat().st_size) for name in allowed.allowed_files(folder)]


if __name__ == "__main__":
    run_command(main)
