"""transformers' `Trainer` with an exact contrastive batch, for those whose training is built on it.

`Trainer` takes the loss of every micro-batch by itself: with `gradient_accumulation_steps` each text is compared with
the images of its own micro-batch alone. Here the micro-batches of an optimiser step are one batch under one loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES
from training.batches import MicroBatch
from training.inputs import embed_pixels
from training.whole_batch import WholeBatch

REQUIRED_INPUTS = ("input_ids", "attention_mask", "pixel_values")


class ExactBatchTrainer(Trainer):
    """`Trainer` for `CapivaraModel`, on one device; ValueError on several, where `train_accelerate.py` is exact.

    The contrastive batch is `per_device_train_batch_size` times `gradient_accumulation_steps` pairs; the former alone
    decides how many go through the towers at once. The loss that is logged is that of the whole batch. Batches hold
    what `CapivaraProcessor` gives for texts and images, padded each for itself, and `return_loss=True` where there is
    an evaluation.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1:
            raise ValueError(
                f"ExactBatchTrainer is for one device, got {self.accelerator.num_processes} processes of "
                f"{self.args.n_gpu} GPUs; train_accelerate.py has one exact batch over several."
            )
        self._whole_batch, self._step_batches, self._micro_step = None, [], 0

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Any]:
        """As in transformers; the micro-batches of a step are kept for `training_step`."""
        self._step_batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_step = 0
        return self._step_batches, items

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the whole batch with its last micro-batch, nothing with those before; the loss likewise."""
        self._micro_step += 1
        if self._micro_step < len(self._step_batches):
            return torch.zeros((), device=self.args.device)
        model.train()
        if self._whole_batch is None:
            self._whole_batch = WholeBatch(model, self.accelerator, self.args.seed)
        batches = _micro_batches(self._step_batches)
        pairs, image_embeds = sum(len(batch.input_ids) for batch in batches), None
        names = [name for name, p in self.accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
        if not any(name.startswith(IMAGE_ENCODER_PREFIXES) for name in names):
            image_embeds = torch.cat([embed_pixels(model, batch.pixel_values, self.accelerator) for batch in batches])
            for batch in batches:
                batch.pixel_values = None  # embedded once, and not with the texts again
        report = self._whole_batch(self.state.global_step, batches, pairs, image_embeds)
        return torch.tensor(report.loss, device=self.args.device)


def _micro_batches(samples: Sequence[dict]) -> list[MicroBatch]:
    batches, start = [], 0
    for sample in samples:
        if missing := [name for name in REQUIRED_INPUTS if name not in sample]:
            raise ValueError(
                f"A batch must hold {', '.join(REQUIRED_INPUTS)}, as CapivaraProcessor gives them; {', '.join(missing)} is "
                f"missing from {', '.join(sample)}. With a collator of your own, set remove_unused_columns=False."
            )
        batches.append(MicroBatch(len(batches), start, *(sample[name] for name in REQUIRED_INPUTS)))
        start += len(sample["input_ids"])
    return batches
