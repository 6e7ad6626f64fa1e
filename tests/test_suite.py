"""The suite runs every benchmark on small made datasets, and lists benchmarks that were not run."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_benchmarks import BENCHMARKS, ELEVATER, IMAGES, make_data, make_image, make_readable, make_releases
from tiny import randomize, save_model
from towers import gemma_like, siglip2

from capivara_common.files import read_json
from eval import suite
from eval.benchmarks import BENCHMARKS_FOLDER, read_benchmark
from eval.prompts import load_prompts
from eval.records.result_files import read_records
from eval.suite import build_suite_rows_and_remarks, main
from modeling_capivara.loading import load_model


def make_flags(output, *other_flags, **options) -> list[str]:
    values = {"output": output, **options}
    return ["paper", *(part for key, value in values.items() for part in (f"--{key}", str(value))), *other_flags]


def read_summary(output: Path) -> dict:
    return read_json(output / "suite.json")


def read_rows(output: Path) -> dict[tuple, dict]:
    """Return the rows of suite.json by benchmark, language, direction and metric."""
    return {(r["benchmark"], r["language"], r["direction"], r["metric"]): r for r in read_summary(output)["rows"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_processor) -> Path:
    """Folder with three tiny models of different weights: `base`, and two in `runs`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "runs/seed-1", "runs/seed-2")):
        save_model(folder / name, tiny_processor, seed)
        (folder / name / "run.json").write_text(json.dumps({"seed": 40 + seed}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder with data of some benchmarks, each under its key. Releases are converted as the evaluation guide says."""
    folder = tmp_path_factory.mktemp("benchmarks")
    make_releases(folder)
    make_readable(folder)
    for key in ("mnist", "hateful-memes", "flickr30k-pt"):
        make_data(folder / key, key)
    return folder


def load_one_prompt_per_class(*arguments):
    """Load prompts and keep the first of each class. Embedding all would take most of the time."""
    prompts = load_prompts(*arguments)
    return replace(prompts, class_prompts=[filled[:1] for filled in prompts.class_prompts])


@pytest.mark.slow
def test_every_benchmark_is_measured_in_its_layout(models, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.classification.load_prompts", load_one_prompt_per_class)
    keys = [key for key in BENCHMARKS if key != "babel-imagenet"]  # the last test measures it
    for key in keys:
        if not BENCHMARKS[key].data_of and not (data / key).exists():
            make_data(data / key, key)
    main(make_flags(tmp_path, "--only", *keys, model=models / "base", data_dir=data))
    summary, rows = read_summary(tmp_path), read_rows(tmp_path)
    assert {(m["benchmark"], m["status"]) for m in summary["measurements"]} == {(key, "measured") for key in keys}
    assert all(0 <= row["capivara"]["measured"]["mean"] <= 100 for row in rows.values())
    assert {code for key, code, *_ in rows if key == "flickr30k_200"} == {"por_Latn", "hin_Deva", "xho_Latn"}
    metrics = {key: metric for key, *_, metric in rows}
    assert (metrics["voc-2007-classification"], metrics["hateful-memes"]) == ("11point_mAP", "roc_auc")
    figures = [rows[key, "pt", "", BENCHMARKS[key].metric]["capivara"]["measured"]["mean"] for key in ELEVATER]
    average = rows["elevater", "pt", "", "average"]["capivara"]
    assert average["measured"]["mean"] == pytest.approx(sum(figures) / 20)
    assert average["published"] == {"mean": 57.51, "std": 0.02}
    records = read_records(tmp_path / "pracegover-pt-capivara-0.json")
    (record,) = (r for r in records if (r.direction, r.metric) == ("text_to_image", "mean_recall"))
    row = rows["pracegover", "pt", "text_to_image", "mean_recall"]["capivara"]
    assert row["measured"]["mean"] == pytest.approx(100 * record.value)
    assert row["difference"] == pytest.approx(100 * record.value - 66.40) and (record.n, record.seed) == (IMAGES, 40)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "65.36" in table and "66.40 ± 0.01" in table
    assert "Not like for like" in table and "Beyond the paper" in table
    assert "| ELEVATER average | average |" in table and str(data) not in table + str(summary)


@pytest.mark.slow
def test_a_selected_benchmark_without_the_languages_is_listed_as_not_run(models, data, tmp_path):
    selection = ["--only", "xm3600-first", "flickr30k_200", "--languages", "pt", "hi"]
    main(make_flags(tmp_path, *selection, model=models / "base", data_dir=data))
    rows, measurements = read_rows(tmp_path), read_summary(tmp_path)["measurements"]
    assert {(m["benchmark"], m["language"], m["status"]) for m in measurements} == {
        *(("xm3600-first", code, "measured") for code in ("pt", "hi")), ("flickr30k_200", "por_Latn", "not run"),
    }  # fmt: skip
    assert rows["xm3600-first", "pt", "text_to_image", "mean_recall"]["baseline"]["published"] == {"mean": 73.02}
    assert rows["xm3600-first", "hi", "text_to_image", "mean_recall"]["baseline"]["published"] is None


@pytest.mark.slow
def test_another_base_is_compared_with_its_own_published_figures(models, data, tmp_path, capsys):
    """SigLIP 2 is recognized by its name, as --baseline or as the base in run.json."""
    base = tmp_path / "google" / "siglip2-base-patch16-224"
    siglip2(base, gemma_like(["um gato azul", "a casa"] * 3, 320))
    shutil.copytree(base, tmp_path / "run")
    weights = load_model(base)
    randomize(weights, 1).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"seed": 0, "config": {"model": str(base)}}))
    for name, options in {"without-baseline": {}, "with-baseline": {"baseline": base}}.items():
        selection = ["--only", "xm3600-first", "mnist", "--languages", "pt"]
        main(make_flags(tmp_path / name, *selection, model=tmp_path / "run", data_dir=data, **options))
        rows = read_rows(tmp_path / name)
        row = rows["xm3600-first", "pt", "text_to_image", "mean_recall"]
        assert row["baseline"]["published"] == {"mean": 77.54} and row["capivara"]["published"] is None
        assert (row["baseline"]["difference"] is None) == (name == "without-baseline")
        assert not rows["mnist", "pt", "", "accuracy"]["baseline"]["published"]
    table = capsys.readouterr().out
    assert "| 77.54 |" in table and "Immich's page on searching" in table and "SiglipModel, sigmoid loss" in table


@pytest.mark.slow
def test_runs_with_several_seeds_give_mean_and_standard_deviation(models, data, tmp_path):
    runs = models / "runs"
    options = {"runs": runs, "baseline": models / "base", "data_dir": data}
    options["model"] = runs / "seed-1"  # --model may also be in --runs
    main(make_flags(tmp_path, "--only", "flickr30k-pt", **options))
    row = read_rows(tmp_path)["flickr30k-pt", "pt", "image_to_text", "mean_recall"]
    files = [read_records(tmp_path / f"flickr30k-pt-pt-capivara-{run}.json") for run in range(2)]
    key = ("image_to_text", "mean_recall")
    values = [next(r.value for r in records if (r.direction, r.metric) == key) for records in files]
    measured = row["capivara"]["measured"]
    assert measured["runs"] == 2 and measured["mean"] == pytest.approx(100 * np.mean(values))
    assert measured["std"] == pytest.approx(100 * np.std(values, ddof=1)) and measured["std"] > 0
    assert row["baseline"]["measured"]["runs"] == 1 and row["baseline"]["measured"]["std"] is None
    assert row["baseline"]["difference"] == pytest.approx(row["baseline"]["measured"]["mean"] - 87.93)
    assert [m["seed"] for m in read_summary(tmp_path)["models"]] == [None, 41, 42]
    assert f"{measured['mean']:.2f} ± {measured['std']:.2f}" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_benchmarks_without_data_are_not_run_and_never_zero(models, tmp_path, capsys):
    main(make_flags(tmp_path, model=models / "base"))
    summary = read_summary(tmp_path)
    assert len({m["benchmark"] for m in summary["measurements"]}) == 28
    assert {m["status"] for m in summary["measurements"]} == {"not run"}
    assert all(row["capivara"]["measured"] is row["capivara"]["difference"] is None for row in summary["rows"])
    assert not any(row["benchmark"] == "elevater" for row in summary["rows"])
    table = capsys.readouterr().out
    assert "| Food-101 | accuracy | 65.06 ± 0.00 | – |  | 64.58 ± 0.01 | not run |  |" in table
    assert re.search("food-101: not run: .*--data_dir/food-101", table)
    assert "cifar-10: not run: clip-benchmark/wds_vtab-cifar10" in table and "0.00 |  |" not in table
    assert re.search(r"ELEVATER average: .*\b0 of 20\b", table)


@pytest.mark.slow
def test_damaged_data_do_not_end_the_suite(models, data, tmp_path):
    (tmp_path / "xm3600").mkdir()
    (tmp_path / "xm3600" / "metadata.jsonl").write_text('{"file_name": "../../secret"', encoding="utf-8")
    for name in ("not a digit", "nor this"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        make_image(0).save(tmp_path / "mnist" / name / "0.png")
    (tmp_path / "hateful-memes").symlink_to(data / "hateful-memes")
    keys = ["xm3600", "mnist", "hateful-memes"]
    with pytest.raises(SystemExit, match="mnist, xm3600 "):
        main(make_flags(tmp_path / "out", "--only", *keys, model=models / "base", data_dir=tmp_path))
    status = {m["benchmark"]: m for m in read_summary(tmp_path / "out")["measurements"]}
    assert status["hateful-memes"]["status"] == "measured"
    assert status["mnist"]["status"] == "not run" and "not a digit" in status["mnist"]["reason"]
    assert status["xm3600"]["status"] == "not run" and str(tmp_path) not in str(status)


@pytest.mark.slow
def test_an_interrupted_suite_continues_from_the_cache_to_the_same_table(models, data, tmp_path, monkeypatch):
    """The suite uses a file of prompts in the authors' format."""
    digits = ["zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove"]
    names = {"mnist": digits, "hateful-memes": ["meme", "ódio"]}
    templates = {key: ["{}"] for key in names}
    (tmp_path / "prompts.py").write_text(f"class_map = {names}\ntemplate_map = {templates}\n", encoding="utf-8")
    (tmp_path / "data").mkdir()
    for key in names:
        (tmp_path / "data" / key).symlink_to(data / key)  # data may be linked
    options = {"model": models / "base", "data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    options |= {"protocol": "authors", "authors_file": tmp_path / "prompts.py"}
    arguments = make_flags(tmp_path / "out", "--only", "hateful-memes", "mnist", **options)
    main([*arguments, "--cache_dir", "off", "--output", str(tmp_path / "whole")])
    run_measurement = suite.run_measurement

    def measure_and_interrupt(*arguments):
        run_measurement(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite, "run_measurement", measure_and_interrupt)
        main(arguments)
    shard_times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert shard_times and not (tmp_path / "out" / "suite.json").exists()
    main(arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in shard_times.items())
    tables = [(tmp_path / name / "table.md").read_text(encoding="utf-8") for name in ("whole", "out")]
    assert tables[0] == tables[1] and "names and prompts: authors" in tables[0]


@pytest.mark.parametrize(
    ("argument_text", "message"),
    [
        ("papers", "suite.*`papers`.*`paper`"),
        ("paper --only food101", "benchmark.*`food101`.*`food-101`"),
        ("paper --languages ptt", "language.*`ptt`.*`pt`"),
        ("paper --only cifar-10 --languages hi", "--languages.* hi"),
        ("paper --protocol authors", "--authors_file"),
        ("paper --baseline nowhere/at/all", "nowhere"),
        ("paper --model null", "--model MODEL"),
    ],
)
def test_invalid_arguments_are_refused_before_measuring(models, tmp_path, argument_text, message):
    model = [] if "--model" in argument_text else ["--model", str(models / "base")]
    with pytest.raises(ValueError, match=message):
        main([*argument_text.split(), *model, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


PUBLISHED = {"baseline": "baseline", "capivara": "capivara"}  # {role: model whose published figures are shown}


def make_value(benchmark, role: str, run: int, value: float, n: int) -> dict:
    """Make an element of the `values` of `build_suite_rows_and_remarks`."""
    cell = {"benchmark": benchmark.key, "language": "pt", "direction": "", "metric": benchmark.metric}
    return cell | {"role": role, "run": run, "value": value, "n": n}


def test_the_average_needs_all_twenty_datasets_for_every_model():
    average = read_benchmark(BENCHMARKS_FOLDER / "elevater.json")
    pairs, model_counts = [(BENCHMARKS[key], "pt") for key in ELEVATER], {"baseline": 1, "capivara": 2}
    values = []
    for number, (benchmark, _) in enumerate(pairs):
        for role, run in (("baseline", 0), ("capivara", 0), ("capivara", 1)):
            values.append(make_value(benchmark, role, run, (number + run) / 100, 5))
    rows, averages_left_out = build_suite_rows_and_remarks(pairs, values, model_counts, "authors", PUBLISHED)
    assert [row["benchmark"] for row in rows] == [*ELEVATER, average.key] and not averages_left_out
    row = rows[-1]
    assert row["baseline"]["measured"]["mean"] == pytest.approx(9.5) and row["metric"] == "average"
    assert row["capivara"]["measured"] == {"mean": pytest.approx(10.0), "std": pytest.approx(0.5**0.5), "runs": 2}
    assert row["capivara"]["published"] == {"mean": 57.51, "std": 0.02} and row["images"] is None
    assert row["like_for_like"] is all(other["like_for_like"] for other in rows[:-1])
    rows, averages_left_out = build_suite_rows_and_remarks(pairs, values[1:], model_counts, "ours", PUBLISHED)
    assert average.key not in {row["benchmark"] for row in rows}
    assert averages_left_out[0].startswith("ELEVATER average: ")
    row = next(row for row in rows if row["benchmark"] == values[0]["benchmark"])
    assert row[values[0]["role"]]["measured"] is None, "a mean of fewer runs would mislead"
    rows, averages_left_out = build_suite_rows_and_remarks(pairs[:19], values, model_counts, "ours", PUBLISHED)
    assert average.key not in {row["benchmark"] for row in rows} and " 19 of 20 " in averages_left_out[0]


def test_figures_are_like_for_like_only_with_the_published_prompts_and_images():
    """A language without published figures has no difference."""
    cases = [("dtd", "pt", 1880, "authors", True), ("dtd", "pt", 1880, "ours", False)]
    cases += [("dtd", "pt", 1879, "authors", False), ("babel-imagenet", "xh", 3, "ours", True)]
    for key, language, images, protocol, expected in cases:
        values = [make_value(BENCHMARKS[key], "capivara", 0, 0.5, images) | {"language": language}]
        pairs = [(BENCHMARKS[key], language)]
        ((row,), _) = build_suite_rows_and_remarks(pairs, values, {"capivara": 1}, protocol, PUBLISHED)
        assert row["like_for_like"] is expected
        assert row["capivara"]["difference"] == (pytest.approx(50 - 42.34) if key == "dtd" else None)


PROGRAM = """
import sys
from eval import embeddings, suite
embeddings.IMAGES_PER_SHARD, embeddings.TEXTS_PER_SHARD = 4, 10
suite.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_give_the_same_bits_as_one(models, data, tmp_path, monkeypatch):
    """They divide each measurement, here with a damaged image. One of them writes and prints."""
    shutil.copytree(data / "pracegover", tmp_path / "data" / "pracegover")
    (tmp_path / "data" / "mnist").symlink_to(data / "mnist")
    next((tmp_path / "data" / "pracegover").rglob("005.jpg")).write_bytes(b"not an image")
    options = {"model": models / "base", "data_dir": tmp_path / "data", "device": "cpu"}
    arguments = []
    for name in ("one", "two"):
        options["cache_dir"] = tmp_path / f"{name}-cache"
        arguments.append(make_flags(tmp_path / name, "--only", "mnist", "pracegover", **options))
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr("eval.embeddings.IMAGES_PER_SHARD", 4)
        patch.setattr("eval.embeddings.TEXTS_PER_SHARD", 10)
        torch.set_num_threads(1)
        main(arguments[0])
    torch.set_num_threads(threads)
    (tmp_path / "run.py").write_text(PROGRAM, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    process = subprocess.run(
        [sys.executable, *launch, *arguments[1]], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("## The paper's benchmarks") == 1, "only one process prints"
    for file in ("mnist-pt-capivara-0.json", "pracegover-pt-capivara-0.json"):
        assert read_records(tmp_path / "one" / file) == read_records(tmp_path / "two" / file)
    shards = [{path.name: path.read_bytes() for path in (tmp_path / cache).rglob("*.arrow")}
              for cache in ("one-cache", "two-cache")]  # fmt: skip
    assert shards[0] == shards[1] and len(shards[0]) > 6


@pytest.mark.slow
def test_babel_imagenet_uses_the_images_of_imagenet(models, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.classification.load_prompts", load_one_prompt_per_class)
    prompts = load_prompts("imagenet-1k", "babel", language="xh")
    names = [prompts.english_names[index] for index in prompts.class_indices]
    names = [name for name in names if "/" not in name][:3]
    for number, name in enumerate([*names, "tench", "goldfish"]):  # Babel-ImageNet has no Xhosa name for these two
        (tmp_path / "imagenet-1k" / name).mkdir(parents=True)
        make_image(number).save(tmp_path / "imagenet-1k" / name / "0.png")
    selection = ["--only", "babel-imagenet", "--languages", "xh"]
    main(make_flags(tmp_path / "out", *selection, model=models / "base", data_dir=tmp_path))
    record = read_records(tmp_path / "out" / "babel-imagenet-xh-capivara-0.json")[0]
    assert (record.protocol, record.language, record.n) == ("babel", "xh", 3)
