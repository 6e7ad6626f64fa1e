"""One process of the test of the exact step: `torchrun --nproc_per_node N tests/exact_step_process.py OUT [options]`.

It takes its share of the micro-batches and saves gradients that the main process, or every process, ends with.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from accelerate import Accelerator
from tiny import randomise, tiny_config, tiny_tokenizer

from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from training.contrastive import TextTargets
from training.step import ExactStep, micro_batches, sparse_embedding_gradients

CAPTIONS = ["gato", "uma foto de um gato azul", "a casa", "o carro verde e a árvore", "pão", "são joão", "água"]
ALONE = ["o mar", "uma pedra na praia"]  # without an image
SEED, STEP, MICRO, PAIRS = 5, 3, 2, 7


def build(trained_images: bool, checkpointing: bool = False) -> CapivaraModel:
    model = randomise(CapivaraModel(tiny_config()))
    if not trained_images:
        model.freeze_image_tower()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def make_batch(trained_images: bool, size: int = MICRO):
    """Micro-batches of the seven captions, and their image embeddings, or their pixels within."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    batches, order = micro_batches(processor, CAPTIONS, size)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(7, 24, generator=generator), dim=-1)[order]
    pixels = torch.randn(7, 3, 32, 32, generator=generator)[order]
    if trained_images:
        for batch in batches:
            batch.pixel_values = pixels[batch.positions]
    return batches, None if trained_images else embeds


def add_taught(batches: list, loss: str = "both") -> TextTargets:
    """Micro-batches of texts without an image after the others, and what a teacher makes of all texts."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    batches += micro_batches(processor, ALONE, MICRO, len(batches), len(CAPTIONS))[0]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.nn.functional.normalize(torch.randn(len(CAPTIONS + ALONE), 24, generator=generator), dim=-1)
    return TextTargets(embeds, 0.7, loss)


def gradients_of(
    model,
    accelerator,
    batches,
    image_embeds,
    accumulation="recompute",
    targets=None,
    pairs=PAIRS,
    dims=(),
    hardness=0.0,
):
    """Loss and gradients of the engine, name -> tensor."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # autocast, no wrapper
    own = [batch for batch in batches if batch.index % accelerator.num_processes == accelerator.process_index]
    with sparse_embedding_gradients(model, min_rows=0):
        step = ExactStep(prepared, model.logit_scale, accelerator, SEED, accumulation, dims, hardness)
        report = step(STEP, own, pairs, image_embeds, targets)
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1
    return report, {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--trained_images", action="store_true")
    parser.add_argument("--taught", action="store_true")
    parser.add_argument("--unsummed", action="store_true", help="the mutation: gradients are left unsummed")
    args = parser.parse_args()
    if args.unsummed:
        ExactStep._sum_over_processes = lambda self: None
    accelerator = Accelerator(cpu=True)
    batches, embeds = make_batch(args.trained_images)
    targets = add_taught(batches) if args.taught else None
    report, gradients = gradients_of(build(args.trained_images), accelerator, batches, embeds, "recompute", targets)
    rank = accelerator.process_index
    torch.save({"loss": report.loss, "gradients": gradients}, args.output / f"{rank}.pt")
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
