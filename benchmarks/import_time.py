"""What `import modeling_capivara` costs over importing transformers' base and Auto classes.

python -m benchmarks.import_time --output benchmarks/results/import_time.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common.environment import device_description, package_versions
from common.files import write_json

BASE = "from transformers import PreTrainedModel, AutoModel, AutoProcessor"
PACKAGE = f"{BASE}; import modeling_capivara"
TIMED = "import time; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def measure(runs: int = 5) -> dict:
    """Seconds of both imports in fresh processes, alternating, after one untimed round that fills the disk cache."""
    seconds = {BASE: [], PACKAGE: []}
    for run in range(runs + 1):
        for code, measured in seconds.items():
            done = subprocess.run(
                [sys.executable, "-c", TIMED.format(code)], capture_output=True, text=True, check=True
            )
            if run:
                measured.append(float(done.stdout))
    base, package = (statistics.median(measured) for measured in seconds.values())
    return {"transformers_s": base, "with_package_s": package, "extra_s": package - base, "runs": runs}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    results = {"device": device_description(), "versions": package_versions(), **measure()}
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
