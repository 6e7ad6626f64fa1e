"""Seconds of a new process from its start to the first text embedding, at full model size.

    python -m benchmarks.first_text --output benchmarks/results/first_text.json

Every run is a process of its own that imports lancedb in a thread beside, as a search does. `quick` is what
`capivara_search` does, `package` the import of `modeling_capivara` and `CapivaraModel`, which was the way before. The
model has the published size and random weights; the files are in the memory of the system, as after an earlier search.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, alternating, conditions, finish, save_random_model
from capivara_search.common.cli import flag, parse

BESIDE = "import threading; beside = threading.Thread(target=lambda: __import__('lancedb')); beside.start()\n"
PROGRAMS = {
    "quick": """
from capivara_search.models import find_model
embeds = find_model({folder!r}).texts(["um cachorro correndo na praia"])
""",
    "package": """
import torch
from modeling_capivara.loading import load_model, load_processor
processor, model = load_processor({folder!r}), load_model({folder!r}).eval()
with torch.inference_mode():
    embeds = model(**processor(text=["um cachorro correndo na praia"], return_tensors="pt")).text_embeds.numpy()
""",
}


@dataclass
class FirstTextArguments:
    """Arguments of `benchmarks.first_text`."""

    model: Path | None = flag(None, "Folder of a CAPIVARA model; one of the published size is made where None.")
    runs: int = flag(5, "Processes of each kind, alternating.")
    output: Path | None = flag(None, "JSON file for the figures.")


def main(argv: list[str] | None = None) -> None:
    """Measure both ways and print the results."""
    args = parse(FirstTextArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "model"
        if not args.model:
            save_random_model(folder)
        programs = {name: lambda _, code=code: seconds(code, folder) for name, code in PROGRAMS.items()}
        found = alternating(programs, args.runs, "First text", warmup=1)
    embeds = {name: runs[0].pop("embeds") for name, runs in found.items()}
    difference = max(abs(a - b) for a, b in zip(embeds["quick"], embeds["package"], strict=True))
    measured = {
        name: {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in ("text_s", "whole_s", "cpu_s")}
        | {"slowest_whole_s": max(run["whole_s"] for run in runs)}
        for name, runs in found.items()
    }
    results = {**conditions("cpu"), "runs": args.runs, "largest_difference": difference, "measured": measured}
    finish(results, args.output)


def seconds(code: str, folder: Path) -> dict[str, Any]:
    """Of one new process: to the embedding, to the end with lancedb imported, and of computing, user and system."""
    code = BESIDE + code.replace("{folder!r}", repr(str(folder)))
    code += "import json, resource, time; text = time.time(); beside.join(); whole = time.time()\n"
    code += "used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print(json.dumps([text, whole, used.ru_utime + used.ru_stime, embeds[0].tolist()]))\n"
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, whole, cpu, embeds = json.loads(done.stdout.splitlines()[-1])
    return {"text_s": text - started, "whole_s": whole - started, "cpu_s": cpu, "embeds": embeds}


if __name__ == "__main__":
    main()
