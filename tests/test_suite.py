"""The suite: every benchmark on made data, and what is said of what was not run."""

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
from made_benchmarks import BENCHMARKS, ELEVATER, IMAGES, make_data, make_readable, make_releases, picture
from tiny import randomise, save_model
from towers import gemma_like, siglip2

from capivara_common.files import read_json
from eval import suite
from eval.benchmarks import BENCHMARKS_FOLDER, read_benchmark
from eval.prompts import load_prompts
from eval.records.schema import read_records
from eval.suite import build_suite_rows, main
from modeling_capivara.loading import load_model


def flags(output, *more, **options) -> list[str]:
    values = {"output": output, **options}
    return ["paper", *(part for key, value in values.items() for part in (f"--{key}", str(value))), *more]


def summary_of(output: Path) -> dict:
    return read_json(output / "suite.json")


def rows_of(output: Path) -> dict[tuple, dict]:
    return {(r["benchmark"], r["language"], r["direction"], r["metric"]): r for r in summary_of(output)["rows"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_processor) -> Path:
    """Tiny models with weights of their own: `base`, and a folder of two `runs`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "runs/seed-1", "runs/seed-2")):
        save_model(folder / name, tiny_processor, seed)
        (folder / name / "run.json").write_text(json.dumps({"seed": 40 + seed}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Data of some benchmarks, each under its key; those that are released as files are made readable as docs say."""
    folder = tmp_path_factory.mktemp("benchmarks")
    make_releases(folder)
    make_readable(folder)
    for key in ("mnist", "hateful-memes", "flickr30k-pt"):
        make_data(folder / key, key)
    return folder


@pytest.mark.slow
def test_every_benchmark_on_its_layout(models, data, tmp_path, capsys, monkeypatch):
    """By one template of each class: embedding all would take most of the time."""
    few = lambda prompts: replace(prompts, class_prompts=[filled[:1] for filled in prompts.class_prompts])  # noqa: E731
    monkeypatch.setattr("eval.classification.load_prompts", lambda *words: few(load_prompts(*words)))
    keys = [key for key in BENCHMARKS if key != "babel-imagenet"]  # has a test of its own
    for key in keys:
        if not BENCHMARKS[key].data_of and not (data / key).exists():
            make_data(data / key, key)
    main(flags(tmp_path, "--only", *keys, model=models / "base", data_dir=data))
    summary, rows = summary_of(tmp_path), rows_of(tmp_path)
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
    assert "not like for like" in table and "Beyond the paper" in table
    assert "| ELEVATER average | average |" in table and str(data) not in table + str(summary)


def test_languages_of_what_is_named(models, data, tmp_path):
    """A benchmark that is named is run or listed, also where it has none of the languages; no other is heard of."""
    more = ["--only", "xm3600-first", "flickr30k_200", "--languages", "pt", "hi"]
    main(flags(tmp_path, *more, model=models / "base", data_dir=data))
    rows, measurements = rows_of(tmp_path), summary_of(tmp_path)["measurements"]
    assert {(m["benchmark"], m["language"], m["status"]) for m in measurements} == {
        *(("xm3600-first", code, "measured") for code in ("pt", "hi")), ("flickr30k_200", "por_Latn", "not run"),
    }  # fmt: skip
    assert rows["xm3600-first", "pt", "text_to_image", "mean_recall"]["baseline"]["published"] == {"mean": 73.02}
    assert rows["xm3600-first", "hi", "text_to_image", "mean_recall"]["baseline"]["published"] is None


def test_figures_of_another_base_are_its_own(models, data, tmp_path, capsys):
    """Of SigLIP 2 by its name, as the baseline or as the base that run.json names; CAPIVARA's are not beside it."""
    base = tmp_path / "google" / "siglip2-base-patch16-224"
    siglip2(base, gemma_like(["um gato azul", "a casa"] * 3, 320))
    shutil.copytree(base, tmp_path / "run")
    weights = load_model(base)
    randomise(weights, 1).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"seed": 0, "config": {"model": str(base)}}))
    for name, more in {"alone": {}, "beside": {"baseline": base}}.items():
        only = ["--only", "xm3600-first", "mnist", "--languages", "pt"]
        main(flags(tmp_path / name, *only, model=tmp_path / "run", data_dir=data, **more))
        rows = rows_of(tmp_path / name)
        row = rows["xm3600-first", "pt", "text_to_image", "mean_recall"]
        assert row["baseline"]["published"] == {"mean": 77.54} and row["capivara"]["published"] is None
        assert (row["baseline"]["difference"] is None) == (name == "alone")
        assert not rows["mnist", "pt", "", "accuracy"]["baseline"]["published"]
    table = capsys.readouterr().out
    assert "| 77.54 |" in table and "Immich's page on searching" in table and "SiglipModel, sigmoid loss" in table


def test_mean_and_deviation_over_a_folder_of_runs(models, data, tmp_path):
    runs, more = models / "runs", ["--only", "flickr30k-pt"]
    given = {"runs": runs, "baseline": models / "base", "data_dir": data}
    main(flags(tmp_path, *more, model=runs / "seed-1", **given))  # --model is one of --runs
    row = rows_of(tmp_path)["flickr30k-pt", "pt", "image_to_text", "mean_recall"]
    files = [read_records(tmp_path / f"flickr30k-pt-pt-capivara-{run}.json") for run in range(2)]
    place = ("image_to_text", "mean_recall")
    values = [next(r.value for r in records if (r.direction, r.metric) == place) for records in files]
    measured = row["capivara"]["measured"]
    assert measured["runs"] == 2 and measured["mean"] == pytest.approx(100 * np.mean(values))
    assert measured["std"] == pytest.approx(100 * np.std(values, ddof=1)) and measured["std"] > 0
    assert row["baseline"]["measured"]["runs"] == 1 and row["baseline"]["measured"]["std"] is None
    assert row["baseline"]["difference"] == pytest.approx(row["baseline"]["measured"]["mean"] - 87.93)
    assert [m["seed"] for m in summary_of(tmp_path)["models"]] == [None, 41, 42]
    assert f"{measured['mean']:.2f} ± {measured['std']:.2f}" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_what_is_not_reached_is_not_run_and_never_zero(models, tmp_path, capsys):
    main(flags(tmp_path, model=models / "base"))
    summary = summary_of(tmp_path)
    assert len({m["benchmark"] for m in summary["measurements"]}) == 28
    assert {m["status"] for m in summary["measurements"]} == {"not run"}
    assert all(row["capivara"]["measured"] is row["capivara"]["difference"] is None for row in summary["rows"])
    assert not any(row["benchmark"] == "elevater" for row in summary["rows"])
    table = capsys.readouterr().out
    assert "| Food-101 | accuracy | 65.06 ± 0.00 | – |  | 64.58 ± 0.01 | not run |  |" in table
    assert "food-101: not run: no local data, and no Hub id is known; put them into --data_dir as food-101" in table
    assert "cifar-10: not run: clip-benchmark/wds_vtab-cifar10 is no path here" in table and "0.00 |  |" not in table
    assert "ELEVATER average: left out, since 0 of its 20 sets ran" in table


def test_a_broken_folder_does_not_end_the_suite(models, data, tmp_path):
    (tmp_path / "xm3600").mkdir()
    (tmp_path / "xm3600" / "metadata.jsonl").write_text('{"file_name": "../../secret"', encoding="utf-8")
    for name in ("no digit", "nor this"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "mnist" / name / "0.png")
    (tmp_path / "hateful-memes").symlink_to(data / "hateful-memes")
    keys = ["xm3600", "mnist", "hateful-memes"]
    with pytest.raises(SystemExit, match="mnist, xm3600 could not be measured although data were given"):
        main(flags(tmp_path / "out", "--only", *keys, model=models / "base", data_dir=tmp_path))
    status = {m["benchmark"]: m for m in summary_of(tmp_path / "out")["measurements"]}
    assert status["hateful-memes"]["status"] == "measured"
    assert status["mnist"]["status"] == "not run" and "don't match by name" in status["mnist"]["reason"]
    assert status["xm3600"]["status"] == "not run" and str(tmp_path) not in str(status)


def test_a_suite_that_was_stopped_continues_to_the_same_table(models, data, tmp_path, monkeypatch):
    """What was embedded is taken from the cache, and no file of it is made again. By the authors' prompts."""
    digits = ["zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove"]
    names = {"mnist": digits, "hateful-memes": ["meme", "ódio"]}
    templates = {key: ["{}"] for key in names}
    (tmp_path / "prompts.py").write_text(f"class_map = {names}\ntemplate_map = {templates}\n", encoding="utf-8")
    (tmp_path / "data").mkdir()
    for key in names:
        (tmp_path / "data" / key).symlink_to(data / key)  # a link serves
    given = {"model": models / "base", "data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    given |= {"protocol": "authors", "authors_file": tmp_path / "prompts.py"}
    given = flags(tmp_path / "out", "--only", "hateful-memes", "mnist", **given)
    main([*given, "--cache_dir", "off", "--output", str(tmp_path / "whole")])
    measure = suite.run_measurement

    def measure_and_stop(*arguments):
        measure(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite, "run_measurement", measure_and_stop)
        main(given)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert kept and not (tmp_path / "out" / "suite.json").exists()
    main(given)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    tables = [(tmp_path / name / "table.md").read_text(encoding="utf-8") for name in ("whole", "out")]
    assert tables[0] == tables[1] and "Names and prompts: authors" in tables[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("papers", "Unknown suite: `papers`. Did you mean `paper`?"),
        ("paper --only food101", "Unknown benchmark: `food101`. Did you mean `food-101`? There are "),
        ("paper --data cifar10=.", "`--data` is gone: put the data, or a link to them, into --data_dir"),
        ("paper --languages ptt", "Unknown language: `ptt`. Did you mean `pt`?"),
        ("paper --only cifar-10 --languages hi", "None of the benchmarks has one of the languages"),
        ("paper --protocol authors", "needs --authors_file"),
        ("paper --baseline nowhere/at/all", "nowhere"),
        ("paper --model null", "No model is given"),
    ],
)
def test_slips_end_early(models, tmp_path, words, message):
    model = [] if "--model" in words else ["--model", str(models / "base")]
    with pytest.raises(ValueError, match=re.escape(message)):
        main([*words.split(), *model, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def measured(benchmark, role: str, run: int, value: float, n: int) -> dict:
    place = {"benchmark": benchmark.key, "language": "pt", "direction": "", "metric": benchmark.metric}
    return place | {"role": role, "run": run, "value": value, "n": n}


def test_the_average_needs_all_twenty_of_every_model():
    average = read_benchmark(BENCHMARKS_FOLDER / "elevater.json")
    pairs, runs = [(BENCHMARKS[key], "pt") for key in ELEVATER], {"baseline": 1, "capivara": 2}
    of_runs = [(role, run) for role, number in runs.items() for run in range(number)]
    values = [measured(b, *one, (place + one[1]) / 100, 5) for place, (b, _) in enumerate(pairs) for one in of_runs]
    rows, left_out = build_suite_rows(pairs, values, runs, protocol="authors")
    assert [row["benchmark"] for row in rows] == [*ELEVATER, average.key] and not left_out
    row = rows[-1]
    assert row["baseline"]["measured"]["mean"] == pytest.approx(9.5) and row["metric"] == "average"
    assert row["capivara"]["measured"] == {"mean": pytest.approx(10.0), "std": pytest.approx(0.5**0.5), "runs": 2}
    assert row["capivara"]["published"] == {"mean": 57.51, "std": 0.02} and row["images"] is None
    assert row["like_for_like"] is all(other["like_for_like"] for other in rows[:-1])
    rows, left_out = build_suite_rows(pairs, values[1:], runs)
    assert average.key not in {row["benchmark"] for row in rows} and left_out[0].startswith("ELEVATER average: left")
    row = next(row for row in rows if row["benchmark"] == values[0]["benchmark"])
    assert row[values[0]["role"]]["measured"] is None, "a mean of fewer runs would mislead"
    rows, left_out = build_suite_rows(pairs[:19], values, runs)
    assert average.key not in {row["benchmark"] for row in rows} and "since 19 of its 20 sets ran" in left_out[0]


def test_what_is_like_for_like():
    """Of names and prompts as they were published, on as many images; a language that was not published has none."""
    cases = [("dtd", "pt", 1880, "authors", True), ("dtd", "pt", 1880, "ours", False)]
    cases += [("dtd", "pt", 1879, "authors", False), ("babel-imagenet", "xh", 3, "ours", True)]
    for key, language, images, protocol, expected in cases:
        values = [measured(BENCHMARKS[key], "capivara", 0, 0.5, images) | {"language": language}]
        ((row,), _) = build_suite_rows([(BENCHMARKS[key], language)], values, {"capivara": 1}, protocol=protocol)
        assert row["like_for_like"] is expected
        assert row["capivara"]["difference"] == (pytest.approx(50 - 42.34) if key == "dtd" else None)


PROGRAM = """
import sys
from eval import embeddings, suite
embeddings.IMAGES_PER_SHARD, embeddings.TEXTS_PER_SHARD = 4, 10
suite.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(models, data, tmp_path, monkeypatch):
    """They share a task out between them, a bad picture in it; one of them writes and prints."""
    shutil.copytree(data / "pracegover", tmp_path / "data" / "pracegover")
    (tmp_path / "data" / "mnist").symlink_to(data / "mnist")
    next((tmp_path / "data" / "pracegover").rglob("005.jpg")).write_bytes(b"no picture")
    names = {"model": models / "base", "data_dir": tmp_path / "data", "device": "cpu"}
    given = [flags(tmp_path / name, "--only", "mnist", "pracegover", cache_dir=tmp_path / f"{name}-cache", **names)
             for name in ("one", "two")]  # fmt: skip
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr("eval.embeddings.IMAGES_PER_SHARD", 4)
        patch.setattr("eval.embeddings.TEXTS_PER_SHARD", 10)
        torch.set_num_threads(1)
        main(given[0])
    torch.set_num_threads(threads)
    (tmp_path / "run.py").write_text(PROGRAM, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    done = subprocess.run(
        [sys.executable, *launch, *given[1]], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("## The paper's benchmarks") == 1, "one process prints"
    for file in ("mnist-pt-capivara-0.json", "pracegover-pt-capivara-0.json"):
        assert read_records(tmp_path / "one" / file) == read_records(tmp_path / "two" / file)
    shards = [{path.name: path.read_bytes() for path in (tmp_path / cache).rglob("*.arrow")}
              for cache in ("one-cache", "two-cache")]  # fmt: skip
    assert shards[0] == shards[1] and len(shards[0]) > 6


@pytest.mark.slow
def test_babel_takes_the_images_of_imagenet(models, tmp_path, monkeypatch):
    few = lambda prompts: replace(prompts, class_prompts=[filled[:1] for filled in prompts.class_prompts])  # noqa: E731
    monkeypatch.setattr("eval.classification.load_prompts", lambda *words: few(load_prompts(*words)))
    prompts = load_prompts("imagenet-1k", "babel", language="xh")
    known = [name for place in prompts.class_indices if "/" not in (name := prompts.english_names[place])][:3]
    for number, name in enumerate([*known, "tench", "goldfish"]):  # which Xhosa has no names for
        (tmp_path / "imagenet-1k" / name).mkdir(parents=True)
        picture(number).save(tmp_path / "imagenet-1k" / name / "0.png")
    given = ["--only", "babel-imagenet", "--languages", "xh"]
    main(flags(tmp_path / "out", *given, model=models / "base", data_dir=tmp_path))
    record = read_records(tmp_path / "out" / "babel-imagenet-xh-capivara-0.json")[0]
    assert (record.protocol, record.language, record.n) == ("babel", "xh", 3)
