"""The tiled loss is clip_loss, in memory that grows with the batch."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_capivara import clip_loss
from training.contrastive import contrastive_gradients


def sides(pairs: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    both = torch.nn.functional.normalize(torch.randn(2, pairs, width, generator=generator), dim=-1)
    return both[0].requires_grad_(), both[1].requires_grad_()


@pytest.mark.parametrize("tile", [1, 3, 11, 100, None])
def test_equals_clip_loss(tile):
    texts, images = sides(11)
    scale = torch.tensor(2.9, requires_grad=True)
    loss = clip_loss(texts, images, scale)
    loss.backward()
    result = contrastive_gradients(
        texts.detach(), images.detach(), scale.detach(), torch.arange(11), image_gradient=True, tile_rows=tile
    )
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.text_embeds, texts.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.image_embeds, images.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.logit_scale, scale.grad, rtol=1e-5, atol=1e-7)


def hard_loss(texts, images, scale, hardness: float) -> torch.Tensor:
    """As the plain formula has it: of each pair's wrong ones, the weighted sum beside the right one."""
    logits, losses = scale.exp() * texts @ images.T, []
    wrong = 1 - torch.eye(len(logits), dtype=logits.dtype)
    for one in (logits, logits.T):
        weights = wrong * (hardness * one).exp()
        weights = weights / weights.sum(dim=1, keepdim=True) * (len(logits) - 1)
        losses.append(((one.diag().exp() + (weights * one.exp()).sum(dim=1)).log() - one.diag()).mean())
    return sum(losses) / 2


@pytest.mark.parametrize(("hardness", "tile"), [(0.0, 3), (0.25, 1), (1.0, 3), (1.0, None)])
def test_hard_negatives_equal_the_plain_formula(hardness, tile):
    texts, images = (side.detach().double().requires_grad_() for side in sides(11))
    scale = torch.tensor(2.1, dtype=torch.double, requires_grad=True)
    loss = hard_loss(texts, images, scale, hardness)
    loss.backward()
    given = [tensor.detach().float() for tensor in (texts, images, scale)]
    result = contrastive_gradients(
        *given, torch.arange(11), image_gradient=True, hard_negatives=hardness, tile_rows=tile
    )
    torch.testing.assert_close(result.loss, loss.detach().float())
    for found, expected in ((result.text_embeds, texts), (result.image_embeds, images), (result.logit_scale, scale)):
        torch.testing.assert_close(found, expected.grad.float(), rtol=1e-5, atol=1e-6)
    if hardness:
        easy = contrastive_gradients(*given, torch.arange(11))
        assert result.loss > easy.loss, "similar wrong pairs count more"


def by_two_processes(gradients, cut: int, **options) -> tuple:
    """Result for all of 11 pairs, and the two of processes that have `cut` texts and the others.

    As threads, which wait for one another as processes do.
    """
    texts, images, scale, pairs = *(side.detach() for side in sides(11)), torch.tensor(2.9), torch.arange(11)
    whole = gradients(texts, images, scale, pairs, image_gradient=True, **options)
    parts, meeting = (slice(0, cut), slice(cut, 11)), threading.Barrier(2, timeout=60)
    brought = [None, None]

    def process(number: int):
        def gather(own):
            brought[number] = own
            meeting.wait()
            found = torch.stack(brought)
            meeting.wait()
            return found

        part = parts[number]
        more = {"image_gradient": True, "tile_rows": 2, "gather": gather, "total": lambda own: gather(own).sum(0)}
        return gradients(texts[part], images, scale, pairs[part], **more, **options)

    with ThreadPoolExecutor(2) as threads:
        return whole, list(threads.map(process, range(2)))


def check_joined(whole, results, **tolerance) -> None:
    """What two processes have found is what one finds: each its texts' gradients, both all else."""
    texts_gradient = torch.cat([result.text_embeds for result in results])
    torch.testing.assert_close(texts_gradient, whole.text_embeds, **tolerance)
    for result in results:
        for name in ("loss", "image_embeds", "logit_scale"):
            torch.testing.assert_close(getattr(result, name), getattr(whole, name), **tolerance)


@pytest.mark.parametrize("options", [{}, {"hard_negatives": 0.5}], ids=["plain", "hard negatives"])
@pytest.mark.parametrize("cut", [5, 1])
def test_two_processes_equal_one(cut, options):
    check_joined(*by_two_processes(contrastive_gradients, cut, **options), rtol=1e-5, atol=1e-6)


def test_no_image_gradient_unless_asked_for():
    texts, images = (side.detach() for side in sides(4))
    assert contrastive_gradients(texts, images, torch.tensor(2.0), torch.arange(4)).image_embeds is None


def test_one_pair_has_nothing_to_tell_apart():
    texts, images = (side.detach() for side in sides(1))
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        contrastive_gradients(texts, images, torch.tensor(2.0), torch.arange(1))
    texts, images = (side.detach() for side in sides(4))
    with pytest.raises(ValueError, match=r"hard_negatives from 0, -0\.5"):
        contrastive_gradients(texts, images, torch.tensor(2.0), torch.arange(4), hard_negatives=-0.5)


@pytest.mark.slow
def test_a_batch_of_32768_costs_under_a_gibibyte():
    """In a process of its own: the most memory it held, less what it held before."""
    code = """
import torch
from capivara_common.environment import peak_resident_bytes, restart_peak
from training.contrastive import contrastive_gradients
torch.manual_seed(0)
sides = torch.nn.functional.normalize(torch.randn(2, 32768, 512), dim=-1)
torch.randn(64, 512) @ torch.randn(512, 64)
before = restart_peak()
contrastive_gradients(sides[0], sides[1], torch.tensor(4.6), torch.arange(32768), image_gradient=True)
print(peak_resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**27 < int(done.stdout) < 2**30
