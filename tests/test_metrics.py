"""Retrieval metrics against cases counted by hand and a plain implementation."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.capivara_metrics import metrics
from eval.capivara_metrics.metrics import (
    chance_recall,
    cross_modal_ranks,
    mean_hits,
    mean_recall,
    paired_bootstrap,
    recall_at_k,
    retrieval_ranks,
)
from eval.retrieval import RetrievalEmbeddings


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@pytest.fixture
def blocks(monkeypatch):
    """Sets how many queries are scored at once."""
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 0)
    return lambda size: monkeypatch.setattr(metrics, "BLOCK_QUERIES", size)


def test_ranks_by_hand():
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # query 0 looks for item 2: items 0 (1.0) beats 0.6 -> 1; query 1 for item 1: first -> 0; query 2 for item 0: last.
    ranks = retrieval_ranks(queries, items, torch.tensor([2, 1, 0]), torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1, 0, 2]
    assert recall_at_k(ranks, 1) == pytest.approx(1 / 3)
    assert recall_at_k(ranks, 2) == pytest.approx(2 / 3)


def test_a_tie_counts_against_the_query():
    items = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = retrieval_ranks(items[:1], items, torch.tensor([0]), torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1]


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_ranks_equal_a_plain_sort(block_size, blocks):
    blocks(block_size)
    images, texts = unit(30, 8, 0), unit(90, 8, 1)
    image_of_text = torch.arange(90) % 30
    expected = []
    for i in range(30):
        scores = images[i] @ texts.T
        order = scores.argsort(descending=True).tolist()
        expected.append(next(position for position, t in enumerate(order) if image_of_text[t] == i))
        # the best right text may stand behind wrong ones only
    ranks = retrieval_ranks(images, texts, torch.arange(30), image_of_text)
    assert ranks.tolist() == expected


@pytest.mark.parametrize("block_size", [64, 100, 333])
def test_equal_items_tie_wherever_they_stand(block_size, blocks):
    """A wrong item like the right one counts against the query, in whichever block of items it is scored."""
    blocks(block_size)
    images, texts = unit(1009, 512, 0), unit(333, 512, 1)
    twice = torch.cat([images, images.flip(0)])
    groups = torch.cat([torch.arange(1009), torch.arange(1009, 2018)])
    alone = retrieval_ranks(texts, images, torch.arange(333), torch.arange(1009))
    among = retrieval_ranks(texts, twice, torch.arange(333), groups)
    assert among.tolist() == (2 * alone + 1).tolist()


def test_mean_recall_is_the_mean_of_three():
    ranks = torch.tensor([0, 3, 7, 20])
    assert mean_recall(ranks) == pytest.approx((1 / 4 + 2 / 4 + 3 / 4) / 3)
    assert mean_hits(ranks).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_chance_equals_random_scores():
    query_groups, item_groups = torch.arange(40), torch.arange(40).repeat_interleave(3)
    hits = []
    for seed in range(60):
        ranks = retrieval_ranks(unit(40, 16, seed), unit(120, 16, 1000 + seed), query_groups, item_groups)
        hits.append(recall_at_k(ranks, 5))
    assert sum(hits) / len(hits) == pytest.approx(chance_recall(query_groups, item_groups, 5), abs=0.02)
    assert chance_recall(torch.arange(4), torch.arange(4), 1) == pytest.approx(1 / 4)
    assert chance_recall(torch.arange(4), torch.arange(4), 10) == 1


def test_bootstrap_interval():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(200, generator=generator)
    after = before + 0.1 + 0.3 * torch.randn(200, generator=generator)
    gain, low, high = paired_bootstrap(before, after, torch.arange(200))
    standard_error = (after - before).std().item() / math.sqrt(200)
    assert gain == pytest.approx((after - before).mean().item())
    assert low == pytest.approx(gain - 1.96 * standard_error, abs=0.005)
    assert high == pytest.approx(gain + 1.96 * standard_error, abs=0.005)


def test_bootstrap_draws_whole_groups():
    """Ten copies of each query carry no further information: the interval must not shrink."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    single = paired_bootstrap(torch.zeros(50), values, torch.arange(50))
    copies = paired_bootstrap(torch.zeros(500), values.repeat_interleave(10), torch.arange(50).repeat_interleave(10))
    assert copies == pytest.approx(single)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([[float("nan"), 0.0]]), torch.eye(2), torch.tensor([0]), torch.arange(2)), "NaN"),
        ((torch.eye(2), torch.eye(2), torch.tensor([0, 5]), torch.arange(2)), r"\[1\] have no right item"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(*arguments)


def test_bad_k_and_empty_split():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        recall_at_k(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="no query"):
        mean_recall(torch.tensor([]))


@pytest.mark.parametrize("block", [1, 7, 100])
def test_both_directions_equal_a_count_of_each_pair(block, blocks):
    blocks(block)
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (23, 9))  # many ties
    groups = torch.cat([torch.arange(9), torch.randint(0, 9, (14,), generator=generator)])[torch.randperm(23)]
    of_texts = retrieval_ranks(texts, images, groups, torch.arange(9))
    of_images = retrieval_ranks(images, texts, torch.arange(9), groups)
    assert [side.tolist() for side in cross_modal_ranks(texts, images, groups, torch.arange(9))] == [
        of_texts.tolist(),
        of_images.tolist(),
    ]
    scores = texts @ images.T
    for text, rank in enumerate(of_texts.tolist()):
        wrong = [scores[text, i] for i in range(9) if i != groups[text]]
        assert rank == sum(score >= scores[text, groups[text]] for score in wrong)
    for image, rank in enumerate(of_images.tolist()):
        best = max(scores[t, image] for t in range(23) if groups[t] == image)
        assert rank == sum(scores[t, image] >= best for t in range(23) if groups[t] != image)
    with pytest.raises(ValueError, match=r"Queries \[9\] have no right item"):
        retrieval_ranks(torch.zeros(10, 3), texts, torch.arange(10), groups)
    none, no_groups = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert retrieval_ranks(none, none, no_groups, no_groups).tolist() == []
    assert [side.tolist() for side in cross_modal_ranks(none, none, no_groups, no_groups)] == [[], []]
    with pytest.raises(ValueError, match=r"Queries \[9\] have no right item"):
        cross_modal_ranks(texts, torch.zeros(10, 3), groups, torch.arange(10))


@pytest.mark.parametrize(("kept", "products"), [(None, 1), (100, 2)])
def test_both_directions_are_counted_in_one_product_where_it_may_be_kept(monkeypatch, kept, products):
    """It takes most of the time. In blocks of 3 queries, so that a tie is found in another block, too."""
    if kept:
        monkeypatch.setattr(metrics, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(metrics, "COMPARED_ELEMENTS", 3 * 9)
    images, groups = unit(9, 8, 0), torch.arange(27) % 9
    texts = unit(27, 8, 1)
    texts[20] = texts[1]  # a wrong text like a right one
    with FlopCounterMode(display=False) as counted:
        found = RetrievalEmbeddings(texts, images, groups).ranks
    assert counted.get_total_flops() == products * 2 * 27 * 9 * 8
    assert found["text_to_image"].tolist() == retrieval_ranks(texts, images, groups, torch.arange(9)).tolist()
    assert found["image_to_text"].tolist() == retrieval_ranks(images, texts, torch.arange(9), groups).tolist()
