"""The exact step equals one graph over the same micro-batches, with dropout, in every way it can be run."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from exact_step_process import ALONE, CAPTIONS, MICRO, SEED, STEP, add_taught, build, gradients_of, make_batch
from test_contrastive import hard_loss
from test_matryoshka import plain_loss
from tiny import tiny_tokenizer

from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor, clip_loss
from training.contrastive import TextTargets, contrastive_gradients
from training.step import ExactStep, GraphMeter, _Lookup, micro_batches, padding_share, sparse_embedding_gradients

TESTS = Path(__file__).resolve().parent
TOLERANCE = {"no": 1e-5, "bf16": 1e-2}


def teacher_loss(texts: torch.Tensor, targets: TextTargets, scale: torch.Tensor) -> torch.Tensor:
    """As the plain formulas have it."""
    contrastive = clip_loss(texts, targets.embeds, scale.detach())
    cosine = 1 - (texts * targets.embeds).sum(dim=1).mean()
    return {"contrastive": contrastive, "cosine": cosine, "both": contrastive + cosine}[targets.loss]


def reference_gradients(
    model, batches, image_embeds, autocast: torch.dtype | None = None, targets=None, loss_of=clip_loss
):
    """One graph over all micro-batches, their random states the engine's, one loss."""
    texts, images = [], []
    device = model.device
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for batch in batches:
            state = np.random.SeedSequence([SEED, STEP, batch.index]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(state) >> 1)
            pixels = None if batch.pixel_values is None else batch.pixel_values.to(device)
            output = model(batch.input_ids.to(device), batch.attention_mask.to(device), pixels)
            texts.append(output.text_embeds)
            images.append(output.image_embeds)
    images = [image for image in images if image is not None]
    image_embeds = torch.cat(images) if image_embeds is None else image_embeds.to(device).float()
    texts = torch.cat(texts)
    loss = loss_of(texts[: len(image_embeds)], image_embeds, model.logit_scale)
    taught = 0 if targets is None else targets.weight * teacher_loss(texts, targets, model.logit_scale)
    (loss + taught).backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_error(actual: dict, expected: dict) -> float:
    """Largest relative error of any parameter's gradient: norm of the difference over the norm."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        norm = gradient.norm()
        if name.endswith(("key.bias", "k_proj.bias")):  # softmax does not see it: its gradient is rounding alone
            norm = expected[name.replace("key", "query").replace("k_proj", "q_proj")].norm()
        assert norm > 0, "an all-zero gradient would prove nothing"
        errors[name] = ((actual[name] - gradient).norm() / norm).item()
    return max(errors.values())


# Fast: each of the four choices both ways, not their product.
FAST = [("recompute", False, "bf16", False), ("keep", True, "no", False), ("auto", False, "no", True)]
ALL = itertools.product(["recompute", "keep", "auto"], [False, True], ["no", "bf16"], [False, True])


@pytest.mark.parametrize(
    ("accumulation", "trained_images", "precision", "checkpointing"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_step_equals_one_graph(accumulation, trained_images, precision, checkpointing):
    batches, embeds = make_batch(trained_images)
    loss, expected = reference_gradients(
        build(trained_images), batches, embeds, torch.bfloat16 if precision == "bf16" else None
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = build(trained_images, checkpointing)
    report, actual = gradients_of(model, accelerator, batches, embeds, accumulation)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.graphs_kept == (0 if accumulation == "recompute" else 4)
    assert "logit_scale" in actual and "text_model.embeddings.word_embeddings.weight" in actual
    assert largest_error(actual, expected) < TOLERANCE[precision]


@pytest.mark.parametrize("trained_images", [False, True], ids=["frozen image tower", "both towers"])
def test_step_over_prefixes_equals_one_graph(trained_images):
    batches, embeds = make_batch(trained_images)
    loss, expected = reference_gradients(
        build(trained_images), batches, embeds, loss_of=partial(plain_loss, widths=[24, 12, 6])
    )
    report, actual = gradients_of(build(trained_images), Accelerator(cpu=True), batches, embeds, dims=[12, 6])
    assert report.loss == pytest.approx(loss, rel=1e-5) and largest_error(actual, expected) < 1e-5


def test_a_step_with_hard_negatives_equals_one_graph():
    batches, embeds = make_batch(True)
    loss, expected = reference_gradients(build(True), batches, embeds, loss_of=partial(hard_loss, hardness=0.5))
    report, actual = gradients_of(build(True), Accelerator(cpu=True), batches, embeds, hardness=0.5)
    assert report.loss == pytest.approx(loss, rel=1e-5) and largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("accumulation", "trained_images", "loss"),
    [("recompute", False, "both"), ("keep", True, "contrastive"), ("auto", False, "cosine")],
)
def test_a_taught_step_equals_one_graph(accumulation, trained_images, loss):
    """The teacher's term over all texts, two of them without an image."""
    batches, embeds = make_batch(trained_images)
    targets = add_taught(batches, loss)
    expected_loss, expected = reference_gradients(build(trained_images), batches, embeds, targets=targets)
    model, accelerator = build(trained_images), Accelerator(cpu=True)
    report, actual = gradients_of(model, accelerator, batches, embeds, accumulation, targets)
    assert report.loss == pytest.approx(expected_loss, rel=1e-5) and report.teacher_loss > 0
    assert largest_error(actual, expected) < 1e-5
    _, untaught = gradients_of(build(trained_images), accelerator, batches[:-1], embeds, accumulation)
    assert largest_error(untaught, expected) > 1e-2, "the teacher's term is there"


def test_a_step_on_sentences_without_images():
    batches: list = []
    targets = add_taught(batches)
    targets = TextTargets(targets.embeds[: len(ALONE)], targets.weight, "both")
    for batch in batches:
        batch.start -= len(CAPTIONS)
    model, step_model = build(False), build(False)
    model.logit_scale.requires_grad_(False)
    state = np.random.SeedSequence([SEED, STEP, 0]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) >> 1)
    texts = model(batches[0].input_ids, batches[0].attention_mask).text_embeds
    (targets.weight * teacher_loss(texts, targets, model.logit_scale)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    step_model.logit_scale.requires_grad_(False)
    report, actual = gradients_of(step_model, Accelerator(cpu=True), batches, None, "recompute", targets, pairs=0)
    assert report.loss == 0 and largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), 3, 7, 50]
)  # 3 leaves a remainder, 50 exceeds the batch
def test_any_micro_batch_size(size):
    batches, embeds = make_batch(False, size)
    _, expected = reference_gradients(build(False), batches, embeds)
    _, actual = gradients_of(build(False), Accelerator(cpu=True), batches, embeds)
    assert largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, 7])
def test_without_dropout_it_equals_one_forward_of_the_whole_batch(size):
    """In the captions' own order, padded to 77, through clip_loss."""
    model, (batches, embeds) = build(False).eval(), make_batch(False, size)
    _, order = micro_batches(CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer()), CAPTIONS, size)
    whole = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())(
        text=[CAPTIONS[i] for i in np.random.default_rng(0).permutation(7)], padding="max_length", return_tensors="pt"
    )
    places = [order.index(i) for i in np.random.default_rng(0).permutation(7)]
    clip_loss(model(**whole).text_embeds, embeds[places], model.logit_scale).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, actual = gradients_of(build(False).eval(), Accelerator(cpu=True), batches, embeds)
    assert largest_error(actual, expected) < 1e-5


def test_float16_cache_costs_a_thousandth_at_most():
    batches, embeds = make_batch(False)
    _, expected = reference_gradients(build(False), batches, embeds)
    _, actual = gradients_of(build(False), Accelerator(cpu=True), batches, embeds.half().float())
    assert 0 < largest_error(actual, expected) < 1e-3


def test_auto_keeps_what_fits(monkeypatch):
    """Its measure of a graph, against the memory that is said to be free."""
    batches, embeds = make_batch(False)
    model, accelerator = build(False), Accelerator(cpu=True)
    step = ExactStep(accelerator.prepare_model(model, evaluation_mode=True), model.logit_scale, accelerator, SEED)
    assert step(STEP, batches, 7, embeds).graphs_kept == 4, "there is memory enough"
    with GraphMeter(model) as meter:
        outputs = model(batches[0].input_ids, batches[0].attention_mask)
    assert step._costs[0] * batches[0].input_ids.numel() == pytest.approx(meter.bytes, rel=0.1)
    del outputs
    step.budget, step._costs = None, None
    enough_for_two = 2.5 * meter.bytes * max(b.input_ids.numel() for b in batches[:2]) / batches[0].input_ids.numel()
    monkeypatch.setattr("training.step.free_memory", lambda device: (enough_for_two / 0.6) + step._state_bytes())
    assert 1 <= step(STEP, batches, 7, embeds).graphs_kept <= 3


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_kept_and_recomputed_graphs_agree_to_the_bit(precision):
    """What fits in memory may then differ between a run and its continuation."""
    results = {}
    for budget in (0.0, float("inf"), "half"):
        batches, embeds = make_batch(False)
        model, accelerator = build(False), Accelerator(cpu=True, mixed_precision=precision)
        step = ExactStep(accelerator.prepare_model(model, evaluation_mode=True), model.logit_scale, accelerator, SEED)
        step.budget = budget
        if budget == "half":
            step.budget, step._costs = 1.0, (0.5 / batches[0].input_ids.numel(), 0)
        with sparse_embedding_gradients(model, min_rows=0):
            kept = step(STEP, batches, 7, embeds).graphs_kept
        results[kept] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(results) == 3 and 0 in results and 4 in results, "none, some and all graphs were kept"
    first, *others = results.values()
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def changed_gradients(change):
    """`contrastive_gradients` whose result is changed by `change`."""

    def mutant(*args, **kwargs):
        gradients = contrastive_gradients(*args, **kwargs)
        return replace(gradients, **change(gradients))

    return lambda patch: patch.setattr("training.matryoshka.contrastive_gradients", mutant)


MUTATIONS = {
    "no replay": lambda patch: patch.setattr(torch, "manual_seed", lambda seed: None),
    "scale detached": changed_gradients(lambda g: {"logit_scale": torch.zeros(())}),
    "rows not advanced": changed_gradients(lambda g: {"text_embeds": g.text_embeds[torch.arange(7) % MICRO]}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_each_piece_is_seen(mutation, monkeypatch):
    batches, embeds = make_batch(False)
    _, expected = reference_gradients(build(False), batches, embeds)
    model = build(False)
    MUTATIONS[mutation](monkeypatch)
    _, actual = gradients_of(model, Accelerator(cpu=True), batches, embeds)
    assert largest_error(actual, expected) > 1e-2


def on_processes(number: int, folder: Path, *options: str) -> list[dict]:
    """What each process of a `torchrun` ends with."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    subprocess.run(
        [*command, str(TESTS / "exact_step_process.py"), str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.mark.parametrize("options", [[], ["--trained_images"]], ids=["frozen image tower", "both towers"])
@pytest.mark.slow
def test_two_processes_equal_one(options, tmp_path):
    batches, embeds = make_batch(bool(options))
    loss, expected = reference_gradients(build(bool(options)), batches, embeds)
    for result in on_processes(2, tmp_path / "two", *options):
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert largest_error(result["gradients"], expected) < 1e-5


@pytest.mark.slow
def test_two_processes_equal_one_with_a_teacher(tmp_path):
    batches, embeds = make_batch(True)
    _, expected = reference_gradients(build(True), batches, embeds, targets=add_taught(batches))
    for result in on_processes(2, tmp_path / "two", "--trained_images", "--taught"):
        assert largest_error(result["gradients"], expected) < 1e-5


@pytest.mark.slow
def test_gradients_left_apart_are_seen(tmp_path):
    batches, embeds = make_batch(False)
    _, expected = reference_gradients(build(False), batches, embeds)
    (result, _) = on_processes(2, tmp_path / "two", "--unsummed")
    assert largest_error(result["gradients"], expected) > 1e-2


def test_lookup_adds_to_its_rows_alone():
    table = torch.nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[1, 3, 3], [0, 1, 8]])
    factors = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    (torch.nn.functional.embedding(ids, table, padding_idx=0) * factors).sum().backward()
    expected, table.grad = table.grad, None
    for _ in range(2):
        (_Lookup.apply(table, ids, 0) * factors).sum().backward()
    torch.testing.assert_close(table.grad, 2 * expected)


def test_graph_meter_counts_what_is_saved_and_not_the_weights():
    linear = torch.nn.Linear(100, 50)
    inputs = torch.randn(30, 100)
    with GraphMeter(linear) as meter:
        torch.sigmoid(linear(inputs)).sum()
    assert meter.bytes == (30 * 100 + 30 * 50) * 4  # the input and the sigmoid's result


@pytest.mark.parametrize("size", [1, MICRO, 3, 7])
def test_micro_batches_are_in_order_of_length_and_no_wider_than_their_longest(size):
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    ids = processor(text=CAPTIONS, padding=False)["input_ids"]
    lengths = [len(tokens) for tokens in ids]
    assert lengths != sorted(lengths), "captions that come in order would prove nothing"
    batches, order = micro_batches(processor, CAPTIONS, size)
    rows = [row[mask.bool()].tolist() for b in batches for row, mask in zip(b.input_ids, b.attention_mask, strict=True)]
    assert rows == [ids[i] for i in order] and sorted(order) == list(range(len(CAPTIONS)))
    assert [len(row) for row in rows] == sorted(lengths)
    widths = [max(sorted(lengths)[start : start + size]) for start in range(0, len(lengths), size)]
    assert [batch.input_ids.shape[1] for batch in batches] == widths


def test_padding_share():
    batches, _ = micro_batches(CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer()), CAPTIONS, MICRO)
    kept = sum(int(b.attention_mask.sum()) for b in batches)
    assert padding_share(batches) == pytest.approx(1 - kept / sum(b.input_ids.numel() for b in batches))
    assert padding_share(batches) < 0.3 < 1 - kept / (7 * 77)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("trained_images", [False, True], ids=["frozen image tower", "both towers"])
def test_step_on_a_gpu(precision, tolerance, trained_images):
    """With fp16 the scaler is on, its scale taken out of the gradients before they are compared."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batches, embeds = make_batch(trained_images)
    scaler = GradScalerKwargs(init_scale=256.0)  # the default overflows at the first step, which training leaves out
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[scaler])
    autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    loss, expected = reference_gradients(build(trained_images).cuda(), batches, embeds, autocast)
    embeds = None if embeds is None else embeds.cuda()
    report, actual = gradients_of(build(trained_images).cuda(), accelerator, batches, embeds)
    assert (accelerator.scaler is not None) == (precision == "fp16")
    assert report.loss == pytest.approx(loss, rel=1e-4)
    assert largest_error(actual, expected) < tolerance
