"""Compare the files of a wheel and a source archive with the committed list tests/dist_contents.txt.

python -m build
python tests/dist_contents.py dist           # prints a diff and exits with 1 if they differ
python tests/dist_contents.py dist --write   # after an intended change
"""

import difflib
import sys
import tarfile
import zipfile
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")


def list_contents(folder: Path) -> list[str]:
    """Return the names of all files in the only wheel and the only source archive of a folder, without versions."""
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as files, tarfile.open(archive) as source:
        names = [f"wheel/{name}" for name in files.namelist()]
        names += [f"source/{file.name.partition('/')[2]}" for file in source.getmembers() if file.isfile()]
    names = [name.replace(f"-{version}.", "-VERSION.") for name in names]
    return sorted(name for name in names if ".egg-info/" not in name)  # written by setuptools, of no use to anybody


def compare_contents(folder: Path) -> str:
    """Return the difference between the committed list and the files of a folder as a diff; "" if they are equal."""
    expected, actual = LIST.read_text(encoding="utf-8").splitlines(), list_contents(folder)
    diff = difflib.unified_diff(expected, actual, str(LIST.name), str(folder), n=0, lineterm="")
    return "\n".join(line for line in diff if not line.startswith("@@"))


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    if "--write" in sys.argv:
        LIST.write_text("\n".join(list_contents(dist)) + "\n", encoding="utf-8")
    if difference := compare_contents(dist):
        sys.exit(f"The files differ from the committed list; if that is intended, add --write:\n{difference}")
