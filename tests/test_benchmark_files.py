"""The JSON files of the benchmarks are complete and have the figures that the model card publishes."""

import pytest
from made_benchmarks import BENCHMARKS, ELEVATER

from capivara_common.files import read_json, write_json
from eval.benchmarks import BENCHMARKS_FOLDER, read_benchmark
from eval.prompts import load_prompts


def test_every_benchmark_is_described():
    assert len(ELEVATER) == 20 and len(BENCHMARKS) == 28
    assert {b.key for b in BENCHMARKS.values() if "beyond" not in b.suite} == {
        *("flickr30k-pt", "coco-pt", "pracegover", "imagenet-1k", *ELEVATER)
    }
    assert all("paper" in benchmark.suite for benchmark in BENCHMARKS.values())
    for benchmark in BENCHMARKS.values():
        assert benchmark.source["local_layout"]
        if benchmark.task == "classification":
            metric = load_prompts(benchmark.prompts).metric
            assert benchmark.metric == {"mean-per-class": "mean_per_class_accuracy"}.get(metric, metric)
        else:
            assert benchmark.metric == "mean_recall"
    assert [BENCHMARKS[key].language for key in ("pracegover", "flickr30k_200")] == ["pt", "por_Latn"]


# Figures of the model card: (baseline, CAPIVARA). Also in the card, fine-tuning makes PraCegoVer worse.
PUBLISHED = {
    ("flickr30k-pt", "text_to_image"): (76.23, 79.56), ("coco-pt", "image_to_text"): (66.55, 71.24),
    ("pracegover", "image_to_text"): (69.43, 64.75), ("caltech-101", ""): (84.53, 82.97),
    ("country211", ""): (17.82, 17.61), ("kitti-distance", ""): (28.41, 33.94),
    ("oxford-iiit-pets", ""): (81.56, 79.37), ("stanford-cars", ""): (84.93, 85.10),
    ("voc-2007-classification", ""): (82.09, 82.29), ("imagenet-1k", ""): (45.84, 46.06),
}  # fmt: skip


def test_published_figures_are_those_of_the_card():
    for (key, direction), means in PUBLISHED.items():
        figures = [BENCHMARKS[key].get_published_figure(model, direction) for model in ("baseline", "capivara")]
        assert tuple(figure["mean"] for figure in figures) == means, key
    assert BENCHMARKS["kitti-distance"].get_published_figure("capivara")["std"] == 0.13
    assert BENCHMARKS["flickr30k-pt"].get_published_figure("capivara_opt", "image_to_text") == {
        "mean": 89.13,
        "std": 0.08,
    }
    assert BENCHMARKS["babel-imagenet"].get_published_figure("baseline") == {"mean": 47.21}
    assert BENCHMARKS["babel-imagenet"].get_published_figure("capivara") is None, "CAPIVARA's authors published none"
    average = read_benchmark(BENCHMARKS_FOLDER / "elevater.json")
    assert average.published["baseline"]["mean"] == 56.97 and average.published["capivara"]["mean"] == 57.51
    # The published average agrees with the twenty published figures.
    for model in ("baseline", "capivara", "capivara_opt"):
        figures = [BENCHMARKS[key].get_published_figure(model)["mean"] for key in ELEVATER]
        assert sum(figures) / 20 == pytest.approx(average.published[model]["mean"], abs=0.006)


def test_a_benchmark_file_with_an_unknown_field_is_refused(tmp_path):
    write_json(tmp_path / "cifar-10.json", read_json(BENCHMARKS_FOLDER / "cifar-10.json") | {"splits": "test"})
    with pytest.raises(ValueError, match=r"cifar-10.json .*'splits'"):
        read_benchmark(tmp_path / "cifar-10.json")
