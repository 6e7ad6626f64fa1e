"""Functions that all benchmarks share: measure time and memory, run modules in processes, and write results as JSON.

Other functions generate the inputs of benchmarks: random captions, and a model with random weights.
"""

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
CAPTION_WORDS = (  # words of generated captions; each is a single token of XLM-R
    "um uma o a homem mulher criança gato cachorro casa rua praia mesa bola carro bicicleta sol azul verde vermelho "
    "grande pequeno foto mar livro perto sobre dentro com de na no para duas três pessoas árvore porta"
)
Result = TypeVar("R")


def peak_resident_bytes() -> int:
    """Return the peak resident memory that this process has used so far, in bytes. Requires Linux.

    Raises:
        OSError: If /proc/self/status does not exist or has no VmHWM.
    """
    # `getrusage` is not used, because the peak that it reports includes the peak of the parent process.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM, the peak memory of this process. Run benchmarks on Linux.")


def reset_peak_memory() -> int:
    """Reset the peak memory that Linux records for this process to the memory in use now.

    Returns:
        The resident memory in use now, in bytes.
    """
    # 5 is the value for this reset (manual page proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_resident_bytes()


def time_call(call: Callable[[], Any]) -> float:
    """Call a function once, without arguments, and return the wall-clock time of the call in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run_alternating(programs: dict[Any, Callable[[], Result]], runs: int, title: str) -> dict[Any, list[Result]]:
    """Call several functions alternately, so that a slow phase of the machine affects all of them equally.

    Args:
        programs: `{name: function to call}`.
        runs: Number of calls of each function.
        title: Title of the progress bar.

    Returns:
        `{name: list of the function's return values, one per run}`.
    """
    results: dict[Any, list[Result]] = {name: [] for name in programs}
    for _ in tqdm(range(runs), desc=title, unit="run"):
        for name, program in programs.items():
            results[name].append(program())
    return results


def time_alternating(steps: dict[str, Callable[[], Any]], runs: int, title: str) -> dict[str, list[float]]:
    """Time several functions alternately, so that a slow phase of the machine affects all of them equally.

    Args:
        steps: `{name: function to time}`. Call each function once before, because the first call is often slower.
        runs: Number of timed calls of each function.
        title: Title of the progress bar.

    Returns:
        `{name: seconds of each run}`.
    """
    return run_alternating({name: partial(time_call, step) for name, step in steps.items()}, runs, title)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Compare two programs by the median, over all runs, of the ratio of their times or rates.

    Args:
        numerators: Seconds or rate of the first program in each run.
        denominators: Seconds or rate of the second program in each run, in the same order.

    Returns:
        Median of `numerators[i] / denominators[i]` over the runs i.
    """
    # A slow phase of the machine slows down both programs in the same run, so its effect cancels out in the ratio.
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def summarize_rates(rates: Sequence[float]) -> dict[str, float]:
    """Summarize the speed of several runs by the median, the slowest and the fastest rate.

    Args:
        rates: Rate of each run in items per second.

    Returns:
        `{"median": median of the rates, "slowest": lowest rate, "fastest": highest rate}`.
    """
    return {"median": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def run_module_in_subprocess(module: str, root: Path = CODE_ROOT, **flags: Any) -> Any:
    """Run a benchmark module in a new process, and return the result that the module prints as JSON.

    Args:
        module: Name of the module, such as "benchmarks.export".
        root: Folder of the project's checkout to run. A checkout other than this one needs its own `.venv`.
        **flags: Command-line flags of the module by name. `runs=5` becomes `--runs=5`.

    Returns:
        The JSON value in the last line of the module's output.

    Raises:
        RuntimeError: If the process fails. The message contains the end of its error output.
    """
    # The peak memory of a new process belongs to this measurement alone.
    python = sys.executable if root == CODE_ROOT else str(root.absolute() / ".venv" / "bin" / "python")
    words = [python, "-m", module, *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {process.returncode}:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def make_captions(count: int, words: int = 18, deviation: float = 4.5) -> list[str]:
    """Generate captions of random Portuguese words as test inputs. The same arguments give the same captions.

    Args:
        count: Number of captions.
        words: Average number of words per caption. Every caption has between 5 and 68 words.
        deviation: Standard deviation of the number of words.

    Returns:
        The captions: words from `CAPTION_WORDS`, separated by spaces.
    """
    rng = np.random.default_rng(0)
    lengths = rng.normal(words, deviation, count).round().clip(5, 68).astype(int)
    return [" ".join(rng.choice(CAPTION_WORDS.split(), length)) for length in lengths]


def save_random_model(folder: Path) -> int:
    """Save a CAPIVARA model with random weights in the published size, for measurements without a download.

    If the folder already contains a model, nothing is written.

    Args:
        folder: Folder for the model and its processor.

    Returns:
        Size of the weight file in bytes.
    """
    import torch

    from capivara_search.miniature_encoders import load_tokenizer
    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
    from modeling_capivara.loading import WEIGHTS_FILE

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        CapivaraModel(CapivaraConfig()).save_pretrained(folder)
        CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer()).save_pretrained(folder)
    return (folder / WEIGHTS_FILE).stat().st_size


def describe_measurement_conditions(*packages: str) -> dict[str, Any]:
    """Describe where and with which code a benchmark ran, to be stored with its results.

    Args:
        *packages: Names of packages whose versions are recorded, in addition to those that are always recorded.

    Returns:
        `{"commit": short Git commit, with "+" if there are uncommitted changes, "date": today as YYYY-MM-DD, "device":
        description of the CPU, "threads": number of torch's threads, "versions": {package: version}}`.
    """
    import torch  # imported here, so that it does not count in the memory of processes that need no torch

    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"]
    commit = subprocess.run(words, cwd=CODE_ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit, "date": time.strftime("%Y-%m-%d"), "device": describe_device(),
        "threads": torch.get_num_threads(), "versions": package_versions(*packages),
    }  # fmt: skip


def output_results_as_json(results: Any, output: Path | None = None) -> None:
    """Print the results of a benchmark as one line of JSON, and also write them to a file if requested.

    Args:
        results: Any value that JSON can represent.
        output: JSON file to write. None only prints.
    """
    if output:
        write_json(output, results)
    print(json.dumps(results))


def output_results_with_conditions(results: dict[str, Any], output: Path | None, *packages: str) -> None:
    """Print the results of a benchmark and the conditions of the measurement, and write both to a file if requested.

    Args:
        results: Results by name.
        output: JSON file to write. None only prints.
        *packages: Names of further packages whose versions are recorded (see `describe_measurement_conditions`).
    """
    output_results_as_json(describe_measurement_conditions(*packages) | results, output)
