"""Train with `transformers.Trainer` on exact contrastive batches, in projects that already use `Trainer`.

`Trainer` computes a separate loss for every micro-batch. With `gradient_accumulation_steps`, each text is therefore
compared only with the images of its own micro-batch. `ExactBatchTrainer` computes one loss over all micro-batches of an
optimizer step.
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

# Keys that every batch from the data collator must have, in the order of the fields of `MicroBatch`.
REQUIRED_INPUTS = ("input_ids", "attention_mask", "pixel_values")


class ExactBatchTrainer(Trainer):
    """`transformers.Trainer` for `CapivaraModel` with one contrastive loss per optimizer step, on a single device.

    A text is compared with all images of the step, not only with those of its micro-batch.

    It takes the same arguments as `Trainer`. A step has `per_device_train_batch_size` times
    `gradient_accumulation_steps` pairs. The data collator must return what `CapivaraProcessor` returns for texts and
    images, and for evaluation also `return_loss=True`. Micro-batches may be padded to different lengths.

    Raises:
        ValueError: If there are several processes or GPUs. Use `train_accelerate.py` there.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1:
            raise ValueError(
                f"ExactBatchTrainer needs a single device, got {self.accelerator.num_processes} processes with "
                f"{self.args.n_gpu} GPUs each. Use train_accelerate.py, whose batch extends over several devices."
            )
        self._whole_batch, self._step_batches, self._micro_step = None, [], 0

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Any]:
        """Get the micro-batches of an optimizer step as `Trainer` does, and store them for `training_step`.

        `training_step` needs all of them at once, because it computes one loss over the whole batch.

        Returns:
            The result of `Trainer.get_batch_samples`, a tuple (micro-batches, number of items in them or None).
        """
        self._step_batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_step = 0
        return self._step_batches, items

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradients of the whole batch when `Trainer` passes the last micro-batch of the step.

        Args:
            model: The model.
            inputs: Not used, because `get_batch_samples` has stored all micro-batches of the step.
            num_items_in_batch: Not used.

        Returns:
            For the last micro-batch, the loss of the whole batch. For all others, zero.

        Raises:
            ValueError: If a micro-batch lacks one of `REQUIRED_INPUTS`.
        """
        self._micro_step += 1
        # `Trainer` logs the sum of the losses of all micro-batches, so only the last one returns a loss.
        if self._micro_step < len(self._step_batches):
            return torch.zeros((), device=self.args.device)
        model.train()
        if self._whole_batch is None:
            self._whole_batch = WholeBatch(model, self.accelerator, self.args.seed)
        batches = _wrap_batches_as_micro_batches(self._step_batches)
        pairs, image_embeds = sum(len(batch.input_ids) for batch in batches), None
        names = [name for name, p in self.accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
        if not any(name.startswith(IMAGE_ENCODER_PREFIXES) for name in names):
            image_embeds = torch.cat([embed_pixels(model, batch.pixel_values, self.accelerator) for batch in batches])
            # The images are already embedded. Their pixels are removed, so that `WholeBatch` does not embed them again.
            for batch in batches:
                batch.pixel_values = None
        report = self._whole_batch(self.state.global_step, batches, pairs, image_embeds)
        return torch.tensor(report.loss, device=self.args.device)


def _wrap_batches_as_micro_batches(samples: Sequence[dict]) -> list[MicroBatch]:
    """Convert the batches that a data collator returned to micro-batches.

    Args:
        samples: Batches of the data collator. Each is a dict `{name of the model input: tensor}`.

    Raises:
        ValueError: If a batch lacks one of `REQUIRED_INPUTS`.
    """
    batches, start = [], 0
    for sample in samples:
        if missing := [name for name in REQUIRED_INPUTS if name not in sample]:
            raise ValueError(
                f"A batch must have {', '.join(REQUIRED_INPUTS)}, as CapivaraProcessor returns them; "
                f"{', '.join(missing)} is missing, the batch has only {', '.join(sample)}. With your own data "
                "collator, set remove_unused_columns=False."
            )
        batches.append(MicroBatch(len(batches), start, *(sample[name] for name in REQUIRED_INPUTS)))
        start += len(sample["input_ids"])
    return batches
