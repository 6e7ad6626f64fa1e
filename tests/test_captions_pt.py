"""Captions for timings: real words, the length that was asked for, the same every time."""

import numpy as np
import pytest
from sampling import one_in

from benchmarks.captions_pt import benchmark_captions


@pytest.fixture(scope="module")
def tokenizer():
    from capivara_search.miniature_encoders import load_tokenizer

    return load_tokenizer()


@pytest.mark.parametrize("tokens", one_in(3, [12, 20, 40]))
def test_lengths_spread_around_the_mean(tokenizer, tokens):
    captions = benchmark_captions(300, tokenizer, tokens)
    lengths = np.array([len(ids) for ids in tokenizer(captions)["input_ids"]])
    assert abs(lengths.mean() - tokens) < 0.05 * tokens + 0.5
    assert 0.15 * tokens < lengths.std() < 0.35 * tokens
    assert lengths.max() <= 77, "open_clip would cut it"
    assert len(set(captions)) > 290


def test_captions_are_the_same_every_time(tokenizer):
    captions = benchmark_captions(20, tokenizer)
    assert captions == benchmark_captions(20, tokenizer) == benchmark_captions(30, tokenizer)[:20]
    assert captions != benchmark_captions(20, tokenizer, seed=1)
    assert all(type(caption) is str for caption in captions), "no numpy texts"


@pytest.mark.parametrize("tokens", [9, 51])
def test_bad_numbers(tokenizer, tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        benchmark_captions(1, tokenizer, tokens)
