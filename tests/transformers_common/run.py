"""Run the common test suites of transformers on the classes of CAPIVARA.

    python tests/transformers_common/run.py                     # downloads the suites of the installed version once
    python tests/transformers_common/run.py -k test_save_load   # other arguments are passed to pytest
    python tests/transformers_common/run.py --source transformers-5.24.0.tar.gz

The suites are the classes with which every model of transformers is tested. The source distribution of transformers
contains them, the wheel does not. CONTRIBUTING.md lists the tests that are expected to fail, with the reasons.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from PIL import Image

from capivara_common.cli import run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder

HERE = Path(__file__).resolve().parent
PACKAGE = "transformers_tests"  # transformers looks for its fixtures in a folder whose name ends with "tests"
# Files that the suites import or read, but that no distribution contains: path -> content.
STUBS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/fixtures/sample_text.txt": "uma foto de um gato\na photo of a cat\n",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return __file__.replace('.py', '.png')\n",
}


def main(argv: list[str] | None = None) -> int:
    """Prepare the suites and run pytest on them; return the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source_help = "Source distribution of transformers: a .tar.gz file, or the folder it unpacks to. Default: PyPI's."
    parser.add_argument("--source", type=Path, help=source_help)
    args, pytest_args = parser.parse_known_args(argv)
    require_packages("The common test suite of transformers", "test", "parameterized")
    cache = HERE.parents[1] / ".pytest_cache" / f"transformers-{transformers.__version__}"
    with TemporaryDirectory() as scratch:
        if args.source or not cache.is_dir():
            write_suites(args.source or download(Path(scratch)), cache)
    paths = [str(cache), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    files = sorted(map(str, HERE.glob("common_*.py")))
    # The suites use pytest markers that --strict-markers in `setup.cfg` would refuse.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-rfE", "-W", "ignore", *files, *pytest_args]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode


def download(folder: Path) -> Path:
    """Download the source distribution of the installed version of transformers into `folder`; return its path."""
    # Only transformers: `--no-binary :all:` would also build the build tools from source.
    command = ["download", "--no-binary", "transformers", "--no-deps", f"transformers=={transformers.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", *command, "--dest", str(folder)], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def write_suites(source: Path, folder: Path) -> None:
    """Write the package `PACKAGE` into `folder`: the top-level test modules of a source distribution, and the stubs."""
    with atomic_folder(folder, overwrite=True) as new, TemporaryDirectory() as scratch:
        if source.is_file():
            with tarfile.open(source) as archive:
                archive.extractall(scratch, filter="data")
            source = next(Path(scratch).iterdir())
        if not (source / "tests" / "test_modeling_common.py").is_file():
            sys.exit(
                f"{source} is not a source distribution of transformers: tests/test_modeling_common.py is missing."
            )
        for name, text in STUBS.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        Image.new("RGB", (640, 480), "green").save(new / "fetch_hub_objects_for_ci.png")
        for path in (source / "tests").glob("*.py"):
            shutil.copyfile(path, new / PACKAGE / path.name)


if __name__ == "__main__":
    run_main_and_report_user_errors(lambda: sys.exit(main()))
