"""Memory of an export and of a push at full size, and cold loads of the result beside open_clip's.

    python -m benchmarks.export --output benchmarks/results/export.json

The published architecture with random weights is exported for transformers, open_clip and sentence-transformers, and
pushed to a stand-in for the Hub on this machine, each in a process of its own: its peak of memory is taken after the
imports and at the end. Then both programs load the exported weights in fresh processes, in alternating runs, the weight
files dropped from the page cache before each and the imports done before the clock starts. transformers maps its file
and reads a tensor at its first use, so the time with every tensor read once is given beside that of the call. The last
line of the output is JSON.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from benchmarks.train_step import ROOT, in_own_process
from common.environment import device_description, package_versions, peak_resident_bytes
from common.files import write_json
from hub_upload.export import export
from hub_upload.loader_files import OPEN_CLIP_WEIGHTS
from hub_upload.source_model import WEIGHTS
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor

EXPORTED = ("transformers", "open_clip", "sentence_transformers")  # ONNX loads the model, and is not measured here
PROGRAMS = {"ours": WEIGHTS, "open_clip": OPEN_CLIP_WEIGHTS}


@dataclass
class ExportBenchmarkArguments:
    runs: int = field(default=5, metadata={"help": "Loads by each program, alternating."})
    layers: int = field(default=12, metadata={"help": "Layers of both towers; 12 is the published architecture."})
    vocabulary: int = field(default=250002, metadata={"help": "Rows of the word embedding; 250002 as published."})
    push: bool = field(default=True, metadata={"help": "Also measure a push; needs twice the disk."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the figures."})
    worker: Literal["make", "export", "ours", "open_clip"] | None = field(
        default=None, metadata={"help": "Measure in this process."}
    )
    folder: Path | None = field(default=None, metadata={"help": "Folder for the models; a temporary one if none."})

    def __post_init__(self) -> None:
        if min(self.runs, self.layers) < 1 or self.vocabulary < 10:
            raise ValueError("runs and layers must be at least 1, vocabulary at least 10.")


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(ExportBenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    if args.worker:
        work = {"make": make, "export": measure_export, "ours": load_ours, "open_clip": load_open_clip}[args.worker]
        print(json.dumps(work(args)))
        return
    own = tempfile.mkdtemp(prefix="capivara-export-") if args.folder is None else None
    args.folder = Path(own or args.folder).resolve()
    try:
        results = measure(args)
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


def measure(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """All figures, from the making of the model on."""
    made = in_own_process(command("make", args))
    exported = in_own_process(command("export", args))
    results = {
        "device": device_description(),
        "versions": package_versions(),
        **{name: getattr(args, name) for name in ("runs", "layers", "vocabulary")},
        **made,
        "export": with_ratio(exported, made["weights_bytes"]),
    }
    if args.push:
        results["push"] = with_ratio(measure_push(args.folder), made["weights_bytes"])
    return {**results, "load": compare_loads(args)}


def command(worker: str, args: ExportBenchmarkArguments) -> list[str]:
    """Module and flags of one measurement."""
    sizes = ["--layers", str(args.layers), "--vocabulary", str(args.vocabulary)]
    return ["benchmarks.export", "--worker", worker, "--folder", str(args.folder), *sizes]


def with_ratio(measured: dict[str, Any], weights_bytes: int) -> dict[str, Any]:
    """The peak of memory over that after the imports, also in multiples of the weights."""
    over = measured["peak_bytes"] - measured["after_imports_bytes"]
    return {**measured, "peak_over_imports_bytes": over, "ratio_to_weights": over / weights_bytes}


def make(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """Save the model with random weights, and a tokenizer of as many made pieces as the text tower has rows."""
    torch.manual_seed(0)
    config = CapivaraConfig(
        vision_config={"num_hidden_layers": args.layers},
        text_config={"num_hidden_layers": args.layers, "vocab_size": args.vocabulary},
    )
    model = CapivaraModel(config)
    model.save_pretrained(args.folder / "model")
    processor = CapivaraProcessor(CapivaraImageProcessor(), made_tokenizer(args.vocabulary))
    processor.save_pretrained(args.folder / "model")
    weights = (args.folder / "model" / WEIGHTS).stat().st_size
    return {"parameters": sum(p.numel() for p in model.parameters()), "weights_bytes": weights}


def made_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [(piece, 0.0) for piece in special.values()]
    pieces += [(f"▁peça{number}", -10.0) for number in range(vocabulary - len(pieces))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def measure_export(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """Memory and seconds of an export, and the size of what it wrote."""
    before, started = peak_resident_bytes(), time.perf_counter()
    # The text tower's configuration beside it: open_clip must find it without the network.
    source = args.folder / "model"
    files = export(source, args.folder / "repository", EXPORTED, text_config=str(source), overwrite=True)
    seconds = time.perf_counter() - started
    return {
        "after_imports_bytes": before,
        "peak_bytes": peak_resident_bytes(),
        "seconds": seconds,
        "written_bytes": sum(size for _, size in files),
        "files": len(files),
    }


def measure_push(folder: Path) -> dict[str, Any]:
    """Memory of a process that pushes the repository twice, the second time finding it there."""
    sys.path.insert(0, str(ROOT / "tests"))  # the stand-in for the Hub
    from hub_client import peak_of_a_push
    from hub_server import HubServer

    with HubServer(folder / "hub") as hub:
        started = time.perf_counter()
        before, peak = peak_of_a_push(hub, folder / "repository", folder / "home")
        seconds = time.perf_counter() - started
        uploaded = hub.uploaded
    shutil.rmtree(folder / "hub")
    return {"after_imports_bytes": before, "peak_bytes": peak, "seconds": seconds, "uploaded_bytes": uploaded}


def load_ours(args: ExportBenchmarkArguments) -> dict[str, float]:
    from transformers import AutoModel

    _import_towers()
    return timed(lambda: AutoModel.from_pretrained("."), args.folder / "repository")


def load_open_clip(args: ExportBenchmarkArguments) -> dict[str, float]:
    import open_clip

    _import_towers()
    return timed(lambda: open_clip.create_model("local-dir:."), args.folder / "repository")


def _import_towers() -> None:
    """What transformers would otherwise import within the call, of either program."""
    from transformers import CLIPVisionModel, XLMRobertaModel  # noqa: F401


@torch.no_grad()
def timed(load: Callable[[], torch.nn.Module], folder: Path) -> dict[str, float]:
    """Seconds of a load from inside `folder`, and of the load and one read of every tensor."""
    os.chdir(folder)
    started = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    for tensor in model.state_dict().values():
        tensor.sum()
    return {"load_s": loaded - started, "load_and_read_s": time.perf_counter() - started}


def compare_loads(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """Alternating cold loads; `ratio` is ours to open_clip's, the median over the runs."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in tqdm(range(args.runs), desc="Loads", unit="run"):
        for name, weights in PROGRAMS.items():
            drop_from_page_cache(args.folder / "repository" / weights)
            runs[name].append(in_own_process(command(name, args)))
    found: dict[str, Any] = {"page_cache": "the weight file is dropped from it before each load"}
    for measure_name in ("load_s", "load_and_read_s"):
        seconds = {name: [run[measure_name] for run in of] for name, of in runs.items()}
        summary = {
            name: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s)} for name, s in seconds.items()
        }
        ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["open_clip"], strict=True)]
        found[measure_name.removesuffix("_s")] = {**summary, "ratio": statistics.median(ratios)}
    return found


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of a file come from the disk, where the file system heeds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that are not written yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


if __name__ == "__main__":
    main()
