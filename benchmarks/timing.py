"""What every benchmark here shares: alternating runs, medians, processes of their own, and the form of the results."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from capivara_common.environment import describe_device, package_versions
from capivara_common.files import write_json

CODE_ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = CODE_ROOT / "benchmarks" / "results"
CAPTION_WORDS = (
    "um uma o a homem mulher criança gato cachorro casa rua praia mesa bola carro bicicleta sol azul verde vermelho "
    "grande pequeno foto mar livro perto sobre dentro com de na no para duas três pessoas árvore porta"
)  # of made captions; each is a token of XLM-R
Result = TypeVar("R")


def peak_resident_bytes() -> int:
    """The most memory this process has held. Not of getrusage, which starts at what the parent had held."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("The kernel does not say how much memory this process has held.")


def restart_peak_memory() -> int:
    """Let `peak_resident_bytes` start anew from what is held now; returns that."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)
    return peak_resident_bytes()


def time_call(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run_alternating(programs: dict[Any, Callable[[], Result]], runs: int, title: str) -> dict[Any, list[Result]]:
    """Results of all programs, which take turns in every run, so that a slow minute of the machine is everyone's."""
    results: dict[Any, list[Result]] = {name: [] for name in programs}
    for _ in tqdm(range(runs), desc=title, unit="run"):
        for name, program in programs.items():
            results[name].append(program())
    return results


def time_alternating(steps: dict[str, Callable[[], Any]], runs: int, title: str) -> dict[str, list[float]]:
    """Seconds of all steps in alternating runs; each has been called before."""
    return run_alternating({name: partial(time_call, step) for name, step in steps.items()}, runs, title)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios run by run, from which what slows both programs in a run cancels out."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def summarize_rates(rates: Sequence[float]) -> dict[str, float]:
    """Of what was done per second in each run: median, slowest and fastest."""
    return {"median": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def run_in_process(module: str, root: Path = CODE_ROOT, **flags: Any) -> Any:
    """The JSON in the last line that a module of this project prints. A process of its own has its own peak of memory.

    `root` is a checkout of this project; another than this one has a .venv of its own. Raises RuntimeError where it
    failed, with the end of its error output.
    """
    python = sys.executable if root == CODE_ROOT else str(root.absolute() / ".venv" / "bin" / "python")
    words = [python, "-m", module, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_captions(count: int, words: int = 18, deviation: float = 4.5) -> list[str]:
    """Captions of `words` words on average, at least 5 and at most 68; the same arguments give the same ones."""
    dice = np.random.default_rng(0)
    lengths = dice.normal(words, deviation, count).round().clip(5, 68).astype(int)
    return [" ".join(dice.choice(CAPTION_WORDS.split(), length)) for length in lengths]


def save_random_model(folder: Path) -> int:
    """Save the published architecture with random weights, if it is not there; the bytes of its weights."""
    import torch

    from capivara_search.miniature_encoders import load_tokenizer
    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
    from modeling_capivara.loading import WEIGHTS_FILE

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        CapivaraModel(CapivaraConfig()).save_pretrained(folder)
        CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer()).save_pretrained(folder)
    return (folder / WEIGHTS_FILE).stat().st_size


def describe_conditions(*packages: str) -> dict[str, Any]:
    """What figures depend on: commit (with a + where files differ from it), day, device, threads and versions."""
    import torch  # here, as above: a program without it is measured without its memory

    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"]
    commit = subprocess.run(words, cwd=CODE_ROOT, capture_output=True, text=True, check=False).stdout.strip()
    about = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "device": describe_device()}
    return about | {"threads": torch.get_num_threads(), "versions": package_versions(*packages)}


def write_results(results: Any, output: Path | None = None) -> None:
    """Write the results to a JSON file, if there is to be one, and print them as the last line."""
    if output:
        write_json(output, results)
    print(json.dumps(results))
