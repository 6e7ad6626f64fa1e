"""A complete training run of a tiny model, as a user starts it, and the mistakes that end it early."""

import json
import math
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import train_accelerate
from capivara_common.files import RUN_MARKER, lock_folder
from hub_upload.card import find_card_faults
from modeling_capivara.loading import load_model, load_processor

ROOT = Path(__file__).resolve().parent.parent


def flags(folder, dataset, output, **overrides) -> list[str]:
    """Return the flags of a short run of six steps."""
    values = {"model": folder, "dataset": dataset, "output_dir": output, "eval_languages": ["pt", "en"]}
    values |= {"effective_batch_size": 10, "micro_batch_size": 4, "max_steps": 6, "warmup_steps": 2, "eval_steps": 3}
    values |= {"learning_rate": 1e-3, "min_learning_rate": 0, "weight_decay": 0, "num_threads": 1, **overrides}
    argv = []
    for key, value in values.items():
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def error_of(argv: list[str]) -> str:
    """Run a command that must fail, and return its error message or exit code."""
    with pytest.raises((SystemExit, ValueError, OSError, ImportError)) as error:
        train_accelerate.main(argv)
    return str(error.value)


@pytest.fixture(scope="module")
def finished(saved_tiny_folder, tiny_dataset_folder, tmp_path_factory):
    """A finished run. Tests must not change it."""
    return train_accelerate.main(flags(saved_tiny_folder, tiny_dataset_folder, tmp_path_factory.mktemp("run") / "out"))


def test_a_run_writes_all_its_files(finished, tiny_dataset_folder):
    out = finished
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    results = {f"results/retrieval_squares_test_{language}.json" for language in ("pt", "en")}
    plots = {"curves.png", "retrieval.png"}
    assert {"model.safetensors", "config.json", "processor_config.json", "run.json", "README.md", "table.md"} <= files
    assert results | plots <= files
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run["steps"], run["pairs"], run["seed"]) == (6, 60, 0) and run["config"]["learning_rate"] == 1e-3
    assert [p["step"] for p in run["curve"]] == list(range(7))
    assert [p["step"] for p in run["curve"] if "validation" in p] == [0, 3, 6]
    assert run["seconds"]["training"] > 0 and run["versions"]["torch"] and run["device"]
    names = {" ".join(key.split()[1:]) for key in run["dataset_fingerprints"]}
    assert names == {"model", "train", "validation", "test pt", "test en"}
    for name in results:
        records = json.loads((out / name).read_text(encoding="utf-8"))["records"]
        assert {(r["model"], r["direction"]) for r in records if r["metric"] == "recall@5"} == {
            (model, direction) for model in ("baseline", "capivara") for direction in ("text_to_image", "image_to_text")
        }
        metrics = {"recall@1", "recall@5", "median_rank"}  # what is reported for 8 images
        assert {(r["metric"], r["dataset"]) for r in records} == {(metric, "squares") for metric in metrics}
    for name in plots:
        assert min(Image.open(out / name).size) > 300
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "Baseline" in table and "CAPIVARA" in table and "| – | – |" in table and "95 % interval" not in table
    assert "R@5" in (card := (out / "README.md").read_text(encoding="utf-8")) and "R@10" not in card
    assert find_card_faults(out) == [] and '"repo_id": null' in card and not (out / RUN_MARKER).exists()


def test_a_folder_that_the_run_reads_is_not_overwritten(tiny_folder, tiny_dataset_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").touch()
    for dataset, output in ((tiny_dataset_folder, tiny_folder.parent), (tmp_path / "data/*.tar", tmp_path / "data")):
        argv = flags(tiny_folder, dataset, output, overwrite_output_dir="true")
        assert str(output) in error_of(argv)
    assert load_model(tiny_folder) and (tmp_path / "data" / "a.tar").is_file()


def change_keys(path: Path) -> None:
    tensors = load_file(path)
    tensors["surplus.weight"] = tensors.pop("text_projection.0.weight")
    del tensors["logit_scale"]
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGED_MODELS = {
    "no processor": ("processor_config.json", Path.unlink, "processor"),
    "no config": ("config.json", Path.unlink, "model"),
    "truncated weights": ("model.safetensors", lambda path: os.truncate(path, 5000), "model"),
    "other keys": ("model.safetensors", change_keys, r"logit_scale, text_projection\.0\.weight.*surplus\.weight"),
}


@pytest.mark.parametrize("fault", DAMAGED_MODELS)
def test_a_damaged_model_folder_is_named(tiny_folder, tiny_dataset_folder, tmp_path, fault):
    name, damage, named = DAMAGED_MODELS[fault]
    damage(tiny_folder / name)
    message = error_of(flags(tiny_folder, tiny_dataset_folder, tmp_path / "out"))
    assert str(tiny_folder) in message and re.search(named, message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model": "us/none", "caption_strategy": "rank", "language": "xh"},  # checked before a model is searched for
         r"'captions-xh'.*'captions-pt'.*--caption_strategy none"),
        ({"effective_batch_size": 13}, r"\b13\b.* --effective_batch_size 12\b"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_the_data_are_refused(model, tiny_dataset_folder, tmp_path, overrides, named):
    assert re.search(named, error_of(flags(model, tiny_dataset_folder, tmp_path / "out", **overrides)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_clamps_the_logit_scale(tiny_folder, tiny_dataset_folder, tmp_path):
    """In the authors' code, the clamp is in a hook that is never called."""
    model = load_model(tiny_folder)
    model.logit_scale.data.fill_(5.0)  # ln 100 is 4.605
    model.save_pretrained(tmp_path / "hot")
    load_processor(tiny_folder).save_pretrained(tmp_path / "hot")
    rate = {"learning_rate": 0.1, "warmup_steps": 0}
    out = train_accelerate.main(flags(tmp_path / "hot", tiny_dataset_folder, tmp_path / "out", **rate))
    scales = [point["logit_scale"] for point in json.loads((out / "run.json").read_text())["curve"][1:]]
    assert max(scales) == pytest.approx(math.log(100)) and len({round(scale, 4) for scale in scales}) > 1


def test_a_folder_with_other_files_or_another_run_is_left_alone(model, tiny_dataset_folder, tmp_path):
    """A folder with unrelated files, one in which another process trains, and a path below a file."""

    def error_for(output: str) -> str:
        return error_of(flags(model, tiny_dataset_folder, tmp_path / output))

    for name in ("out", "new.partial", "busy.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / (RUN_MARKER if name == "busy.partial" else "precious.txt")).touch()
    handle = lock_folder(tmp_path / "busy.partial")
    try:
        assert re.search(r"process.*busy\.partial", error_for("busy"))
    finally:
        os.close(handle)
    assert re.search(r"out\b.*--overwrite_output_dir", error_for("out"))
    assert "new.partial" in error_for("new") and "precious.txt" in error_for("out/precious.txt/out")
    assert len(list(tmp_path.glob("*/precious.txt"))) == 2 and (tmp_path / "busy.partial").is_dir()
