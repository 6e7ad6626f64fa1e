"""The commands of the guide for a new language, with forty images: table, build, training and cards."""

import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from huggingface_hub import DatasetCard
from seq2seq_models import marian_folder
from tiny import draw_nothing, save_model

import train_accelerate
from captions.build import BuildArguments, ManualStepRequired, build_dataset, main
from captions.translation_tables import escape_cell, unescape_cell
from hub_upload.card import find_differences_between_card_and_files, write_card

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "how-to" / "your_language.md").read_text(encoding="utf-8")
SPLITS = {"train": 40, "validation": 8, "test": 8}
CARD = {"license": "cc-by-4.0", "sources": [{"name": "Noise", "license": "CC BY 4.0"}]}


@pytest.fixture(autouse=True)
def work_in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    draw_nothing(monkeypatch)


@pytest.fixture
def config(tmp_path) -> Path:
    """A config that builds from image folders with a metadata.csv."""
    generator = np.random.default_rng(0)
    for split, number in SPLITS.items():
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for i in range(number):
            PIL.Image.fromarray(generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines = [f'{i}.png,"a {split} picture, number {i}"' for i in range(number)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,captions-en", *lines]), encoding="utf-8")
    content = {"language": "sw", "dataset": "images", "output": "data/sw", "evaluation_splits": ["validation", "test"]}
    content |= {"translate": {"backend": "file", "import": "tables/{split}.tsv"}, "card": CARD}
    content |= {"score": {"model": "models/base", "device": "cpu"}}
    content |= {"select": {"caption_strategy": "rank", "caption_count": 5, "min_pair_similarity": -1}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path / "my.yaml"


def changed(config: Path, **changes) -> None:
    content = yaml.safe_load(config.read_text(encoding="utf-8")) | changes
    config.write_text(yaml.safe_dump(content), encoding="utf-8")


def fill(tables: Path) -> None:
    for path in tables.glob("*.tsv"):
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        cells = [line.split("\t")[:2] for line in lines]
        filled = [
            f"{name}\t{text}\t{escape_cell(unescape_cell(text).replace('picture', 'picha'))}" for name, text in cells
        ]
        path.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")


def read_guide_command(*replaced: tuple[str, str]) -> list[str]:
    """Return the arguments of the guide's training command, with replacements."""
    command = re.search(r"python train_accelerate\.py (--config configs/small_data\.yaml(?:\\\n|.)*)\n", GUIDE)[1]
    for old, new in replaced:
        assert old in command
        command = command.replace(old, new)
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.slow
def test_the_guide_leads_from_forty_images_to_a_model(config, tiny_processor):
    save_model(Path("models/base"), tiny_processor)
    with pytest.raises(ManualStepRequired):
        build_dataset(BuildArguments(config))
    fill(Path("data/sw/tables"))
    built = build_dataset(BuildArguments(config))
    assert DatasetCard.load(built / "README.md").data.to_dict()["translations"] == {"sw": "human"}
    words = read_guide_command(("configs/", f"{ROOT}/configs/"), ("cc3m-hi", "sw"), ("hi", "sw"))
    run = train_accelerate.main(words)
    assert run.resolve() == Path("runs/sw-small").resolve() and (run / "adapter").is_dir()
    for language, who, machine in (
        ("en", "translated by people", "achine"),
        ("pt", "traduzidas por pessoas", "máquina"),
    ):
        text = write_card(run, None, language).read_text(encoding="utf-8")
        assert who in text and machine not in text and find_differences_between_card_and_files(run) == []
    with pytest.raises(ValueError, match=r"\b41\b.*--effective_batch_size 40\b"):
        train_accelerate.main([*words, "--effective_batch_size", "41", "--output_dir", "runs/larger"])
    # The message names the largest possible batch after the selection of captions.
    fewer = ["--min_pair_similarity", "0.1", "--effective_batch_size", "41", "--output_dir", "runs/larger"]
    with pytest.raises(ValueError, match=r"\b41\b.*--effective_batch_size (?!40)\d+\b"):
        train_accelerate.main([*words, *fewer])


@pytest.mark.slow
def test_machine_translations_in_a_table_are_recorded_as_such(config, tiny_processor):
    changed(config, translate={"backend": "file", "import": "tables/{split}.tsv", "translated_by": "machine"})
    save_model(Path("models/base"), tiny_processor)
    with pytest.raises(ManualStepRequired):
        build_dataset(BuildArguments(config))
    fill(Path("data/sw/tables"))
    card = DatasetCard.load(build_dataset(BuildArguments(config)) / "README.md")
    assert card.data.to_dict()["translations"] == {"sw": "machine"} and "human-translated" not in card.content
    assert "people" not in card.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset": "missing"}, "missing"),
        ({"evaluation_splits": ["dev"]}, "'dev'"),
        ({"source_language": "fr"}, "captions-fr"),
        ({"rename": ["captions-en=captions-sw"]}, "captions-en"),
        ({"language": "swahili"}, "'swahili'"),
        ({"score": {"model": "models/base", "language": "gn"}}, "captions-gn"),
        ({"select": {"language": "gn"}}, "captions-gn"),
    ],
)
def test_a_dry_run_checks_the_data(config, changes, named):
    """A dry run checks splits, columns and languages of all stages, and writes nothing."""
    main(["--config", str(config), "--dry_run"])
    changed(config, **changes)
    with pytest.raises(ValueError, match=named):
        main(["--config", str(config), "--dry_run"])
    assert not Path("data").exists()


@pytest.mark.slow
def test_a_dry_run_checks_the_languages_of_the_translator(config, tmp_path):
    model = marian_folder(tmp_path / "m" / "translator")
    changed(config, language="xh", translate={"model": str(model)})
    main(["--config", str(config), "--dry_run"])
    changed(config, language="gn")
    with pytest.raises(ValueError, match="'gn'"):
        main(["--config", str(config), "--dry_run"])
    assert not Path("data").exists()


def test_the_guide_installs_what_its_commands_need():
    """The training on little data uses LoRA adapters, which need peft."""
    assert yaml.safe_load((ROOT / "configs" / "small_data.yaml").read_text(encoding="utf-8"))["lora_rank"]
    for page in ("your_language.md", "seu_idioma.md"):
        text = (ROOT / "docs" / "how-to" / page).read_text(encoding="utf-8")
        lines = re.findall(r'pip install -e "\.\[(.*)\]"', text)
        assert {"demo", "translate", "open-clip", "lora"} <= set(lines[-1].split(",")), page
