"""A small caption build for tests: thirteen images, two of them unusable, and filled translation tables."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
import yaml
from caption_tars import picture
from datasets import Dataset, DatasetDict, Features, Image, Value

from caption_data.rows import CAPTIONS_FEATURE
from captions.build import BuildArguments, ManualStepRequired, build_dataset
from captions.translation_tables import escape_cell, unescape_cell

ROOT = Path(__file__).resolve().parent.parent
CARD = {
    "pretty_name": "Squares | *of* <color>",
    "license": "cc-by-4.0",
    "sources": [{"name": "Noise", "url": "https://example.org/noise", "license": "CC BY 4.0"}],
}


def write_config(folder: Path, model: Path) -> Path:
    """Write a config with the output FOLDER/built, its dataset and its filled tables; return the path of the config."""
    features = Features(
        {
            "picture": Image(),
            "captions-en": CAPTIONS_FEATURE,
            "generated-captions-en": CAPTIONS_FEATURE,
            "url": Value("string"),
        }
    )

    def split(number: int, broken: bool) -> Dataset:
        rows = {
            "picture": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(number)],
            "captions-en": [[f"a cat {i}"] for i in range(number)],
            "generated-captions-en": [[f"a photo of {i}", "a dog"] for i in range(number)],
            "url": [f"https://example.org/{i}" for i in range(number)],
        }
        if broken:
            rows["picture"][3] = {"bytes": b"no image", "path": None}
            rows["captions-en"][5] = rows["generated-captions-en"][5] = []
        return Dataset.from_dict(rows, features=features)

    DatasetDict(train=split(13, True), test=split(12, False)).save_to_disk(folder / "data")
    content = {
        "dataset": str(folder / "data"),
        "output": str(folder / "built"),
        "language": "xh",
        "image_column": "picture",
        "evaluation_splits": ["test"],
        "translate": {"backend": "file", "import": f"{folder}/tables/{{split}}.tsv"},
        "score": {"model": str(model), "device": "cpu", "rows_per_part": 4},
        "select": {"caption_strategy": "rank", "caption_count": 2, "rows_per_part": 6},
        "card": CARD,
    }
    content["translate"] |= {"rows_per_part": 2, "batch_rows": 4}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ManualStepRequired, match=r"train\.tsv.*1-translate, train.*\n.*test\.tsv"):
        build_dataset(BuildArguments(path))
    fill(folder / "tables")
    return path


def openmoji_config(folder: Path, model: Path) -> Path:
    """Write the config of examples.openmoji.captions for a tiny model, with the output FOLDER/built."""
    content = yaml.safe_load((ROOT / "configs" / "openmoji_captions.yaml").read_text(encoding="utf-8"))
    content |= {"dataset": str(folder / "english"), "output": str(folder / "built")}
    content["translate"] |= {"import": str(folder / "tables" / "{split}.tsv"), "rows_per_part": 2}
    content["score"] = {"model": str(model), "device": "cpu", "rows_per_part": 4}
    content["select"]["min_pair_similarity"] = -1
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "config.yaml"


def fill(tables: Path) -> None:
    """Translate all tables in a folder."""
    for path in tables.glob("*.tsv"):
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t")[:2] for line in lines]
        filled = [f"{name}\t{text}\t{escape_cell(xhosa(unescape_cell(text)))}" for name, text in rows]
        path.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")


def xhosa(text: str) -> str:
    return text.replace("a cat", "ikati").replace("a dog", "inja").replace("a photo of", "ifoto ye")


def changed(path: Path, **changes) -> Path:
    """Change keys of a config; None removes a key."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    return path


def files(folder: Path) -> dict[str, str]:
    """Return the digest of each file except the logs, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.relative_to(folder).parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def surroundings() -> dict:
    """Return options for a subprocess with as many threads as this process; rounding depends on their number."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
