"""A step of `WholeBatch` equals one graph over the same micro-batches, with dropout, for any memory and processes."""

import doctest
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from sampling import one_in
from torch.nn import functional as F
from whole_batch_process import CAPTIONS, MICRO, SEED, STEP, VARIANTS, build, gradients_of, make_batch

from modeling_capivara import clip_loss
from modeling_capivara.two_towers import compute_text_embeds
from training import whole_batch
from training.batches import apportion_batch_to_datasets, tokenize_into_sorted_micro_batches
from training.memory import measure_graph_bytes
from training.whole_batch import (
    WholeBatch,
    compute_contrastive_loss_share,
    compute_sigmoid_loss_share,
    look_up_token_embeddings_once,
)

TESTS = Path(__file__).resolve().parent
TOLERANCE = {"no": 1e-6, "bf16": 1e-2}
ALL_GRAPHS = float("inf")


def forward(model, batch):
    """Run the model on a micro-batch with the random state that `WholeBatch` uses."""
    return seeded(batch, lambda inputs: model(**inputs))


def seeded(batch, call):
    """Call a function with the inputs of a micro-batch and the random state that `WholeBatch` uses."""
    state = np.random.SeedSequence([SEED, STEP, batch.index]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) >> 1)
    return call(batch.model_inputs("cpu"))


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reference_gradients(model, batches, image_embeds, autocast: torch.dtype | None = None):
    """Compute loss and gradients with one graph over all micro-batches."""
    device = model.device
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = [forward(model, batch) for batch in batches]
    images = image_embeds
    if images is None:
        images = torch.cat([output.image_embeds for output in outputs])
    loss = clip_loss(torch.cat([output.text_embeds for output in outputs]), images.to(device), model.logit_scale)
    loss.backward()
    return loss.item(), gradients(model)


def siglip_gradients(model, batches, image_embeds):
    """Compute loss and gradients of all texts at once, by the model's own loss or, with cached images, its formula."""
    ids = torch.cat([batch.input_ids for batch in batches])
    if image_embeds is None:
        loss = model(ids, torch.cat([batch.pixel_values for batch in batches]), return_loss=True).loss
    else:
        logits = model.logit_scale.exp() * compute_text_embeds(model, ids) @ image_embeds.double().T + model.logit_bias
        loss = -F.logsigmoid((2 * torch.eye(len(ids)) - 1) * logits).sum() / len(ids)
    loss.backward()
    return loss.item(), gradients(model)


def largest_error(actual: dict, expected: dict) -> float:
    """Return the largest error of any parameter's gradient: norm of the difference over norm of the gradient."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        norm = gradient.norm()
        if name.endswith(("key.bias", "k_proj.bias")):  # softmax cancels it: its gradient is only rounding error
            norm = expected[name.replace("key", "query").replace("k_proj", "q_proj")].norm()
        assert norm > 0, "an all-zero gradient would prove nothing"
        errors[name] = ((actual[name] - gradient).norm() / norm).item()
    return max(errors.values())


# Every combination of two parameters, not of all five. Of 7 pairs, size 3 leaves a remainder and 50 exceeds the batch.
CASES = [(0.0, False, "bf16", False, 2), (ALL_GRAPHS, True, "no", False, 2), (None, False, "no", True, 3)]
CASES += [(0.0, True, "no", True, 50), (ALL_GRAPHS, False, "bf16", True, 2), (None, True, "bf16", False, 2)]
CASES += [(0.0, False, "no", False, 1)]


@pytest.mark.parametrize(("budget", "trained_images", "precision", "checkpointing", "size"), CASES)
def test_a_step_equals_one_graph(budget, trained_images, precision, checkpointing, size):
    batches, embeds = make_batch(trained_images, size)
    loss, expected = reference_gradients(
        build(trained_images), batches, embeds, torch.bfloat16 if precision == "bf16" else None
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    report, actual = gradients_of(build(trained_images, checkpointing), accelerator, batches, embeds, budget)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.graphs_kept == (0 if budget == 0.0 else len(batches))
    assert "logit_scale" in actual and "text_model.embeddings.word_embeddings.weight" in actual
    assert any(name.startswith("vision_") for name in actual) == trained_images
    assert largest_error(actual, expected) < TOLERANCE[precision]


class Float64Tower(torch.nn.Module):
    """A text tower with embeddings in float64. The embeddings of `CapivaraModel` are always in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(1000, 24, padding_idx=1), torch.nn.Linear(24, 24)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.7))
        self.double()

        self.text_model = SimpleNamespace(get_input_embeddings=lambda: self.table)

    def get_text_features(self, input_ids, attention_mask):
        hidden = F.dropout(self.layer(self.table(input_ids)).tanh(), 0.1) * attention_mask[..., None]
        return SimpleNamespace(pooler_output=hidden.sum(1))


@pytest.mark.parametrize("budget", [0.0, ALL_GRAPHS])
def test_in_float64_it_equals_one_graph_to_1e_9(budget):
    (batches, embeds), model, targets = make_batch(False), Float64Tower(), torch.arange(7)
    texts = torch.cat([seeded(batch, lambda inputs: compute_text_embeds(model, **inputs)) for batch in batches])
    logits = model.logit_scale.exp() * texts @ embeds.double().T
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    loss.backward()
    report, actual = gradients_of(Float64Tower(), Accelerator(cpu=True), batches, embeds.double(), budget)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert largest_error(actual, gradients(model)) < 1e-9


# ---- precision ----


def by_micro_batch(model, batches, embeds) -> dict[str, torch.Tensor]:
    """Compute gradients in bfloat16 with one backward pass per micro-batch, so that no gradient is summed in 8 bits."""
    outputs = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(forward(model, batch).text_embeds)
    leaves = [output.detach().float().requires_grad_() for output in outputs]
    clip_loss(torch.cat(leaves), embeds, model.logit_scale).backward()
    for output, leaf in zip(outputs, leaves, strict=True):
        output.backward(leaf.grad.to(output.dtype))
    return gradients(model)


def mean_error(actual: dict, expected: dict) -> float:
    """Return the mean relative error over the parameters' gradients."""
    return float(np.mean([((actual[n] - g).norm() / g.norm()).item() for n, g in expected.items() if "key.b" not in n]))


@pytest.mark.parametrize("number", one_in(4, [24, 4, 44, 176]))
def test_bfloat16_stays_as_accurate_with_many_micro_batches(number):
    captions = [f"{CAPTIONS[i % 7]} {CAPTIONS[i // 7 % 7]}" for i in range(number)]
    batches, embeds = make_batch(False, 1, captions)
    exact = reference_gradients(build(False), batches, embeds)[1]
    separate_error = mean_error(by_micro_batch(build(False), batches, embeds), exact)
    for budget in (0.0, ALL_GRAPHS):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        error = mean_error(gradients_of(build(False), accelerator, batches, embeds, budget)[1], exact)
        assert 0 < error < 1.05 * separate_error
    if number > 4:  # a common backward pass, which sums gradients in bfloat16, would be noticed
        together = reference_gradients(build(False), batches, embeds, torch.bfloat16)[1]
        assert mean_error(together, exact) > 1.05 * separate_error


def test_a_nan_loss_raises_and_leaves_no_gradient():
    batches, embeds = make_batch(False)
    model = build(False)
    with pytest.raises(FloatingPointError, match="nan"):
        gradients_of(model, Accelerator(cpu=True), batches, embeds * float("nan"))
    assert not gradients(model)


def test_the_fp16_scaler_scales_all_gradients():
    """Also that of the logit scale. The scaler is set by hand, because Accelerate has none on a CPU."""
    batches, embeds = make_batch(False)
    _, expected = reference_gradients(build(False), batches, embeds)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    _, actual = gradients_of(build(False), accelerator, batches, embeds)
    assert largest_error(actual, expected) < 1e-5


# ---- memory ----


def test_graphs_that_fit_into_free_memory_are_kept(monkeypatch):
    batches, embeds = make_batch(False)
    model, accelerator = build(False), Accelerator(cpu=True)
    step = WholeBatch(accelerator.prepare_model(model, evaluation_mode=True), accelerator, SEED)
    assert step(STEP, batches, 7, embeds).graphs_kept == 4, "all graphs fit"
    size = measure_graph_bytes(lambda: model(batches[0].input_ids, attention_mask=batches[0].attention_mask), model)
    assert step._bytes_per_text * len(batches[0].input_ids) == pytest.approx(size, rel=0.1)
    step.budget = None
    enough_for_two = 2.5 * size * max(b.input_ids.numel() for b in batches[:2]) / batches[0].input_ids.numel()
    monkeypatch.setattr(
        whole_batch, "available_memory", lambda device: (enough_for_two / 0.6) + step._pending_state_bytes()
    )
    assert 1 <= step(STEP, batches, 7, embeds).graphs_kept <= 3


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_kept_and_recomputed_graphs_agree_to_the_bit(precision):
    """A run and its continuation may therefore keep different numbers of graphs."""
    results = {}
    for budget in (0.0, ALL_GRAPHS, "half"):
        batches, embeds = make_batch(False)
        model, accelerator = build(False), Accelerator(cpu=True, mixed_precision=precision)
        step = WholeBatch(accelerator.prepare_model(model, evaluation_mode=True), accelerator, SEED)
        step.budget = budget
        if budget == "half":
            step.budget, step._bytes_per_text = 1.0, 0.25
        results[step(STEP, batches, 7, embeds).graphs_kept] = gradients(model)
    assert len(results) == 3 and 0 in results and 4 in results, "none, some and all graphs were kept"
    first, *others = results.values()
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(("precision", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_graph_bytes_count_saved_tensors_but_not_weights_or_their_casts(precision, size):
    linear = torch.nn.Linear(100, 50)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        counted = measure_graph_bytes(lambda: torch.sigmoid(linear(torch.randn(30, 100))), linear)
    assert counted == (30 * 100 + 30 * 50) * size  # the input and the sigmoid's result


@pytest.mark.slow
def test_the_loss_of_32768_pairs_costs_under_half_a_gibibyte():
    """Measure the peak memory of a new process above its start, for 2,048 of the rows.

    A single tile would take twice as much. Every further 2,048 rows take 20 MB.
    """
    code = """
import torch
from benchmarks.tools import peak_resident_bytes, reset_peak_memory
from training.whole_batch import compute_contrastive_loss_share
torch.manual_seed(0)
texts, images = torch.nn.functional.normalize(torch.randn(2, 32768, 512), dim=-1)
texts, scale = texts.requires_grad_(), torch.tensor(4.6, requires_grad=True)
torch.randn(64, 512) @ torch.randn(512, 64)
before = reset_peak_memory()
compute_contrastive_loss_share(texts, images, scale, torch.arange(2048)).backward()
print(peak_resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**29


# ---- losses and cached token embeddings ----


def random_embeds(pairs: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text and image embeddings of unit length in float64, which require gradients."""
    generator = torch.Generator().manual_seed(pairs)
    texts, images = F.normalize(torch.randn(2, pairs, width, generator=generator, dtype=torch.double), dim=-1)
    return texts.requires_grad_(), images.requires_grad_()


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
@pytest.mark.parametrize("tile", [1, 3, 11, 100])
@pytest.mark.parametrize("cut", [0, 5, 11])
def test_the_losses_of_all_processes_sum_to_the_plain_formula(cut, tile, kind, monkeypatch):
    monkeypatch.setattr(whole_batch, "MAX_TILE_LOGITS", tile * 11)
    texts, images = random_embeds(11)
    scale, bias = (torch.tensor(value, dtype=torch.double, requires_grad=True) for value in (2.9, -9.0))
    logits, targets, inputs = scale.exp() * texts @ images.T, torch.arange(11), [texts, images, scale]
    if kind == "contrastive":
        expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        share = partial(compute_contrastive_loss_share, *inputs)
    else:
        expected = -F.logsigmoid((2 * torch.eye(11) - 1) * (logits + bias)).sum() / 11
        share = partial(compute_sigmoid_loss_share, *inputs, logit_bias=bias)
        inputs.append(bias)
    total = sum(share(local_rows=rows) for rows in (targets[:cut], targets[cut:]))
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for actual_gradient, expected_gradient in pairs:
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-9, atol=1e-12)


class ScaledEmbedding(torch.nn.Embedding):
    """Token embeddings that scale their rows, as those of Gemma and BART do."""

    def forward(self, ids):
        return 3 * super().forward(ids)


@pytest.mark.parametrize("kind", [torch.nn.Embedding, ScaledEmbedding])
def test_cached_rows_give_the_same_gradient_as_the_table(kind):
    """The row of padding gets no gradient, as in nn.Embedding."""
    table, plain = (kind(9, 4, padding_idx=0) for _ in range(2))
    plain.load_state_dict(table.state_dict())
    ids = [torch.tensor([[1, 3, 3], [0, 1, 8]]), torch.tensor([[3, 0]])]
    factors = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    sum((plain(batch) * factors[: batch.shape[1]]).sum() for batch in ids).backward()
    with look_up_token_embeddings_once(table, ids):
        sum((table(batch) * factors[: batch.shape[1]]).sum() for batch in ids).backward()
    torch.testing.assert_close(table.weight.grad, plain.weight.grad)
    assert not plain.weight.grad[0].any() and "forward" not in vars(table)


def test_cached_rows_add_a_sparse_gradient_to_the_existing_one():
    """A dense gradient, allocated at every step, would be as large as the table."""
    table, sparse = torch.nn.Embedding(9, 4), []
    table.weight.register_hook(lambda gradient: sparse.append(gradient.is_sparse))
    for step in range(2):
        with look_up_token_embeddings_once(table, [torch.tensor([[5, 3]])]):
            table(torch.tensor([5, 5])).sum().backward()
        assert table.weight.grad.layout == torch.strided
        assert table.weight.grad[5].tolist() == [2.0 * (step + 1)] * 4 and not table.weight.grad[3].any()
    assert sparse == [True, True] and not table.sparse


def test_a_backward_pass_outside_of_the_context_is_an_error():
    table, ids = torch.nn.Embedding(9, 4), torch.tensor([[5, 3]])
    with look_up_token_embeddings_once(table, [ids]):
        result = torch.utils.checkpoint.checkpoint(lambda: table(ids).pow(2).sum(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="look_up_token_embeddings_once"):
        result.backward()
    assert table.weight.grad is None


# ---- documentation ----


def test_the_example_of_whole_batch_runs():
    result = doctest.testmod(whole_batch)
    assert result.attempted >= 10 and not result.failed


# ---- processes ----


@pytest.mark.slow
def test_several_processes_equal_one_graph(tmp_path):
    """Two and three processes, also with unequal shares or none for one process; CLIP's loss and SigLIP's."""
    command = [sys.executable, str(TESTS / "whole_batch_process.py"), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300)
    results = [torch.load(path, weights_only=True) for path in tmp_path.iterdir()]
    assert len(results) == 2 + 3
    for variant, (trained_images, _, siglip) in VARIANTS.items():
        compute_reference = siglip_gradients if siglip else reference_gradients
        loss, expected = compute_reference(
            build(trained_images, siglip=siglip), *make_batch(trained_images, siglip=siglip)
        )
        assert ("logit_bias" in expected) == siglip
        for result in results:
            assert result[variant]["loss"] == pytest.approx(loss, rel=1e-9 if siglip else 1e-5)
            assert largest_error(result[variant]["gradients"], expected) < (1e-9 if siglip else 1e-5)


# ---- micro-batches ----


@pytest.mark.parametrize("size", [1, MICRO, 3, 7])
def test_micro_batches_are_sorted_by_length_and_padded_to_their_longest_text(size, tiny_processor):
    ids = tiny_processor(text=CAPTIONS, padding=False)["input_ids"]
    lengths = [len(tokens) for tokens in ids]
    assert lengths != sorted(lengths), "captions that are sorted already would prove nothing"
    batches, order = tokenize_into_sorted_micro_batches(tiny_processor, CAPTIONS, size)
    rows = [row[mask.bool()].tolist() for b in batches for row, mask in zip(b.input_ids, b.attention_mask, strict=True)]
    assert rows == [ids[i] for i in order] and sorted(order) == list(range(len(CAPTIONS)))
    assert [len(row) for row in rows] == sorted(lengths)
    widths = [max(sorted(lengths)[start : start + size]) for start in range(0, len(lengths), size)]
    assert [batch.input_ids.shape[1] for batch in batches] == widths


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 1]])
def test_fewer_than_two_usable_pairs_are_refused_without_proposing_a_batch(sizes):
    with pytest.raises(ValueError, match=rf"\b2\b.*\b{sum(sizes)}\b") as error:
        apportion_batch_to_datasets(2, sizes)
    assert "--effective_batch_size" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("trained_images", [False, True], ids=["frozen image tower", "both towers"])
def test_a_step_on_a_gpu_equals_one_graph(precision, tolerance, trained_images):
    """With fp16, the scaler is active; `gradients_of` divides the gradients by its scale."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batches, embeds = make_batch(trained_images)
    scaler = GradScalerKwargs(init_scale=256.0)  # the default overflows at the first step, which training then skips
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[scaler])
    autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    loss, expected = reference_gradients(build(trained_images).cuda(), batches, embeds, autocast)
    embeds = None if embeds is None else embeds.cuda()
    report, actual = gradients_of(build(trained_images).cuda(), accelerator, batches, embeds, None)
    assert (accelerator.scaler is not None) == (precision == "fp16")
    assert report.loss == pytest.approx(loss, rel=1e-4)
    assert largest_error(actual, expected) < tolerance
