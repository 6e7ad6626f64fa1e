"""FLOP of a training step of both programs, and what this device reaches at best.

Share of the matmul peak = FLOP of a step / its seconds / FLOP per second of the best `torch.mm` of the same run. With
T and I the elements of the weight matrices of the two encoders (85 million each), and 2 FLOP for each and for every
token that goes through, padding included:

    text forward F = 2 T tokens, image forward G = 2 I patches (class token and patch convolution included)
    ours: F + 2 F (backward), F more for a micro-batch whose graph is not kept; G without a cache
    open_clip: F without graph, F with, F again by checkpointing, 2 F (backward); 2 G

Scores of attention (0.4 % at 20 tokens), projections and loss are left out.
"""

import torch
from torch import nn

from benchmarks.timing import seconds_of
from modeling_capivara import CapivaraConfig, CapivaraModel
from training.step import MicroBatch

MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
MATMUL_REPEATS = 5


def forward_flop(config: CapivaraConfig) -> tuple[int, int]:
    """FLOP of the text encoder a token, and of the image tower an image; see the module's text."""
    with torch.device("meta"):
        model = CapivaraModel(config)
    vision = model.vision_model
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    convolution = vision.embeddings.patch_embedding.weight.numel() * patches
    image = 2 * (_matrix_elements(vision.encoder) * (patches + 1) + convolution)
    return 2 * _matrix_elements(model.text_model.encoder), image


def _matrix_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def our_flop(config: CapivaraConfig, texts: list[MicroBatch], cached: bool, graphs_kept: int) -> int:
    """Of our step: its micro-batches, whether image embeddings are cached, and how many graphs it kept."""
    text, image = forward_flop(config)
    tokens = [batch.input_ids.numel() for batch in texts]
    pairs = sum(len(batch.input_ids) for batch in texts)
    return text * (3 * sum(tokens) + sum(tokens[graphs_kept:])) + (0 if cached else image * pairs)


def peer_flop(config: CapivaraConfig, pairs: int, padded_tokens: int) -> int:
    """Of open_clip's step with more than one micro-batch."""
    text, image = forward_flop(config)
    return pairs * (5 * text * padded_tokens + 2 * image)


def matmul_peak(device: str) -> dict[str, float]:
    """FLOP per second of the best of several square `torch.mm`, by dtype."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for size in MATMUL_SIZES[torch.device(device).type]:
            left, right = torch.randn(2, size, size, device=device).to(dtype)
            for _ in range(MATMUL_REPEATS):
                rates.append(2 * size**3 / seconds_of(lambda a=left, b=right: torch.mm(a, b), device))
        best[str(dtype).removeprefix("torch.")] = max(rates)
    return best
