"""One repository that every loader opens: transformers, open_clip, sentence-transformers, onnxruntime, transformers.js.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output repository
    python -m hub_upload.export --model MODEL --output repository --formats transformers,open_clip,sentence_transformers
    python -m hub_upload.export --model MODEL --output repository --formats transformers,onnx,transformers_js
    python -m hub_upload.export --model MODEL --output repository --recall_dataset data/openmoji/dataset
    python -m hub_upload.export --model MODEL --output text_side --formats drop_in --base data/openmoji/base
    python -m hub_upload.export --model MODEL --output repository --formats immich   # or another place's own folder

A format that can read another's weights gets no copy of its own. Weights are not loaded but mapped, and what open_clip
will read is compared with the model tensor by tensor. Nothing is written but what ALLOWED_FILES names, and no file may
hold a path of a machine or an access token.
"""

import difflib
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError

import modeling_capivara
from capivara_common.cli import parse, run_command
from capivara_common.environment import require
from capivara_common.files import (
    check_free_space,
    check_inputs_stay,
    check_output_folder,
    read_json,
    whole_folder,
    write_json,
    write_text,
)
from capivara_common.privacy import hide_paths
from hub_upload import allowed_files as allowed
from hub_upload import loader_files, onnx_files, source_model, transformers_js
from hub_upload.export_arguments import FOLDER_FORMATS, FORMATS, MORE_FORMATS, ExportArguments
from hub_upload.loader_files import OPEN_CLIP_WEIGHTS, TEXT_MODEL, OpenClipPlan
from hub_upload.remote import check_repo_id
from hub_upload.source_model import WEIGHTS, check_tensors, mapped_tensors
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor
from modeling_capivara.convert_open_clip import write_open_clip_weights
from modeling_capivara.loading import load_processor

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", *allowed.TOKENIZER_FILES)
ONNX_SHARE, JS_SHARE = 1.3, 2.3  # of the weights: graphs in float32 and int8; in float16, and all together once more
GIT_ATTRIBUTES = "".join(
    f"{name} filter=lfs diff=lfs merge=lfs -text\n"
    for name in ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data*", "tokenizer.json", "*.model", "*.png")
)
logger = logging.getLogger("capivara")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = parse(ExportArguments, __doc__, argv)
        formats = args.format_names()
        if set(formats) & set(FOLDER_FORMATS):
            files = export_alone(args, formats)
        else:
            files = export(
                args.model, args.output, formats, args.text_config, args.overwrite_output_dir,
                repo_id=args.repo_id, measure_int8=_int8_measurement(args),
            )  # fmt: skip
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
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
    measure_int8: Callable[[Path], list[str]] | None = None,
) -> list[tuple[str, int]]:
    """Write a repository's folder, whole or not at all.

    Args:
        model: folder of a CAPIVARA model.
        output: the folder to be made.
        formats: of `FORMATS`, transformers among them.
        text_config: Hub id or folder of the text tower's configuration, for open_clip; see `text_config_source`.
        overwrite: replace what is at `output`.
        repo_id: where it will be published; open_clip then takes the tokenizer from there.
        measure_int8: of `onnx_recall.int8_measurement`.

    Returns:
        Path relative to the folder and size in bytes of every file, in order.

    Raises:
        ValueError: an argument is wrong, the model is damaged or a format can't express it, or a file holds a path of a
            machine or an access token.
        ImportError: a package that a format needs is missing.
        OSError: the disk is full.
    """
    formats = _checked_formats(formats)
    if repo_id is not None:
        check_repo_id(repo_id)
    _check_output(output, overwrite, model, text_config)
    config, image_processor = source_model.read_config(model), _read_image_processor(model)
    if "transformers_js" in formats:
        transformers_js.readable_tokenizer(model)  # or an error before the graphs, which take minutes
    plan = None
    if "open_clip" in formats:
        plan = loader_files.plan_open_clip(config, image_processor, text_config, repo_id)
        _log_open_clip_plan(plan, repo_id, config)
    weights = sum(file.stat().st_size for file in source_model.weight_files(model))
    shares = (plan is not None, ONNX_SHARE * ("onnx" in formats), JS_SHARE * ("transformers_js" in formats))
    check_free_space(output, int(weights * (1 + sum(shares))))
    with whole_folder(output, overwrite) as folder:
        _write_weights(model, folder, config, with_open_clip=plan is not None)
        _write_processor(model, folder, config, plan)
        if "transformers_js" in formats:
            transformers_js.write_tokenizer(folder)
        if "sentence_transformers" in formats:
            loader_files.write_sentence_transformers(folder)
        if "onnx" in formats:
            onnx_files.write_onnx(folder)
            unmeasured = ["ONNX: the recall of int8 was not measured; --recall_dataset names a data set for it."]
            for line in measure_int8(folder) if measure_int8 else unmeasured:
                logger.info("%s", line)
        if "transformers_js" in formats:
            transformers_js.write_transformers_js(folder)
        _write_records(model, folder)
        return _finished(folder)


def export_alone(args: ExportArguments, formats: Sequence[str]) -> list[tuple[str, int]]:
    """Write a folder that is no repository of the whole model, whole or not at all; returns what `export` does."""
    if len(formats) > 1:
        raise ValueError(
            f"{' and '.join(set(formats) & set(FOLDER_FORMATS))} is a folder of its own; name no other format beside "
            f"it, got {','.join(formats)}."
        )
    write = import_module(f"hub_upload.{formats[0]}").write  # (arguments, folder)
    _check_output(args.output, args.overwrite_output_dir, args.model, args.base)
    with whole_folder(args.output, args.overwrite_output_dir) as folder:
        write(args, folder)
        return _finished(folder)


def _check_output(output: Path, overwrite: bool, *inputs: str | Path | None) -> None:
    check_output_folder(output, overwrite)
    check_inputs_stay(output, *inputs)


def _checked_formats(formats: Sequence[str]) -> list[str]:
    formats, known = [name.strip() for name in formats if name.strip()], (*FORMATS, *MORE_FORMATS, *FOLDER_FORMATS)
    for name in formats:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is no format {name!r}; did you mean {near}? There are {', '.join(known)}.")
    if "transformers" not in formats:
        raise ValueError(f"formats must hold transformers, whose files the others read, got {','.join(formats)!r}.")
    if "transformers_js" in formats and "onnx" not in formats:
        formats.append("onnx")  # whose graphs and weights it reads
    if "onnx" in formats:
        require("onnx in --formats (leave it out to do without)", "onnx", *onnx_files.ONNX_PACKAGES)
    return formats


def _int8_measurement(args: ExportArguments) -> Callable[[Path], list[str]] | None:
    """What measures the int8 graphs; its data are opened before the graphs, which take minutes, for their errors."""
    if args.recall_dataset is None:
        return None
    check_inputs_stay(args.output, args.recall_dataset)
    if not {"onnx", "transformers_js"} & set(args.format_names()):
        raise ValueError("recall_dataset is for the int8 graphs of onnx; add onnx to --formats, or leave it out.")
    from hub_upload.onnx_recall import int8_measurement  # datasets and accelerate: only where something is measured

    return int8_measurement(args.recall_dataset, args.recall_split, args.recall_language, args.recall_caption_column)


def _read_image_processor(model: Path) -> CapivaraImageProcessor:
    path = model / "processor_config.json"
    if not path.is_file():
        raise ValueError(
            f"The folder {model} has no processor ({path.name} is missing); save one there with "
            "`CapivaraProcessor(image_processor, tokenizer).save_pretrained(folder)`."
        )
    try:
        has_code = "auto_map" in read_json(path)
        processor = CapivaraImageProcessor.from_pretrained(model)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"The processor of {model} can't be loaded: {' '.join(str(error).split())}") from error
    if not has_code:
        raise ValueError(f"{path} names no code (auto_map), so nobody could load it; save the processor again.")
    return processor


def _log_open_clip_plan(plan: OpenClipPlan | None, repo_id: str | None, config: CapivaraConfig) -> None:
    if plan is None and config.trimmed_vocabulary:
        logger.info(
            "open_clip is left out: it takes the text tower's size from XLM-RoBERTa base, with %s word pieces, and "
            "this model was trimmed to %s. Name the model's own folder by --text_config for a repository that "
            "open_clip loads from inside its folder alone.",
            f"{config.trimmed_vocabulary['of']:,}", f"{config.text_config.vocab_size:,}",
        )  # fmt: skip
    elif plan is None:
        logger.info(
            "open_clip is left out: the text tower is not XLM-RoBERTa base, so that open_clip can't take its "
            "configuration from there. Name a Hub id that has it by --text_config; or the model's own folder, for a "
            "repository that open_clip loads from inside its folder alone."
        )
    elif plan.source == TEXT_MODEL:
        logger.info(
            "open_clip: the text tower has no Hub id; its configuration lies in %s/. Users download the repository, "
            "start in its folder, and load local-dir:. (hf-hub: can't find it).", TEXT_MODEL,
        )  # fmt: skip
    else:
        hint = "" if repo_id else "; --repo_id makes it the repository's own"
        logger.info(
            "open_clip, hf-hub: configuration of the text tower from %s, tokenizer from %s%s.",
            plan.source, plan.tokenizer, hint,
        )  # fmt: skip


def _write_weights(model: Path, folder: Path, config: CapivaraConfig, with_open_clip: bool) -> None:
    """Configuration, code and weights, for transformers and open_clip, each compared with the model by tensor.

    Memory holds one copy of the weights at a time: pages of the file that is read or compared.
    """
    mapped = source_model.mapped_model(model, config)
    expected = source_model.tensor_digests(mapped.state_dict())
    mapped.save_pretrained(folder)
    if with_open_clip:
        write_open_clip_weights(mapped, folder)
    del mapped
    check_tensors(folder / WEIGHTS, mapped_tensors([folder / WEIGHTS]), expected)
    if with_open_clip:
        check_tensors(folder / OPEN_CLIP_WEIGHTS, loader_files.written_tensors(folder), expected)
        logger.info("transformers and open_clip: %d tensors compared, all equal.", len(expected))


def _write_processor(model: Path, folder: Path, config: CapivaraConfig, plan: OpenClipPlan | None) -> None:
    """All code, open_clip's configuration, and the processor's files, paths of this machine in them made relative."""
    for name in PROCESSOR_FILES:
        if not (model / name).is_file():
            continue
        shutil.copyfile(model / name, folder / name)
        if name.endswith("_config.json"):
            settings = hide_paths(read_json(model / name))
            for name_of_loading in ("is_local", "local_files_only"):
                settings.pop(name_of_loading, None)
            write_json(folder / name, settings)
    package = Path(modeling_capivara.__file__).parent
    for name in allowed.MODEL_CODE:
        shutil.copyfile(package / name, folder / name)
    try:
        tokenizer = load_processor(folder).tokenizer  # after the weights: with them, it would be the peak of memory
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), str(model))) from error
    if read_json(folder / "tokenizer_config.json").get("tokenizer_class") != type(tokenizer).__name__:
        tokenizer.save_pretrained(folder)  # of an older folder: now it repairs texts also without the processor
    if plan:
        loader_files.write_open_clip_config(folder, config, plan, tokenizer)


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
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    if surplus := set(names) - set(allowed.allowed_files(folder)):
        raise ValueError(f"{', '.join(map(str, sorted(surplus)))} would be written, which ALLOWED_FILES does not name.")
    return [(name.as_posix(), (folder / name).stat().st_size) for name in names]


if __name__ == "__main__":
    run_command(main)
