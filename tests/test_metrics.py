"""Metrics, and the `evaluate` module, agree with hand-counted cases, plain implementations and scikit-learn."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from eval.capivara_metrics import metrics
from eval.capivara_metrics.metrics import (
    chance_recall,
    compute_ranks_from_embeddings,
    confusion_matrix,
    cross_modal_ranks,
    eleven_point_map,
    mean_hits,
    mean_per_class_accuracy,
    mean_recall,
    median_rank,
    paired_bootstrap,
    per_class_accuracy,
    ranks_from_scores,
    recall_at_k,
    roc_auc,
    top_k_accuracy,
)

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(200, 7, generator=GENERATOR)
LABELS = torch.randint(7, (200,), generator=GENERATOR)
TARGETS = (torch.rand(200, 7, generator=GENERATOR) < 0.2).long()
TIED = torch.randint(4, (200,), generator=GENERATOR).float()  # four distinct values, so there are many ties


def random_embeddings(rows: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def set_block_size(monkeypatch):
    """Set the number of queries in a block of scores."""
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 0)
    return lambda size: monkeypatch.setattr(metrics, "MIN_BLOCK_QUERIES", size)


def test_ranks_equal_hand_counted_ones():
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # For query 0, item 0 (1.0) beats the relevant item 2 (0.6). The relevant item is the best for query 1 and the worst
    # for query 2.
    ranks = compute_ranks_from_embeddings(queries, items, torch.tensor([2, 1, 0]), torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1, 0, 2]
    assert recall_at_k(ranks, 1) == pytest.approx(1 / 3)
    assert recall_at_k(ranks, 2) == pytest.approx(2 / 3)
    tied = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = compute_ranks_from_embeddings(tied[:1], tied, torch.tensor([0]), torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1], "a tie counts against the query"


def test_mean_recall_averages_recall_at_1_5_and_10():
    ranks = torch.tensor([0, 3, 7, 20])
    assert mean_recall(ranks) == pytest.approx((1 / 4 + 2 / 4 + 3 / 4) / 3)
    assert mean_hits(ranks).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_chance_recall_equals_the_recall_of_random_scores():
    query_groups, item_groups = torch.arange(40), torch.arange(40).repeat_interleave(3)
    hits = []
    for seed in range(60):
        queries, items = random_embeddings(40, 16, seed), random_embeddings(120, 16, 1000 + seed)
        ranks = compute_ranks_from_embeddings(queries, items, query_groups, item_groups)
        hits.append(recall_at_k(ranks, 5))
    assert sum(hits) / len(hits) == pytest.approx(chance_recall(query_groups, item_groups, 5), abs=0.02)
    assert chance_recall(torch.arange(4), torch.arange(4), 1) == pytest.approx(1 / 4)
    assert chance_recall(torch.arange(4), torch.arange(4), 10) == 1


def test_bootstrap_interval_of_many_samples_is_the_normal_interval():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(200, generator=generator)
    after = before + 0.1 + 0.3 * torch.randn(200, generator=generator)
    gain, low, high = paired_bootstrap(before, after, torch.arange(200))
    standard_error = (after - before).std().item() / math.sqrt(200)
    assert gain == pytest.approx((after - before).mean().item())
    assert low == pytest.approx(gain - 1.96 * standard_error, abs=0.005)
    assert high == pytest.approx(gain + 1.96 * standard_error, abs=0.005)


def test_bootstrap_draws_whole_groups():
    """Ten copies of each query carry no further information, so the interval must not shrink."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    single = paired_bootstrap(torch.zeros(50), values, torch.arange(50))
    copies = paired_bootstrap(torch.zeros(500), values.repeat_interleave(10), torch.arange(50).repeat_interleave(10))
    assert copies == pytest.approx(single)


@pytest.mark.parametrize("block_size", [1, 7, 100])
def test_ranks_of_both_directions_equal_pairwise_counts(block_size, set_block_size):
    set_block_size(block_size)
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (23, 9))  # many ties
    groups = torch.cat([torch.arange(9), torch.randint(0, 9, (14,), generator=generator)])[torch.randperm(23)]
    text_ranks = compute_ranks_from_embeddings(texts, images, groups, torch.arange(9))
    image_ranks = compute_ranks_from_embeddings(images, texts, torch.arange(9), groups)
    with FlopCounterMode(display=False) as counter:
        ranks = cross_modal_ranks(texts, images, groups, torch.arange(9))
    assert counter.get_total_flops() == 2 * 23 * 9 * 3, "the score matrix is computed only once"
    assert [direction.tolist() for direction in ranks] == [text_ranks.tolist(), image_ranks.tolist()]
    scores = texts @ images.T
    for text, rank in enumerate(text_ranks.tolist()):
        wrong = [scores[text, i] for i in range(9) if i != groups[text]]
        assert rank == sum(score >= scores[text, groups[text]] for score in wrong)
    for image, rank in enumerate(image_ranks.tolist()):
        best = max(scores[t, image] for t in range(23) if groups[t] == image)
        assert rank == sum(scores[t, image] >= best for t in range(23) if groups[t] != image)


# --- Classification, and the metric module for `evaluate` ------------------------------------------------------------


def test_accuracies_equal_those_of_scikit_learn():
    for k in (1, 3, 7):
        expected = top_k_accuracy_score(LABELS.numpy(), SCORES.numpy(), k=k, labels=range(7))
        assert top_k_accuracy(SCORES, LABELS, k) == pytest.approx(expected)
    expected = balanced_accuracy_score(LABELS.numpy(), SCORES.argmax(1).numpy())
    assert mean_per_class_accuracy(SCORES, LABELS) == pytest.approx(expected)
    assert per_class_accuracy(SCORES[:1], torch.tensor([2])).isnan().sum() == 6


@pytest.mark.parametrize("dtype", [torch.float, torch.double, torch.long])
def test_the_diagonal_of_the_confusion_matrix_is_the_accuracy(dtype):
    scores = torch.randint(3, (200, 7), generator=GENERATOR).to(dtype)  # three distinct values, so every row has ties
    matrix = confusion_matrix(scores, LABELS)
    assert matrix.sum() == 200 and matrix.trace() / 200 == pytest.approx(top_k_accuracy(scores, LABELS))
    matrix = confusion_matrix(torch.tensor([[9, 1], [2, 8], [6, 4], [5, 5]]).to(dtype), torch.tensor([0, 0, 1, 0]))
    assert matrix.tolist() == [[1, 2], [1, 0]], "a tie counts against the class"


@pytest.mark.parametrize("scores", [SCORES[:, 0], TIED], ids=["distinct", "tied"])
def test_roc_auc_is_the_share_of_pairs_in_the_right_order(scores):
    """A tie counts half."""
    positives = TARGETS[:, 0].bool()
    differences = scores[positives][:, None] - scores[~positives]
    expected = ((differences > 0).double() + (differences == 0).double() / 2).mean().item()
    assert roc_auc(scores, TARGETS[:, 0]) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [SCORES, TIED[:, None].expand(-1, 7)], ids=["distinct", "tied"])
def test_eleven_point_map_equals_the_definition(scores):
    expected = []
    for values, targets in zip(scores.T, TARGETS.T, strict=True):
        selections = [values >= threshold for threshold in values.unique()]  # images of equal score enter together
        hits = [targets[selection] for selection in selections]
        curve = [(hit.sum() / targets.sum(), hit.double().mean()) for hit in hits]
        for point in np.linspace(0, 1, 11) - 1e-9:
            expected.append(max(precision.item() for recall, precision in curve if recall >= point))
    assert eleven_point_map(scores, TARGETS) == pytest.approx(np.mean(expected))


NAN = SCORES.clone()
NAN[3, 2] = float("nan")
FAULTS = [
    (lambda: compute_ranks_from_embeddings(NAN[3:4], SCORES, LABELS[3:4], LABELS), "query embedding .*NaN"),
    (lambda: cross_modal_ranks(SCORES, SCORES, LABELS + 1, LABELS), r"queries \[\d+, "),
    (lambda: recall_at_k(torch.tensor([0]), 0), r"\bk\b.*\b0\b"),
    (lambda: mean_recall(torch.tensor([])), "query"),
    (lambda: top_k_accuracy(NAN, LABELS), "NaN"),
    (lambda: top_k_accuracy(SCORES, LABELS, 8), r"\bk\b.*\b7\b.*\b8\b"),
    (lambda: top_k_accuracy(SCORES, LABELS + 1), r"Labels .*\b6\b.*\[7\]"),
    (lambda: roc_auc(SCORES[:, 0], torch.ones(200)), "ROC AUC"),
    (lambda: eleven_point_map(SCORES, TARGETS[:, :3]), r"\(200, 7\).*\(200, 3\)"),
    (lambda: ranks_from_scores(SCORES[:1], [[]]), "query 0"),
]


@pytest.mark.parametrize(("call", "message"), FAULTS)
def test_invalid_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


RELEVANT_ITEMS = [[int(label)] for label in LABELS]
CASES = {
    "recall_at_k": (SCORES, RELEVANT_ITEMS, {"k": 2}, recall_at_k(ranks_from_scores(SCORES, RELEVANT_ITEMS), 2)),
    "median_rank": (SCORES, RELEVANT_ITEMS, {}, median_rank(ranks_from_scores(SCORES, RELEVANT_ITEMS))),
    "top_k_accuracy": (SCORES, LABELS.tolist(), {"k": 3}, top_k_accuracy(SCORES, LABELS, 3)),
    "eleven_point_map": (SCORES, TARGETS.tolist(), {}, eleven_point_map(SCORES, TARGETS)),
    "roc_auc": (SCORES[:, 0], TARGETS[:, 0].tolist(), {}, roc_auc(SCORES[:, 0], TARGETS[:, 0])),
}
PROGRAM = """
import json, sys
import evaluate

path, cases = json.load(sys.stdin)
results = {}
for name, (scores, references, options) in cases.items():
    metric = evaluate.load(path, name)
    results |= metric.compute(predictions=scores, references=references, **options)
try:
    evaluate.load(path)
except ValueError as error:
    results["error"] = str(error)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_evaluate_loads_a_copy_of_the_metrics_folder_without_the_project(tmp_path):
    shutil.copytree(Path(metrics.__file__).parent, tmp_path / "capivara_metrics")
    cases = {name: (scores.tolist(), references, options) for name, (scores, references, options, _) in CASES.items()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], input=json.dumps(["./capivara_metrics", cases]), text=True,
        cwd=tmp_path, env=environment | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert "recall_at_k, " in results.pop("error"), "a missing name lists all metrics"
    assert results == {name: pytest.approx(expected, rel=1e-6) for name, (*_, expected) in CASES.items()}
