"""Run `WholeBatch` in two and then three processes: `python tests/whole_batch_process.py OUT`.

Each process takes its share of the micro-batches of every variant and saves the loss and the gradients to OUT. The
processes are forks of this one, which has not used torch yet, with the environment variables that torchrun sets.
`tests/test_whole_batch.py` compares the results with one graph over the whole batch.
"""

import os
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from accelerate import Accelerator
from tiny import randomize, tiny_config, tiny_tokenizer
from transformers import PreTrainedModel, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.two_towers import freeze_image_encoder
from training.batches import tokenize_into_sorted_micro_batches
from training.whole_batch import WholeBatch

CAPTIONS = ["gato", "uma foto de um gato azul", "a casa", "o carro verde e a árvore", "pão", "são joão", "água"]
SEED, STEP, MICRO = 5, 3, 2
SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = SiglipConfig(
    text_config=SIZES | {"vocab_size": 300, "max_position_embeddings": 64, "projection_size": 24},
    vision_config=SIZES | {"image_size": 32, "patch_size": 16},
)
# Variants of 7 pairs in micro-batches of 2: whether the image tower is trained; how many micro-batches the first
# process takes (the others share the rest; None: equal shares); and whether the model is a SigLIP in float64.
VARIANTS = {"even": (False, None, False), "trained": (True, None, False), "unequal": (False, 3, False)}
VARIANTS |= {"none": (True, 0, False), "sigmoid": (False, None, True), "sigmoid, unequal": (True, 3, True)}


def build(trained_images: bool, checkpointing: bool = False, siglip: bool = False) -> PreTrainedModel:
    """Build a tiny model with random weights, in training mode."""
    model = randomize(SiglipModel(SIGLIP).double() if siglip else CapivaraModel(tiny_config()))
    if not trained_images:
        freeze_image_encoder(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def make_batch(trained_images: bool, size: int = MICRO, captions: list[str] = CAPTIONS, siglip: bool = False):
    """Make micro-batches of captions, and image embeddings; if images are trained, None and pixels in the batches."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    if siglip:
        processor = SiglipProcessor(SiglipImageProcessor(), tiny_tokenizer())
        processor.tokenizer.model_max_length = SIGLIP.text_config.max_position_embeddings
    batches, order = tokenize_into_sorted_micro_batches(processor, captions, size)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(len(captions), 24, generator=generator), dim=-1)[order]
    pixels = torch.randn(len(captions), 3, 32, 32, generator=generator)[order]
    if trained_images:
        for batch in batches:
            batch.pixel_values = (pixels.double() if siglip else pixels)[batch.positions]
    return batches, None if trained_images else embeds


def gradients_of(model, accelerator, batches, image_embeds, budget: float | None = 0.0, local_batches=None):
    """Return the report and the gradients (name -> tensor) of a step; by default this process takes all batches."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper
    step = WholeBatch(prepared, accelerator, SEED, budget)
    pairs = sum(len(batch.input_ids) for batch in batches)
    report = step(STEP, batches if local_batches is None else local_batches, pairs, image_embeds)
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1
    return report, {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}


def take_part(folder: Path) -> None:
    """Compute the gradients of every variant as one of several processes, and save them."""
    accelerator, results = Accelerator(cpu=True), {}
    rank, number = accelerator.process_index, accelerator.num_processes
    for variant, (trained_images, first, siglip) in VARIANTS.items():
        batches, embeds = make_batch(trained_images, siglip=siglip)
        local_batches = batches[rank::number]
        if first is not None:
            local_batches = batches[:first] if rank == 0 else batches[first:][rank - 1 :: number - 1]
        model = build(trained_images, siglip=siglip)
        report, gradients = gradients_of(model, accelerator, batches, embeds, local_batches=local_batches)
        results[variant] = {"loss": report.loss, "gradients": gradients}
    torch.save(results, folder / f"{rank} of {number}.pt")
    accelerator.end_training()


def main(folder: Path) -> None:
    for number in (2, 3):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
        for rank in range(number):
            if not os.fork():
                os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(number))
                return take_part(folder)
        if any([os.wait()[1] for _ in range(number)]):
            sys.exit(f"One of {number} processes has failed.")
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
