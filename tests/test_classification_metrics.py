"""Metrics of classification agree with scikit-learn and with cases done by hand; so does the `evaluate` module."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from eval.capivara_metrics.metrics import (
    confusion_matrix,
    eleven_point_map,
    mean_per_class_accuracy,
    median_rank,
    per_class_accuracy,
    ranks_of_scores,
    recall_at_k,
    retrieval_ranks,
    roc_auc,
    top_k_accuracy,
)

EVAL = Path(__file__).resolve().parent.parent / "eval"
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(200, 7, generator=GENERATOR)
LABELS = torch.randint(7, (200,), generator=GENERATOR)
TARGETS = (torch.rand(200, 7, generator=GENERATOR) < 0.2).long()
TIED = torch.randint(4, (200,), generator=GENERATOR).float()  # four values: ties everywhere


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_equals_scikit_learn(k):
    expected = top_k_accuracy_score(LABELS.numpy(), SCORES.numpy(), k=k, labels=range(7))
    assert top_k_accuracy(SCORES, LABELS, k) == pytest.approx(expected)


def test_mean_per_class_equals_scikit_learn():
    expected = balanced_accuracy_score(LABELS.numpy(), SCORES.argmax(1).numpy())
    assert mean_per_class_accuracy(SCORES, LABELS) == pytest.approx(expected)
    assert per_class_accuracy(SCORES[:1], torch.tensor([2])).isnan().sum() == 6


def test_confusion_matrix_counts():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert confusion_matrix(scores, torch.tensor([0, 0, 1])).tolist() == [[1, 1], [1, 0]]


def test_ties_count_against_the_class():
    scores = torch.tensor([[0.5, 0.5, 0.1]])
    assert top_k_accuracy(scores, torch.tensor([0]), 1) == 0 and top_k_accuracy(scores, torch.tensor([0]), 2) == 1
    assert confusion_matrix(scores, torch.tensor([0])).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("kind", [torch.float, torch.double, torch.long])
def test_the_diagonal_of_the_confusion_matrix_is_the_accuracy(kind):
    scores = torch.randint(3, (200, 7), generator=GENERATOR).to(kind)  # three values: ties in every row
    matrix = confusion_matrix(scores, LABELS)
    assert matrix.sum() == 200 and matrix.trace() / 200 == pytest.approx(top_k_accuracy(scores, LABELS))
    torch.testing.assert_close(matrix.diag() / matrix.sum(dim=1), per_class_accuracy(scores, LABELS).float())
    alone = confusion_matrix(torch.ones(2, 1).to(kind), torch.tensor([0, 0]))
    assert alone.tolist() == [[2]], "a single class ties with none"


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
        shown = [values >= threshold for threshold in values.unique()]  # images of equal score enter together
        found = [(targets[of].sum() / targets.sum(), targets[of].double().mean()) for of in shown]
        for point in np.linspace(0, 1, 11) - 1e-9:
            expected.append(max(precision.item() for recall, precision in found if recall >= point))
    assert eleven_point_map(scores, TARGETS) == pytest.approx(np.mean(expected))


def test_eleven_point_map_by_hand():
    """Right ones at places 1 and 3: precision 1 up to recall 0.5, then 2/3."""
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.1]])
    targets = torch.tensor([[1], [0], [1], [0]])
    assert eleven_point_map(scores, targets) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_tie_of_scores_counts_against_the_query():
    assert ranks_of_scores(torch.tensor([[1.0, 1.0, 0.0], [0.5, 1.0, 0.5]]), [[0], [1]]).tolist() == [1, 0]


def test_ranks_of_scores_are_those_of_embeddings():
    queries, items = torch.nn.functional.normalize(torch.randn(2, 9, 5, generator=GENERATOR), dim=-1)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])
    right = [(groups == group).nonzero().flatten().tolist() for group in groups]
    assert torch.equal(ranks_of_scores(queries @ items.T, right), retrieval_ranks(queries, items, groups, groups))
    assert median_rank(torch.tensor([0, 4, 9])) == 5


def test_bad_input_is_named():
    nan = SCORES.clone()
    nan[3, 2] = float("nan")
    for call, message in (
        (lambda: top_k_accuracy(nan, LABELS), "NaN or infinite"),
        (lambda: top_k_accuracy(SCORES, LABELS, 8), "at most the number of classes, 7, got 8"),
        (lambda: top_k_accuracy(SCORES, LABELS + 1), r"Labels \[7\] are outside the 7 classes"),
        (lambda: top_k_accuracy(SCORES, LABELS[:5]), "200 rows of scores for 5 labels"),
        (lambda: roc_auc(SCORES[:, 0], torch.ones(200)), "only one of them occurs"),
        (lambda: eleven_point_map(SCORES, TARGETS[:, :3]), "same shape"),
        (lambda: ranks_of_scores(SCORES[:1], [[]]), "no right item"),
        (lambda: ranks_of_scores(SCORES[:1], [[9]]), "outside the 7 items"),
        (lambda: median_rank(torch.tensor([])), "no query"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


RIGHT = [[int(label)] for label in LABELS]
CASES = {
    "recall_at_k": (SCORES, RIGHT, {"k": 2}, recall_at_k(ranks_of_scores(SCORES, RIGHT), 2)),
    "mean_recall": (SCORES, RIGHT, {}, np.mean([recall_at_k(ranks_of_scores(SCORES, RIGHT), k) for k in (1, 5, 10)])),
    "median_rank": (SCORES, RIGHT, {}, median_rank(ranks_of_scores(SCORES, RIGHT))),
    "top_k_accuracy": (SCORES, LABELS.tolist(), {"k": 3}, top_k_accuracy(SCORES, LABELS, 3)),
    "mean_per_class_accuracy": (SCORES, LABELS.tolist(), {}, mean_per_class_accuracy(SCORES, LABELS)),
    "eleven_point_map": (SCORES, TARGETS.tolist(), {}, eleven_point_map(SCORES, TARGETS)),
    "roc_auc": (SCORES[:, 0], TARGETS[:, 0].tolist(), {}, roc_auc(SCORES[:, 0], TARGETS[:, 0])),
}


ELSEWHERE = """
import json, sys
import evaluate

path, cases = json.load(sys.stdin)
found = {}
for name, (scores, references, options) in cases.items():
    metric = evaluate.load(path, name)
    found |= metric.compute(predictions=scores, references=references, **options)
try:
    evaluate.load(path)
except ValueError as error:
    found["unnamed"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.parametrize("copied", [False, True], ids=["of the checkout", "copied"])
@pytest.mark.slow
def test_evaluate_loads_every_metric_away_from_the_checkout(copied, tmp_path):
    """By its path alone: nothing of this project can be imported there."""
    path = str(EVAL / "capivara_metrics")
    if copied:
        shutil.copytree(path, tmp_path / "capivara_metrics")
        path = "./capivara_metrics"
    cases = {name: (scores.tolist(), references, options) for name, (scores, references, options, _) in CASES.items()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE], input=json.dumps([path, cases]), cwd=tmp_path, text=True,
        env=environment | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert "Name one of recall_at_k, " in found.pop("unnamed")
    assert found == {name: pytest.approx(expected, rel=1e-6) for name, (*_, expected) in CASES.items()}


def test_recalls_equal_clip_benchmarks():
    """Its one-hot recall on the same scores, several captions an image, without ties, where it is defined alike."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k as theirs

    images = torch.nn.functional.normalize(torch.randn(40, 16, generator=GENERATOR), dim=-1)
    image_of_text = torch.arange(40).repeat_interleave(3)
    texts = torch.nn.functional.normalize(images[image_of_text] + torch.randn(120, 16, generator=GENERATOR), dim=-1)
    positive = image_of_text[:, None] == torch.arange(40)
    for k in (1, 5, 10):
        found = (theirs(texts @ images.T, positive, k) > 0).float().mean().item()
        assert recall_at_k(retrieval_ranks(texts, images, image_of_text, torch.arange(40)), k) == pytest.approx(found)
        found = (theirs(images @ texts.T, positive.T, k) > 0).float().mean().item()
        assert recall_at_k(retrieval_ranks(images, texts, torch.arange(40), image_of_text), k) == pytest.approx(found)
