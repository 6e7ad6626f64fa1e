"""Export a model as a folder for the Hub that transformers, open_clip, onnxruntime and other libraries can load.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output repository
    python -m hub_upload.export --model MODEL --output repository --formats transformers,open_clip,sentence_transformers
    python -m hub_upload.export --model MODEL --output repository --formats transformers,onnx,transformers_js
    python -m hub_upload.export --model MODEL --output text_side --formats drop_in --base data/openmoji/base
    python -m hub_upload.export --model MODEL --output immich --formats immich

`drop_in` writes only the text encoder, for users who have already embedded images with the base model. `immich` writes
a folder for the photo server Immich. With `--base`, this folder has only the text encoder.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, ProcessorMixin

import modeling_capivara
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, check_inputs_outside, list_seed_run_folders, read_json, write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG
from capivara_common.model_kinds import KINDS
from capivara_common.privacy import shorten_absolute_paths
from hub_upload import formats as shared_formats
from hub_upload import upload_checks
from hub_upload.formats import drop_in, immich, onnx, open_clip, sentence_transformers, transformers_js
from modeling_capivara import CapivaraProcessor, loading
from modeling_capivara.convert_open_clip import to_capivara_state_dict, to_open_clip_state_dict

DEFAULT_FORMATS = ("transformers", "open_clip", "sentence_transformers", "onnx")
# The formats drop_in (only the text encoder) and immich (for the Immich photo server) can't be combined with others in
# one folder.
KNOWN_FORMATS = (*DEFAULT_FORMATS, "transformers_js", "drop_in", "immich")
logger = logging.getLogger("capivara")


@dataclass
class ExportArguments:
    """Command-line arguments of `hub_upload.export`, which writes a model in the formats of other libraries."""

    model: Path = flag(..., "Folder of a two-tower (CLIP-like) model, written by a training run or `save_pretrained`.")
    output: Path = flag(..., "Folder to write. It must be empty or not exist yet.")
    formats: str = flag(
        ",".join(DEFAULT_FORMATS),
        f"Formats to write, separated by commas: {', '.join(DEFAULT_FORMATS)}, transformers_js. transformers is always "
        "written. onnx needs the extra `onnx` and takes minutes for a full-size model. transformers_js, for browsers "
        "and Node.js, includes onnx. Two formats can't be combined with others: drop_in writes only the text encoder, "
        "to search images that were embedded with --base; immich writes a folder for the photo server Immich.",
    )
    base: str | None = flag(
        None,
        "Folder or Hub id of the base model with which the images were embedded. Its image encoder must be "
        "bit-identical to the model's. Required for drop_in, optional for immich: with --base, immich writes only the "
        "text encoder. A base CAPIVARA model may be in open_clip's format.",
    )
    text_config: str | None = flag(
        None,
        "Hub id from which open_clip loads the configuration of the text tower. Default: XLM-RoBERTa base. If the "
        "model has another text tower, the format open_clip requires this flag and is skipped without it.",
    )
    repo_id: str | None = flag(
        None,
        "Hub id, OWNER/NAME, under which the folder will be published. It is written to the configuration for "
        "open_clip, which loads the tokenizer from this repository.",
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")

    def __post_init__(self) -> None:
        if self.repo_id is not None:
            upload_checks.check_repo_id(self.repo_id)


def main(argv: list[str] | None = None) -> None:
    """Run the command: export a model to a folder, and print the size of each written file."""
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
    """Export a model to a folder that can be published, in the formats of several libraries.

    If the export fails, nothing is written.

    Args:
        model: Folder of a two-tower (CLIP-like) model.
        output: Folder to write. It must be empty or not exist yet, unless `overwrite` is True.
        formats: "transformers" (always written), "open_clip", "sentence_transformers", "onnx", "transformers_js", or
            alone "drop_in" (only the text encoder) or "immich" (photo server).
        text_config: Hub id from which open_clip loads the text tower's configuration. None: XLM-RoBERTa base; for other
            text towers, "open_clip" is skipped.
        overwrite: Whether to replace an existing folder.
        repo_id: Hub id under which the folder will be published, if known. open_clip loads the tokenizer from it.
        base: Folder or Hub id of the base model, with a bit-identical image encoder. Required for "drop_in". Optional
            for "immich", to write only the text encoder.

    Returns:
        A tuple (relative path, size in bytes) for each file, sorted by path.

    Raises:
        ValueError: If an argument is invalid, the model is damaged, a format can't represent it, or a written file
            contains an access token or absolute path.
        ImportError: If a package that a format needs is missing.
    """
    formats = _clean_and_check_formats(formats, text_config, base)
    check_inputs_outside(output, model, base)
    with atomic_folder(output, overwrite) as folder:
        config = _read_and_check_model_config(model, formats)
        if formats == ["drop_in"]:
            drop_in.write_drop_in_text_encoder(model, folder, config, str(base), repo_id)
        elif formats == ["immich"]:
            immich.write_immich(model, folder, config, base)
        else:
            _write_formats_with_both_towers(model, folder, config, formats, text_config, repo_id)
        upload_checks.check_model_files(folder)
        names = upload_checks.list_uploadable_model_files(folder)
        return [(name.as_posix(), (folder / name).stat().st_size) for name in names]


def _clean_and_check_formats(formats: Sequence[str], text_config: str | None, base: str | None) -> list[str]:
    """Check the formats and the arguments that depend on them.

    Args:
        formats: Names of formats as the user gave them, possibly with spaces around them.
        text_config: Value of --text_config, or None.
        base: Value of --base, or None.

    Returns:
        The names of the formats, without spaces and empty names. If "transformers_js" is among them, "onnx" is too.

    Raises:
        ValueError: If a format is unknown, or the formats and the other arguments can't be combined.
        ImportError: If a format needs ONNX and a package for it is missing.
    """
    formats = [name.strip() for name in formats if name.strip()]
    if not formats:
        raise ValueError(f"--formats is empty. Choose from {', '.join(KNOWN_FORMATS)}, or leave out the flag.")
    if unknown := [name for name in formats if name not in KNOWN_FORMATS]:
        raise ValueError(f"Unknown format {unknown[0]!r}. Choose from {', '.join(KNOWN_FORMATS)}.")
    standalone = [name for name in formats if name in ("drop_in", "immich")]
    if standalone and (len(formats) > 1 or text_config):
        raise ValueError(
            f"The format {standalone[0]} needs a folder of its own: name no other format, and leave out --text_config."
        )
    if bool(base) != bool(standalone) and standalone != ["immich"]:
        raise ValueError(
            "--base is required for --formats drop_in, optional for immich, and not allowed for other formats; got "
            f"--base {base} with --formats {','.join(formats)}."
        )
    if "transformers_js" in formats and "onnx" not in formats:
        formats.append("onnx")  # transformers.js runs the ONNX graphs of the model
    if standalone or "onnx" in formats:
        purpose = f"{standalone[0]} in --formats" if standalone else "onnx in --formats (which you can leave out)"
        require_packages(purpose, "onnx", *onnx.ONNX_PACKAGES)
    return formats


def _read_and_check_model_config(folder: Path, formats: Sequence[str] = ()) -> PreTrainedConfig:
    """Read the configuration of a model folder, and check that the export formats support the model.

    Args:
        folder: Folder of a two-tower model.
        formats: Names of the formats to write. "drop_in" and "immich" support only CAPIVARA and SigLIP models.

    Returns:
        The configuration.

    Raises:
        ValueError: If the folder holds no two-tower model, or a format does not support the model. If the folder is a
            training run with several seeds, the message names the subfolders that hold a model.
    """
    if not folder.is_dir():
        raise ValueError(f"The model folder {folder} does not exist. Check --model.")
    if not (folder / "config.json").is_file():
        seeds = ", ".join(path.name for path in list_seed_run_folders(folder))
        hint = f" It is a run with several seeds; choose one of its folders {seeds}." if seeds else ""
        raise ValueError(f"The folder {folder} contains no model (config.json is missing).{hint}")
    config = loading.load_two_towers_config(folder)
    if {"drop_in", "immich"} & {*formats} and KINDS[config.model_type].immich_name is None:
        raise ValueError(
            f"The format {formats[0]} supports CAPIVARA and SigLIP only, but {folder} is a {config.model_type} model. "
            "Export the whole model with --formats transformers,onnx instead. It can replace its base, and its text "
            "embeddings match image embeddings of the base."
        )
    return config


def _write_formats_with_both_towers(
    model: Path,
    folder: Path,
    config: PreTrainedConfig,
    formats: list[str],
    text_config: str | None,
    repo_id: str | None,
) -> None:
    """Write both towers of the model in all requested formats except drop_in and immich.

    The formats are checked before the weights are read, so that an error is raised before the slow steps.

    Args:
        model: Folder of the model.
        folder: Folder to write to.
        config: Configuration of the model.
        formats: Names of formats, checked by `_clean_and_check_formats`.
        text_config: Hub id from which open_clip loads the configuration of the text tower. None: XLM-RoBERTa base.
        repo_id: Hub id under which the folder will be published. None: unknown.
    """
    processor, kind = loading.load_processor(model), KINDS[config.model_type]
    has_text_config = kind.open_clip_layout == "hf_text"
    if text_config and not has_text_config:
        raise ValueError(
            f"--text_config applies to CAPIVARA models only, but {model} is a {config.model_type} model. Leave it out."
        )
    if "transformers_js" in formats:
        transformers_js.read_and_convert_tokenizer(model)
    settings = None
    if "open_clip" in formats and has_text_config:
        settings = open_clip.build_open_clip_config(config, processor.image_processor, text_config, repo_id)
    _write_and_verify_model_weights(model, folder, config, with_open_clip=settings is not None)
    _write_processor_with_code_if_needed(model, folder, processor)
    if settings:
        write_json(folder / OPEN_CLIP_CONFIG, settings)
    if "open_clip" in formats and not has_text_config:
        try:
            open_clip.check_siglip_supported(config)
        except (ValueError, ImportError) as error:
            logger.info("The format open_clip is skipped: %s", error)
        else:
            open_clip.write_open_clip_siglip(model, folder, repo_id)
    if "sentence_transformers" in formats:
        # Only settings are written, because Sentence Transformers reads the weight file of transformers.
        sentence_transformers.write_sentence_transformers_config(folder, processor)
        if not kind.is_native:
            sentence_transformers.check_sentence_transformers_embeddings(model, folder)
    if "transformers_js" in formats:
        transformers_js.convert_tokenizer_files_in_place(folder)
        onnx.write_onnx(folder, graphs=tuple(onnx.GRAPH_SIGNATURES), precisions=("float32", "int8", "float16"))
        transformers_js.write_model_and_preprocessor_configs(folder)
    elif "onnx" in formats:
        onnx.write_onnx(folder)
    _copy_existing_card_and_run_files(model, folder)


def _write_and_verify_model_weights(model: Path, folder: Path, config: PreTrainedConfig, with_open_clip: bool) -> None:
    """Write configuration and weights for transformers, and optionally weights for open_clip.

    Each written tensor is compared with the same tensor of the model. The weights are memory-mapped, so that memory
    never holds more than one copy of them.

    Args:
        model: Folder of the model.
        folder: Folder to write to.
        config: Configuration of the model.
        with_open_clip: Whether to also write a file with the weights under open_clip's tensor names.

    Raises:
        ValueError: If a written tensor differs from the tensor of the model.
    """
    weight_file, open_clip_file = folder / loading.WEIGHTS_FILE, folder / open_clip.OPEN_CLIP_WEIGHTS_FILE
    mapped = loading.load_memory_mapped_model(model, config)
    expected = shared_formats.compute_tensor_digests(mapped.state_dict())
    mapped.save_pretrained(folder)
    if with_open_clip:
        shared_formats.save_state_dict(to_open_clip_state_dict(mapped), open_clip_file)
    del mapped
    shared_formats.check_tensors(weight_file, loading.load_memory_mapped_model(folder, config).state_dict(), expected)
    if with_open_clip:
        written = to_capivara_state_dict(loading.load_memory_mapped_tensors([open_clip_file]))
        shared_formats.check_tensors(open_clip_file, written, expected)
        logger.info("transformers and open_clip: %d tensors were written and equal the model's.", len(written))


def _write_processor_with_code_if_needed(model: Path, folder: Path, processor: ProcessorMixin) -> None:
    """Write the files of the processor and, for a CAPIVARA model, the Python code of the model and its processor.

    Absolute paths of this machine are removed from the files.

    A CAPIVARA processor cleans texts with Python code. Programs that don't run this code read only tokenizer.json. With
    this file, they get the same tokens, except for texts with wrongly decoded characters, which only the code repairs.

    Args:
        model: Folder of the model.
        folder: Folder to write to.
        processor: Processor of the model, from `load_processor`.
    """
    for path in (model / name for name in upload_checks.PROCESSOR_FILES):
        if path.is_file() and path.name.endswith("_config.json"):
            write_json(folder / path.name, shared_formats.read_publishable_settings(path))
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)
    # Only CapivaraProcessor needs Python code in the model folder. Processors of transformers need only their settings
    # and vocabulary files.
    if not isinstance(processor, CapivaraProcessor):
        # The tokenizer files of the model may have wrong settings: maximum text length, names of the model inputs,
        # handling of capital letters. `load_processor` has corrected them, so the files are written again.
        shared_formats.save_tokenizer_for_publication(processor.tokenizer, folder)
        return
    shared_formats.write_tokenizer_json_with_normalizer(folder, read_json(folder / "tokenizer.json"), is_capivara=True)
    for name in upload_checks.MODEL_CODE:
        shutil.copyfile(Path(modeling_capivara.__file__).with_name(name), folder / name)


def _copy_existing_card_and_run_files(model: Path, folder: Path) -> None:
    """Copy the other files of a model: card, license, run.json, evaluation results, plots and rotation.safetensors.

    Missing files are skipped. Absolute paths in JSON files are shortened by `shorten_absolute_paths`, because they must
    not be published.

    Args:
        model: Folder of the model. If it is a folder `seed-*`, the results of all seeds are copied.
        folder: Folder to write to.
    """
    results = model / "results"
    if not results.is_dir() and model.name.startswith("seed-"):
        # In a training run with several seeds, the folder of a seed has no results. The parent folder has the results
        # of all seeds.
        results = model.parent / "results"
    records = {f"results/{path.name}": path for path in sorted(results.glob("*.json"))}
    if (model / "run.json").is_file():
        records["run.json"] = model / "run.json"
    for name, path in records.items():
        upload_checks.check_regular_file(path)
        write_json(folder / name, shorten_absolute_paths(read_json(path)))
    for name in ("README.md", "LICENSE", "rotation.safetensors", *upload_checks.RUN_PLOT_FILES):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
