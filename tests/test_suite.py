"""The suite: every benchmark on made data, and what is said of what was not run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caption_tars import encoded, write_tar
from made_benchmarks import BENCHMARKS, ELEVATER, IMAGES, make_data, make_readable, make_releases, picture
from tiny import randomise, tiny_config

from capivara_common.files import read_json
from eval.benchmarks import FOLDER, locate, read_benchmark
from eval.prompts import load_prompts
from eval.records.schema import read_records
from eval.suite import main, suite_rows
from modeling_capivara import CapivaraModel


def flags(model, output, *more, **options) -> list[str]:
    values = {"model": model, "output": output, **options}
    return ["paper", *(part for key, value in values.items() for part in (f"--{key}", str(value))), *more]


def summary_of(output: Path) -> dict:
    return read_json(output / "suite.json")


def rows_of(output: Path) -> dict[tuple, dict]:
    return {(r["benchmark"], r["language"], r["direction"], r["metric"]): r for r in summary_of(output)["rows"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_processor) -> list[str]:
    """Four tiny models with weights of their own; the last three stand for runs."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        randomise(CapivaraModel(tiny_config()), seed).save_pretrained(folder / str(seed))
        tiny_processor.save_pretrained(folder / str(seed))
        (folder / str(seed) / "run.json").write_text(json.dumps({"seed": 40 + seed}), encoding="utf-8")
    return [str(folder / str(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Data of every benchmark that has its own, each under its key."""
    folder = tmp_path_factory.mktemp("benchmarks")
    make_releases(folder)
    make_readable(folder)
    for key, benchmark in BENCHMARKS.items():
        if not benchmark.data_of and not (folder / key).exists():
            make_data(folder / key, key)
    return folder


FAST = ["flickr30k-pt", "pracegover", "mnist", "hateful-memes", "voc-2007-classification", "flickr30k_200"]


@pytest.mark.slow
def test_benchmarks_of_every_kind(models, data, tmp_path, capsys):
    main(flags(models[0], tmp_path, "--only", *FAST, data_dir=data))
    rows = rows_of(tmp_path)
    assert {key for key, *_ in rows} == set(FAST)
    assert all(0 <= row["capivara"]["measured"]["mean"] <= 100 for row in rows.values())
    assert {code for key, code, *_ in rows if key == "flickr30k_200"} == {"por_Latn", "hin_Deva", "xho_Latn"}
    metrics = {key: metric for key, *_, metric in rows}
    assert (metrics["voc-2007-classification"], metrics["hateful-memes"]) == ("11point_mAP", "roc_auc")
    records = {
        r.direction: r for r in read_records(tmp_path / "pracegover-pt-capivara-0.json") if r.metric == "mean_recall"
    }
    row = rows["pracegover", "pt", "text_to_image", "mean_recall"]["capivara"]
    assert row["measured"]["mean"] == pytest.approx(100 * records["text_to_image"].value)
    assert row["difference"] == pytest.approx(100 * records["text_to_image"].value - 66.40)
    assert records["text_to_image"].n == IMAGES and records["text_to_image"].seed == 40
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "65.36" in table and "66.40 ± 0.01" in table
    assert "not like for like" in table and "Beyond the paper" in table
    assert str(data) not in table + str(summary_of(tmp_path))


def test_protocols_of_xm3600(models, data, tmp_path):
    more = ["--only", "xm3600", "xm3600-first", "--languages", "pt", "hi"]
    main(flags(models[0], tmp_path, *more, data_dir=data))
    rows = rows_of(tmp_path)
    assert {(key, code) for key, code, *_ in rows} == {(k, c) for k in ("xm3600", "xm3600-first") for c in ("pt", "hi")}
    counts = {key: read_records(tmp_path / f"{key}-pt-capivara-0.json")[0].n for key in ("xm3600", "xm3600-first")}
    assert counts == {"xm3600": 2 * IMAGES, "xm3600-first": IMAGES}
    assert rows["xm3600-first", "pt", "text_to_image", "mean_recall"]["baseline"]["published"] == {"mean": 73.02}
    assert rows["xm3600-first", "hi", "text_to_image", "mean_recall"]["baseline"]["published"] is None
    assert rows["xm3600", "hi", "image_to_text", "mean_recall"]["capivara"]["published"] is None


@pytest.mark.slow
def test_babel_takes_the_images_of_imagenet(models, tmp_path):
    prompts = load_prompts("imagenet-1k", "babel", language="xh")
    names = [prompts.names_en[place] for place in prompts.indices]
    for number, name in enumerate([*names[:3], "tench", "goldfish"]):
        (tmp_path / "data" / "imagenet-1k" / name.replace("/", "-")).mkdir(parents=True)
        picture(number).save(tmp_path / "data" / "imagenet-1k" / name / "0.png")
    more = ["--only", "babel-imagenet", "--languages", "xh"]
    main(flags(models[0], tmp_path / "out", *more, data_dir=tmp_path / "data"))
    (record, *_) = read_records(tmp_path / "out" / "babel-imagenet-xh-capivara-0.json")
    assert record.protocol == "babel" and record.language == "xh"
    assert record.n == sum(name in names for name in [*names[:3], "tench", "goldfish"])
    (row,) = rows_of(tmp_path / "out").values()
    assert row["like_for_like"], "its names and prompts are those of the published figure"
    assert row["capivara"]["published"] is None, "that is in Portuguese"


@pytest.mark.slow
def test_every_benchmark_on_its_layout(models, data, tmp_path):
    keys = [key for key in BENCHMARKS if key != "babel-imagenet"]  # has a test of its own
    main(flags(models[0], tmp_path, "--only", *keys, data_dir=data))
    summary = summary_of(tmp_path)
    assert {m["status"] for m in summary["measurements"]} == {"measured"}
    assert {m["benchmark"] for m in summary["measurements"]} == set(keys)
    rows = rows_of(tmp_path)
    figures = [rows[key, "pt", "", BENCHMARKS[key].metric]["capivara"]["measured"]["mean"] for key in ELEVATER]
    average = rows["elevater", "pt", "", "average"]["capivara"]
    assert average["measured"]["mean"] == pytest.approx(sum(figures) / 20)
    assert average["published"] == {"mean": 57.51, "std": 0.02}
    assert "| ELEVATER average | average |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_clip_benchmark_copy(models, tmp_path):
    """WebDataset tars of images and `cls`, and the names of the classes in another order than ours."""
    names = sorted(load_prompts("cifar-10").names_en, reverse=True)
    members = []
    for number in range(4):
        data = encoded(picture(number), "WEBP", lossless=True)
        members += [(f"s{number:07d}.webp", data), (f"s{number:07d}.cls", str(number).encode())]
    write_tar(tmp_path / "cifar-10" / "test" / "0.tar", members)
    (tmp_path / "cifar-10" / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    main(flags(models[0], tmp_path / "out", "--only", "cifar-10", data_dir=tmp_path))
    matrix = np.array(read_json(tmp_path / "out" / "cifar-10-pt-capivara-0.json")["confusion_matrix"])
    ours = load_prompts("cifar-10").names_en
    assert sorted(np.flatnonzero(matrix.sum(axis=1))) == sorted(ours.index(name) for name in names[:4])


@pytest.mark.slow
def test_mean_and_deviation_over_runs(models, data, tmp_path):
    more = ["--runs", *models[1:], "--only", "mnist", "flickr30k-pt"]
    main(flags(models[1], tmp_path, *more, baseline=models[0], data_dir=data))  # --model is one of --runs
    row = rows_of(tmp_path)["flickr30k-pt", "pt", "text_to_image", "mean_recall"]
    values = [
        next(
            r.value
            for r in read_records(tmp_path / f"flickr30k-pt-pt-capivara-{run}.json")
            if r.metric == "mean_recall"
        )
        for run in range(3)
    ]
    measured = row["capivara"]["measured"]
    assert measured["runs"] == 3 and measured["mean"] == pytest.approx(100 * np.mean(values))
    assert measured["std"] == pytest.approx(100 * np.std(values, ddof=1)) and measured["std"] > 0
    assert row["baseline"]["measured"]["runs"] == 1 and row["baseline"]["measured"]["std"] is None
    assert row["baseline"]["difference"] == pytest.approx(row["baseline"]["measured"]["mean"] - 76.23)
    assert [m["seed"] for m in summary_of(tmp_path)["models"]] == [None, 41, 42, 43]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"{measured['mean']:.2f} ± {measured['std']:.2f}" in table
    copy = shutil.copytree(models[2], tmp_path / "copy")
    with pytest.raises(SystemExit, match="Two of --runs hold the same model"):
        main(flags(models[1], tmp_path / "other", "--runs", *models[1:], str(copy), data_dir=data))


def test_a_folder_of_runs(models, data, tmp_path):
    for seed in (1, 2):
        shutil.copytree(models[seed], tmp_path / "runs" / f"seed-{seed}")
    given = ["paper", "--runs", tmp_path / "runs", "--output", tmp_path / "out", "--only", "mnist", "--data_dir", data]
    main(list(map(str, given)))
    assert rows_of(tmp_path / "out")["mnist", "pt", "", "accuracy"]["capivara"]["measured"]["runs"] == 2


def test_what_is_not_reached_is_not_run_and_never_zero(models, tmp_path, capsys):
    main(["paper", "--model", models[0], "--output", str(tmp_path)])
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


def test_a_benchmark_that_is_named_is_run_or_listed(models, data, tmp_path, capsys):
    """Also where it has none of the languages; one that nobody named is not heard of."""
    more = ["--only", "mnist", "xm3600", "--languages", "es", "hi"]
    main(flags(models[0], tmp_path, *more, data_dir=data))
    found = {(m["benchmark"], m["language"]): m["status"] for m in summary_of(tmp_path)["measurements"]}
    assert found == {("mnist", "pt"): "not run", ("xm3600", "es"): "measured", ("xm3600", "hi"): "measured"}
    assert "mnist: not run: it is in pt, and --languages asks for es hi." in capsys.readouterr().out


def test_a_hub_in_offline_mode(models, tmp_path):
    """Its cache is asked, and what it lacks is not run."""
    main(["paper", "--model", models[0], "--output", str(tmp_path), "--only", "cifar-10", "flickr30k-pt"])
    for measurement in summary_of(tmp_path)["measurements"]:
        assert measurement["status"] == "not run" and "can't be loaded" in measurement["reason"]


def test_a_broken_folder_does_not_end_the_suite(models, data, tmp_path):
    (tmp_path / "xm3600").mkdir()
    (tmp_path / "xm3600" / "metadata.jsonl").write_text('{"file_name": "../../secret"', encoding="utf-8")
    for name in ("no digit", "nor this"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "mnist" / name / "0.png")
    (tmp_path / "hateful-memes").symlink_to(data / "hateful-memes")  # a link serves
    with pytest.raises(SystemExit, match="mnist, xm3600 could not be measured although data were given"):
        main(flags(models[0], tmp_path / "out", "--only", "xm3600", "mnist", "hateful-memes", data_dir=tmp_path))
    status = {m["benchmark"]: m for m in summary_of(tmp_path / "out")["measurements"]}
    assert status["hateful-memes"]["status"] == "measured"
    assert status["mnist"]["status"] == "not run" and "don't match by name" in status["mnist"]["reason"]
    assert status["xm3600"]["status"] == "not run" and str(tmp_path) not in str(status)


@pytest.mark.slow
def test_a_killed_suite_continues_to_the_same_table(models, data, tmp_path):
    """What was embedded before SIGKILL is taken from the cache, and no file of it is made again."""
    cache, only = tmp_path / "cache", ["--only", "hateful-memes", "mnist"]
    main(flags(models[0], tmp_path / "whole", *only, data_dir=data, cache_dir="off"))
    program = (
        "import os, signal, sys\nfrom eval import suite\nmeasure = suite.measure\n"
        "def measure_and_die(*arguments):\n"
        "    measure(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "suite.measure = measure_and_die\nsuite.main(sys.argv[1:])\n"
    )
    given = flags(models[0], tmp_path / "out", *only, data_dir=data, cache_dir=cache)
    killed = subprocess.run([sys.executable, "-c", program, *given], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert kept and not (tmp_path / "out" / "suite.json").exists()
    main(given)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    tables = [(tmp_path / name / "table.md").read_text(encoding="utf-8") for name in ("whole", "out")]
    assert tables[0] == tables[1]


def test_a_result_is_of_the_data_that_are_there(models, data, tmp_path):
    images = shutil.copytree(data / "mnist", tmp_path / "mnist")
    given = flags(models[0], tmp_path / "out", "--only", "mnist", data_dir=tmp_path)
    fingerprints = []
    for _ in range(2):
        main(given)
        fingerprints.append(read_json(tmp_path / "out" / "mnist-pt-capivara-0.json")["dataset_fingerprint"])
        picture(77).save(next(images.glob("*/0.png")))
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "food101"], "Unknown benchmark: `food101`. Did you mean `food-101`? There are "),
        (["--data", "cifar10=."], "`--data` is gone: put the data, or a link to them, into --data_dir"),
        (["--data_dir", "nowhere"], "--data_dir nowhere is no folder"),
        (["--languages", "ptt"], "Unknown language: `ptt`. Did you mean `pt`?"),
        (["--only", "cifar-10", "--languages", "hi"], "None of the benchmarks has one of the languages"),
        (["--protocol", "authors"], "needs --authors_file"),
        (["--baseline", "nowhere/at/all"], "nowhere"),
    ],
)
def test_slips_end_early(models, tmp_path, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(flags(models[0], tmp_path / "out", *more))
    assert message in str(stopped.value) and not (tmp_path / "out").exists()


def test_a_suite_or_model_that_is_missing(models, tmp_path):
    with pytest.raises(SystemExit, match=r"Unknown suite: `papers`. Did you mean `paper`\?"):
        main(["papers", "--model", models[0]])
    with pytest.raises(SystemExit, match="No model is given"):
        main(["paper", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="nowhere"):
        main(["paper", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path)])


def measured(benchmark, role: str, run: int, value: float, n: int) -> dict:
    place = {"benchmark": benchmark.key, "language": "pt", "direction": "", "metric": benchmark.metric}
    return place | {"role": role, "run": run, "value": value, "n": n}


def test_the_average_needs_all_twenty_of_every_model():
    average = read_benchmark(FOLDER / "elevater.json")
    pairs = [(BENCHMARKS[key], "pt") for key in ELEVATER]
    values = [
        measured(b, role, run, (place + run) / 100, 5)
        for place, (b, _) in enumerate(pairs)
        for role, run in (("baseline", 0), ("capivara", 0), ("capivara", 1))
    ]
    runs = {"baseline": 1, "capivara": 2}
    rows, left_out = suite_rows(pairs, values, runs, protocol="authors")
    assert [row["benchmark"] for row in rows] == [*ELEVATER, average.key] and not left_out
    row = rows[-1]
    assert row["baseline"]["measured"]["mean"] == pytest.approx(9.5) and row["metric"] == "average"
    assert row["capivara"]["measured"] == {"mean": pytest.approx(10.0), "std": pytest.approx(0.5**0.5), "runs": 2}
    assert row["capivara"]["published"] == {"mean": 57.51, "std": 0.02} and row["images"] is None
    assert row["like_for_like"] is all(other["like_for_like"] for other in rows[:-1])
    for missing in (values[0], values[-1]):
        rows, left_out = suite_rows(pairs, [value for value in values if value is not missing], runs)
        assert average.key not in {row["benchmark"] for row in rows}
        assert left_out[0].startswith("ELEVATER average: left out, since ")
        (row,) = [row for row in rows if row["benchmark"] == missing["benchmark"]]
        assert row[missing["role"]]["measured"] is None, "a mean of fewer runs would mislead"
    rows, left_out = suite_rows(pairs[:19], values, runs)
    assert average.key not in {row["benchmark"] for row in rows} and "since 19 of its 20 sets ran" in left_out[0]


def test_what_is_like_for_like():
    """Only the authors' prompts on as many images as were published compare with the published figure."""
    pair = [(BENCHMARKS["dtd"], "pt")]
    for images, protocol, expected in ((1880, "authors", True), (1880, "ours", False), (1879, "authors", False)):
        values = [measured(BENCHMARKS["dtd"], "capivara", 0, 0.5, images)]
        ((row,), _) = suite_rows(pair, values, {"capivara": 1}, protocol=protocol)
        assert row["like_for_like"] is expected and row["capivara"]["difference"] == pytest.approx(50 - 42.34)


def test_the_authors_protocol(models, data, tmp_path):
    text = (
        "c = ['zero', 'um', 'dois', 'três', 'quatro', 'cinco', 'seis', 'sete', 'oito', 'nove']\nt = ['o número {}.']\n"
    )
    text += "class_map = {'mnist': c}\ntemplate_map = {'mnist': t}\n"
    (tmp_path / "prompts.py").write_text(text, encoding="utf-8")
    more = ["--only", "mnist", "--protocol", "authors", "--authors_file", str(tmp_path / "prompts.py")]
    main(flags(models[0], tmp_path / "out", *more, data_dir=data))
    assert read_records(tmp_path / "out" / "mnist-pt-capivara-0.json")[0].protocol == "authors"
    assert "Names and prompts: authors" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(models, data, tmp_path):
    """They share a task out between them; one of them writes."""
    given = ["--only", "mnist", "pracegover"]
    main(flags(models[0], tmp_path / "one", *given, data_dir=data, cache_dir="off"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "eval.suite",
    ]
    command += flags(models[0], tmp_path / "two", *given, data_dir=data, cache_dir="off", device="cpu")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    tables = [(tmp_path / name / "table.md").read_text(encoding="utf-8") for name in ("one", "two")]
    assert tables[0] == tables[1] and done.stdout.count("## The paper's benchmarks") == 1


def test_where_data_are_looked_for(tmp_path):
    for key in ("imagenet-1k", "cifar-10"):
        (tmp_path / key).mkdir()

    def place(key):
        found = locate(BENCHMARKS[key], tmp_path)
        return found["data"], found["local"], found["reason"]

    assert place("cifar-10") == (str(tmp_path / "cifar-10"), True, "")
    assert place("babel-imagenet") == (str(tmp_path / "imagenet-1k"), True, "")
    assert place("gtsrb") == ("clip-benchmark/wds_gtsrb", False, "")
    assert "no Hub id is known; put them into --data_dir as food-101" in place("food-101")[2]
