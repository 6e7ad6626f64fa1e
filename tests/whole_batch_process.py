"""One process of the test of the whole batch: `torchrun --nproc_per_node N tests/whole_batch_process.py OUT`.

It takes its share of the micro-batches of each variant and saves the gradients that it ends with.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from accelerate import Accelerator
from tiny import randomise, tiny_config, tiny_tokenizer

from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from training.batches import micro_batches
from training.whole_batch import WholeBatch

CAPTIONS = ["gato", "uma foto de um gato azul", "a casa", "o carro verde e a árvore", "pão", "são joão", "água"]
SEED, STEP, MICRO = 5, 3, 2
# Whether the image tower is trained, and the micro-batches of the first process; the others share the rest.
VARIANTS = {"even": (False, None), "trained": (True, None), "unequal": (False, 3), "none": (True, 0)}


def build(trained_images: bool, checkpointing: bool = False) -> CapivaraModel:
    model = randomise(CapivaraModel(tiny_config()))
    if not trained_images:
        model.freeze_image_tower()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def make_batch(trained_images: bool, size: int = MICRO, captions: list[str] = CAPTIONS):
    """Micro-batches of the captions, and their image embeddings, or their pixels within."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    batches, order = micro_batches(processor, captions, size)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(len(captions), 24, generator=generator), dim=-1)[order]
    pixels = torch.randn(len(captions), 3, 32, 32, generator=generator)[order]
    if trained_images:
        for batch in batches:
            batch.pixel_values = pixels[batch.positions]
    return batches, None if trained_images else embeds


def gradients_of(model, accelerator, batches, image_embeds, budget: float | None = 0.0, loss=None, own=None):
    """Report and gradients of a step, name -> tensor; `own` are the micro-batches of this process."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper
    step = WholeBatch(prepared, model.logit_scale, accelerator, SEED, loss, budget)
    pairs = sum(len(batch.input_ids) for batch in batches)
    report = step(STEP, batches if own is None else own, pairs, image_embeds)
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1
    return report, {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    accelerator, results = Accelerator(cpu=True), {}
    rank, number = accelerator.process_index, accelerator.num_processes
    for variant, (trained_images, first) in VARIANTS.items():
        batches, embeds = make_batch(trained_images)
        own = batches[rank::number]
        if first is not None:
            own = batches[:first] if rank == 0 else batches[first:][rank - 1 :: number - 1]
        report, gradients = gradients_of(build(trained_images), accelerator, batches, embeds, own=own)
        results[variant] = {"loss": report.loss, "gradients": gradients}
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
