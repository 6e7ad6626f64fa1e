"""One repository that every loader opens: transformers, open_clip, sentence-transformers, onnxruntime, transformers.js.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output repository
    python -m hub_upload.export --model MODEL --output repository --formats transformers,open_clip,sentence_transformers
    python -m hub_upload.export --model MODEL --output repository --formats transformers,onnx,transformers_js
    python -m hub_upload.export --model MODEL --output text_side --formats drop_in --base data/openmoji/base
    python -m hub_upload.export --model MODEL --output immich --formats immich      # with --base its text side alone

A format that can read another's weights gets no copy of its own. Weights are not loaded but mapped. Nothing is written
but what ALLOWED_FILES names.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedConfig, ProcessorMixin

import modeling_capivara
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, check_inputs_outside, read_json, seed_folders, write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG
from capivara_common.privacy import hide_paths, short_name
from hub_upload import allowed_files as allowed
from hub_upload.formats import drop_in, immich, onnx, open_clip, save_tokenizer, transformers_js, write_tokenizer_json
from modeling_capivara import CapivaraConfig, CapivaraProcessor
from modeling_capivara.loading import load_processor, load_two_towers_config

DEFAULT_FORMATS = ("transformers", "open_clip", "sentence_transformers", "onnx")  # in one repository
KNOWN_FORMATS = (*DEFAULT_FORMATS, "transformers_js", "drop_in", "immich")  # the last two each a folder of its own
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", *allowed.TOKENIZER_FILES)
logger = logging.getLogger("capivara")


@dataclass
class ExportArguments:
    """Arguments of `hub_upload.export`."""

    model: Path = flag(..., "Folder of a model of two towers, as a training run or `save_pretrained` leaves it.")
    output: Path = flag(..., "Folder of the repository. Must be missing or empty.")
    formats: str = flag(
        ",".join(DEFAULT_FORMATS),
        f"What shall be able to load it, with commas between, of {', '.join(DEFAULT_FORMATS)}; of them transformers is "
        "always written, named or not. onnx needs the extra of its name and, for the full size, minutes. On demand, "
        "transformers_js: the same graphs, and more, for a browser and Node. Or one alone: drop_in, the text side for "
        "pictures that --base has embedded; immich, a folder for the machine-learning service of Immich.",
    )
    base: str | None = flag(
        None,
        "For drop_in and immich, which then has the text side alone: the model that the pictures were embedded with, "
        "which this one was trained from. A folder, of CAPIVARA also open_clip's, or a Hub id. Its image side must be "
        "the model's to the bit.",
    )
    text_config: str | None = flag(
        None,
        "Hub id where open_clip finds the text tower's configuration, where that is not XLM-RoBERTa base; without it, "
        "open_clip is left out, then.",
    )
    repo_id: str | None = flag(
        None, "Hub id, OWNER/NAME, of the repository to be: hf-hub: of open_clip takes its tokenizer from there."
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")
    gone: ClassVar = {
        "textual_only": "with --base, immich is the text side alone",
        **dict.fromkeys(
            ("recall_dataset", "recall_split", "recall_language", "recall_caption_column"),
            "onnx/quantisation.json says how far each graph is from the model",
        ),
    }

    def __post_init__(self) -> None:
        if self.repo_id is not None:
            allowed.check_repo_id(self.repo_id)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(ExportArguments, __doc__, argv)
    files = export_model(
        args.model, args.output, args.formats.split(","), args.text_config, args.overwrite_output_dir,
        repo_id=args.repo_id, base=args.base,
    )  # fmt: skip
    for name, size in files:
        print(f"{size / 1e6:12,.2f} MB  {name}")
    print(f"{sum(size for _, size in files) / 1e6:12,.2f} MB  in {args.output}")


def export_model(
    model: Path,
    output: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    text_config: str | None = None,
    overwrite: bool = False,
    *,
    repo_id: str | None = None,
    base: str | None = None,
) -> list[tuple[str, int]]:
    """Write the folder `output` for one place or several, whole or not at all; path and bytes of every file, in order.

    `model` is a folder of a model of two towers, `formats` are of `KNOWN_FORMATS`, the rest as of `ExportArguments`.
    ValueError: an argument is wrong, the model is damaged or a format can't express it, or a file holds a path of a
    machine or an access token. ImportError: a package that a format needs is missing.
    """
    formats = _check_formats(formats, text_config, base)
    check_inputs_outside(output, model, base)
    with atomic_folder(output, overwrite) as folder:
        config = read_model_config(model, formats)
        if formats == ["drop_in"]:
            drop_in.write_drop_in(model, folder, config, str(base), repo_id)
        elif formats == ["immich"]:
            immich.write_immich(model, folder, config, base)
        else:
            _write_repository(model, folder, config, formats, text_config, repo_id)
        allowed.check_model_files(folder)
        return [(name.as_posix(), (folder / name).stat().st_size) for name in allowed.list_allowed_files(folder)]


def _check_formats(formats: Sequence[str], text_config: str | None, base: str | None) -> list[str]:
    """The formats without blanks, or ValueError, or ImportError where ONNX lacks a package."""
    formats = [name.strip() for name in formats if name.strip()]
    if not formats:
        raise ValueError(f"--formats is empty; name some of {', '.join(KNOWN_FORMATS)}, or leave the flag out.")
    if unknown := [name for name in formats if name not in KNOWN_FORMATS]:
        raise ValueError(f"There is no format {unknown[0]!r}; there are {', '.join(KNOWN_FORMATS)}.")
    alone = [name for name in formats if name in ("drop_in", "immich")]
    if alone and (len(formats) > 1 or text_config):
        raise ValueError(f"{alone[0]} is a folder of its own: name no other format beside it, and no --text_config.")
    if bool(base) != bool(alone) and alone != ["immich"]:
        raise ValueError(
            "--base, the model that the pictures were embedded with, is for --formats drop_in, which needs it, and for "
            f"immich; got --base {base} with --formats {','.join(formats)}."
        )
    if "transformers_js" in formats and "onnx" not in formats:
        formats.append("onnx")  # whose graphs and weights it reads
    if alone or "onnx" in formats:
        what = f"{alone[0]} in --formats" if alone else "onnx in --formats (leave it out to do without)"
        require_packages(what, "onnx", *onnx.ONNX_PACKAGES)
    return formats


def read_model_config(folder: Path, formats: Sequence[str] = ()) -> PreTrainedConfig:
    """The configuration of a model folder, of any model of two towers; of CAPIVARA or SigLIP for drop_in and immich.

    Raises ValueError where it is none; a run's several seeds are named.
    """
    if not folder.is_dir():
        raise ValueError(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        seeds = ", ".join(path.name for path in seed_folders(folder))
        hint = f" It is a run of several seeds; name one of {seeds} in it." if seeds else ""
        raise ValueError(f"The folder {folder} holds no model (config.json is missing).{hint}")
    config = load_two_towers_config(folder)
    if {"drop_in", "immich"} & {*formats} and config.model_type not in immich.IMMICH_MODEL_NAMES:
        raise ValueError(
            f"{formats[0]} is written of CAPIVARA and SigLIP alone, and {folder} is {config.model_type}. The whole "
            "model (--formats transformers,onnx) opens in place of its base, and finds the base's vectors."
        )
    return config


def _write_repository(
    model: Path,
    folder: Path,
    config: PreTrainedConfig,
    formats: list[str],
    text_config: str | None,
    repo_id: str | None,
) -> None:
    """The whole model; what a format can't express is said before weights are read."""
    processor, is_own = load_processor(model), isinstance(config, CapivaraConfig)
    if text_config and not is_own:
        raise ValueError(f"text_config is for CAPIVARA's own class; open_clip needs none for {config.model_type}.")
    if "transformers_js" in formats:
        transformers_js.convert_tokenizer(model)
    settings = None
    if "open_clip" in formats and is_own:
        settings = open_clip.build_open_clip_config(config, processor.image_processor, text_config, repo_id)
    open_clip.write_weights(model, folder, config, with_open_clip=settings is not None)
    _write_processor(model, folder, processor)
    if settings:
        write_json(folder / OPEN_CLIP_CONFIG, settings)
    if "open_clip" in formats and not is_own:
        try:
            open_clip.check_siglip_supported(config)
        except (ValueError, ImportError) as error:
            logger.info("open_clip is left out: %s", error)
        else:
            open_clip.write_open_clip_siglip(model, folder, repo_id or short_name(str(model)))
    if "sentence_transformers" in formats:
        open_clip.write_sentence_transformers(folder, processor)
        if not is_own:
            open_clip.check_sentence_transformers(model, folder)
    if "transformers_js" in formats:
        transformers_js.write_converted_tokenizer(folder)
        onnx.write_onnx(folder, graphs=tuple(onnx.GRAPH_SIGNATURES), precisions=("float32", "int8", "float16"))
        transformers_js.write_configs(folder)
    elif "onnx" in formats:
        onnx.write_onnx(folder)
    _copy_card_files(model, folder)


def _write_processor(model: Path, folder: Path, processor: ProcessorMixin) -> None:
    """Write the files of the processor, with relative paths, and the code that a CAPIVARA model needs.

    The tokenizer gives the embeddings of training in any program that calls it, as far as that needs no code.
    """
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
        # `load_processor` has corrected text length, inputs and letter case.
        save_tokenizer(processor.tokenizer, folder)
        return
    write_tokenizer_json(folder, read_json(folder / "tokenizer.json"), is_capivara=True)
    package = Path(modeling_capivara.__file__).parent
    for name in allowed.MODEL_CODE:
        shutil.copyfile(package / name, folder / name)


def _copy_card_files(model: Path, folder: Path) -> None:
    """Files that the card is made of, where the model's folder has them; paths of this machine are made relative."""
    results = model / "results"
    if not results.is_dir() and model.name.startswith("seed-"):
        results = model.parent / "results"  # of all seeds of a run
    records = {f"results/{path.name}": path for path in sorted(results.glob("*.json"))}
    if (model / "run.json").is_file():
        records["run.json"] = model / "run.json"
    for name, path in records.items():
        allowed.check_regular_file(path)
        write_json(folder / name, hide_paths(read_json(path)))
    for name in ("README.md", "LICENSE", "rotation.safetensors", *allowed.RUN_PLOT_FILES):
        path = model / name
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    run_command(main)
