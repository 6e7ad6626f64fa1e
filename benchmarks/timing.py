"""What every benchmark here shares: alternating runs, medians, processes of their own, and the form of the results."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from capivara_common.environment import device_description, package_versions, peak_resident_bytes
from capivara_common.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
R = TypeVar("R")


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the device's queue drained before and after."""
    import torch  # here, as below: a program without it is measured without its memory

    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


def alternating(programs: dict[Any, Callable[[int], R]], runs: int, title: str, warmup: int = 0) -> dict[Any, list[R]]:
    """Results of all programs, which take turns in every run, so that a slow minute of the machine is everyone's.

    A program gets the number of the run; the results of `warmup` runs before those that count are dropped.
    """
    results: dict[Any, list[R]] = {name: [] for name in programs}
    for run in tqdm(range(warmup + runs), desc=title, unit="run"):
        for name, program in programs.items():
            results[name].append(program(run))
    return {name: found[warmup:] for name, found in results.items()}


def timed_runs(
    steps: dict[str, Callable[[int], Any]], runs: int, device: str, title: str, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of all steps in alternating runs; a step gets the number of the run."""
    timed = {name: lambda run, step=step: seconds_of(lambda: step(run), device) for name, step in steps.items()}
    return alternating(timed, runs, title, warmup)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios run by run, from which what slows both programs in a run cancels out."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Of what was done per second in each run: median, slowest and fastest."""
    return {"median": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def in_own_process(module_and_flags: Sequence[str], root: Path = ROOT) -> Any:
    """The JSON in the last line that a module of this project prints. A process of its own has its own peak of memory.

    `root` is a checkout of this project; another than this one has a .venv of its own. Raises RuntimeError where it
    failed, with the end of its error output.
    """
    python = sys.executable if root == ROOT else str(root.absolute() / ".venv" / "bin" / "python")
    done = subprocess.run([python, "-m", *module_and_flags], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(module_and_flags)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def save_random_model(folder: Path, layers: int = 12) -> dict[str, int]:
    """Save the published architecture (of 12 layers a tower) with random weights and XLM-R's vocabulary, if it is not
    there; parameters and bytes of the weights."""
    import torch

    from capivara_search.miniature_encoders import load_tokenizer
    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
    from modeling_capivara.loading import WEIGHTS

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        towers = {"num_hidden_layers": layers}
        CapivaraModel(CapivaraConfig(vision_config=towers, text_config=towers)).save_pretrained(folder)
        CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer()).save_pretrained(folder)
    with torch.device("meta"):
        parameters = CapivaraModel(CapivaraConfig.from_pretrained(folder)).num_parameters()
    return {"parameters": parameters, "weights_bytes": (folder / WEIGHTS).stat().st_size}


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most this process has held so far: resident, or allocated on the GPU."""
    if not device.startswith("cuda"):
        return peak_resident_bytes()
    import torch

    return torch.cuda.max_memory_allocated()


def conditions(device: Any = "cpu") -> dict[str, Any]:
    """What figures depend on: commit, day, device, threads and versions of the packages."""
    import torch

    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "device": device_description(device)}
    return about | {"threads": torch.get_num_threads(), "versions": package_versions()}


def commit() -> str:
    """Short hash of what is checked out, with a + where files differ from it; empty where git can't say."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def finish(results: Any, output: Path | None = None) -> None:
    """Write the results to a JSON file, if there is to be one, and print them as the last line."""
    if output:
        write_json(output, results)
    print(json.dumps(results))
