"""Run the training loop, from the first step or a checkpoint to the last step.

For each optimizer step, the loop plans the batch, loads its images, computes the gradients and updates the weights. At
regular intervals, it evaluates the model on the validation split and saves a checkpoint.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from capivara_common.image_files import BadImage
from caption_data.pairs import check_bad_share
from caption_data.rows import SkippedRow, write_skipped_rows
from eval.capivara_metrics.metrics import mean_recall
from eval.retrieval import embed_captions_for_retrieval
from modeling_capivara.two_towers import embedding_width, uses_sigmoid_loss
from training.arguments import RunArguments, resolve_loading_workers
from training.batches import MicroBatch, StepPlan
from training.checkpoints import Checkpoints, TrainingState
from training.inputs import TrainingInputs, embed_pixels, prefetch_pixels, read_cached_step_image_embeds
from training.run_folder import handle_signals_temporarily
from training.trainable import build_optimizer, clamp_logit_scale, learning_rate_at
from training.whole_batch import WholeBatch, select_loss

logger = logging.getLogger("capivara")
# Number of consecutive steps whose gradients may overflow in fp16. The gradient scaler halves its scale at each of
# these steps. If gradients still overflow after 20 steps, the loss itself has diverged.
MAX_CONSECUTIVE_OVERFLOWS = 20
# Number of step plans to keep in memory. A `StepPlan` lists the images and captions of one optimizer step. Worker
# processes load images several steps ahead, and the loop needs the plans of these steps again later.
CACHED_PLANS = 16


@dataclass
class TrainingLoop:
    """Training loop of one run. The method `train` trains the model from step 0, or from a checkpoint, to the end."""

    args: RunArguments  # arguments of the run
    inputs: TrainingInputs  # pairs with their images, and the validation split
    model: PreTrainedModel  # the model without peft's wrapper; LoRA adapters, if any, are inside of its linear layers
    wrapped_model: nn.Module  # peft's wrapper around the model if there are LoRA adapters, otherwise `model` itself
    checkpoints: Checkpoints  # checkpoints of the run; their `accelerator` has device, precision and processes
    state: TrainingState  # progress of the run
    overflows: int = field(default=0, init=False)  # number of consecutive steps whose gradients have overflowed in fp16

    def train(self, resume: Path | None = None) -> TrainingState:
        """Train the model until `args.max_steps` optimizer steps are complete.

        Args:
            resume: Folder of the checkpoint to resume from. None: start at step 0 with the current weights.

        Returns:
            The state of the run after the last step.

        Raises:
            KeyboardInterrupt: After SIGTERM or Ctrl-C, when the current step is saved. Its arguments are the number of
                the signal and a message.
            FloatingPointError: If the loss, a gradient or an embedding is not finite.
            ValueError: If the checkpoint does not belong to this run, or too many images can't be used.
            OSError: If a checkpoint can't be written.
        """
        args, accelerator = self.args, self.checkpoints.accelerator
        self.accelerator = accelerator
        # `WholeBatch` sums the gradients of all processes itself, once per step. evaluation_mode=True keeps Accelerate
        # from adding the wrapper DistributedDataParallel, which would average the gradients at every micro-batch.
        self.prepared_model = accelerator.prepare_model(self.wrapped_model, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(self.wrapped_model, args))
        if resume:
            self.state = self.checkpoints.load(resume, self.state)
        state, self.planner = self.state, self.inputs.make_planner(args)
        self.inputs.skipped += [SkippedRow(**row) for row in state.skipped]
        self._write_skipped()
        self.compute_gradients = WholeBatch(self.prepared_model, accelerator, args.seed)
        if not state.curve:
            state.curve.append({"step": 0, "validation": self._measure_validation()})
        self.start_time, size = time.perf_counter() - state.seconds, args.effective_batch_size
        bar = tqdm(
            total=args.max_steps * size, initial=state.step * size, desc=f"Training, seed {args.seed}", unit="pair",
            unit_scale=True, disable=not accelerator.is_main_process,
        )  # fmt: skip
        self.received_signals = []
        with (
            handle_signals_temporarily(self._handle_stop_signal, signal.SIGTERM, signal.SIGINT),
            ThreadPoolExecutor(1) as self.executor,
            bar,
        ):
            plans = lru_cache(CACHED_PLANS)(lambda step: self.executor.submit(self.planner, step))
            pixels = self._prefetch_steps(plans)
            while state.step < args.max_steps:
                started = time.perf_counter()
                plan = plans(state.step).result()
                # Start planning the next step in the executor's thread, so that its plan is ready when this step is
                # done.
                plans(min(state.step + 1, args.max_steps - 1))
                try:
                    point = self._run_step(plan, pixels, started)
                    bar.set_postfix(loss=f"{point['loss']:.3f}", lr=f"{point['learning_rate']:.1e}")
                    bar.update(size)
                    self._finish_step(point)
                except FloatingPointError as error:
                    hint = "Lower the learning rate or use --mixed_precision no."
                    raise FloatingPointError(f"Step {plan.step + 1}: {error} {hint}") from error
                if self.received_signals:
                    accelerator.set_trigger()
                # `check_trigger` is true in all processes if one process has set the trigger, so all stop after the
                # same step.
                if accelerator.check_trigger():
                    self.checkpoints.save(state)
                    number = self.received_signals[0][0] if self.received_signals else signal.SIGTERM
                    raise KeyboardInterrupt(number, f"Stopped after step {state.step}, which is saved.")
        # Accelerate has replaced `forward` by a version with mixed precision (autocast). The original `forward` is
        # restored, so that base and trained model are evaluated in the same precision.
        accelerator.unwrap_model(self.prepared_model, keep_fp32_wrapper=False).eval()
        accelerator.free_memory()
        return state

    def _handle_stop_signal(self, number: int, frame: object) -> None:
        """Request a stop after the current step. A second Ctrl-C stops the run immediately.

        A second signal within one second of the first is ignored, because a single Ctrl-C can reach a process twice:
        from the terminal and from the launcher of the process.

        Args:
            number: Number of the signal.
            frame: Not used; Python passes the current stack frame.

        Raises:
            KeyboardInterrupt: At the second Ctrl-C.
        """
        self.received_signals.append((number, time.monotonic()))
        if len(self.received_signals) == 1:
            logger.info("Stopping after this step; the run will be saved.")
        elif number == signal.SIGINT and self.received_signals[-1][1] - self.received_signals[0][1] > 1:
            raise KeyboardInterrupt

    def _run_step(self, plan: StepPlan, pixels: Iterator[list] | None, started: float) -> dict:
        """Run one optimizer step.

        Args:
            plan: Plan of the step.
            pixels: Iterator over preloaded images, see `_prefetch_steps`. None if image embeddings are cached.
            started: Value of `time.perf_counter()` before the plan was requested.

        Returns:
            The entry of this step for the training curve: `step` (counted from 1), `loss`, `learning_rate`, and
            measurements of gradient, speed and memory.

        Raises:
            FloatingPointError: If the loss, a gradient or an embedding is not finite.
        """
        plan, image_embeds = self._load_image_embeds(plan, pixels)
        waited = time.perf_counter() - started
        # Switch to training mode only now that the images are embedded. The image tower may have batch norms, which
        # would give other embeddings in training mode.
        self.wrapped_model.train()
        self.optimizer.zero_grad(set_to_none=False)
        learning_rate = learning_rate_at(plan.step, self.args)
        report = self.compute_gradients(plan.step, self._local_batches(plan), len(plan.rows), image_embeds)
        norm = self._update_weights(learning_rate)
        seconds, device = time.perf_counter() - started, self.accelerator.device
        resident_bytes = psutil.Process().memory_info().rss
        return {
            "step": plan.step + 1,
            "loss": report.loss,
            "learning_rate": learning_rate,
            "logit_scale": self.model.logit_scale.item(),
            "gradient_norm": norm,
            "pairs_per_second": len(plan.rows) / seconds,
            "data_share_of_time": waited / seconds,
            # On a GPU, the largest memory that was allocated so far; on a CPU, the current memory of this process.
            "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes,
        }

    def _update_weights(self, learning_rate: float) -> float | None:
        """Apply the gradients with the optimizer, then clamp the logit scale.

        Args:
            learning_rate: Learning rate of this step.

        Returns:
            The norm of the gradient of all parameters. None if it overflowed in fp16, so that the scaler skipped the
            step.

        Raises:
            FloatingPointError: If the norm is not finite. With fp16, this is raised only after more than
                `MAX_CONSECUTIVE_OVERFLOWS` such steps in a row.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.wrapped_model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows and self.accelerator.scaler is None:
            raise FloatingPointError(f"The norm of the gradient is {norm}, not a finite number.")
        if self.overflows > MAX_CONSECUTIVE_OVERFLOWS:
            raise FloatingPointError(f"The gradient overflowed in fp16 for {self.overflows} steps in a row.")
        self.optimizer.step()  # with fp16, the scaler skips the step if a gradient is not finite
        # With a sigmoid loss (SigLIP), the logit scale is not clamped, because it can exceed CLIP's limit of 100.
        if self.model.logit_scale.requires_grad and not uses_sigmoid_loss(self.model):
            clamp_logit_scale(self.model.logit_scale)
        return None if self.overflows else norm

    def _finish_step(self, point: dict) -> None:
        """Update the state of the run after a step, then evaluate and save a checkpoint if this is due.

        Both are due at regular intervals and after the last step. A new best validation recall saves a checkpoint, too.

        Args:
            point: Entry of the step for the training curve. The results of an evaluation are added as `validation`.

        Raises:
            FloatingPointError: If the model's embeddings of the validation split are not finite.
            OSError: If a checkpoint can't be written.
        """
        args, state = self.args, self.state
        state.step = point["step"]
        last = state.step == args.max_steps
        # A run of at most `save_steps` steps writes no checkpoints, not even after its last step.
        checkpointed = args.max_steps > args.save_steps
        due = checkpointed and (last or state.step % args.save_steps == 0)
        if last or state.step % args.eval_steps == 0:
            try:
                point["validation"] = measures = self._measure_validation()
            except ValueError as error:
                # The same evaluation succeeded before the first step. If it fails now, training has made the weights
                # NaN or infinite.
                raise FloatingPointError(str(error)) from error
            recall = measures["mean_recall"]
            if checkpointed and (state.best_recall is None or recall > state.best_recall):
                state.best_step, state.best_recall, due = state.step, recall, True
        state.curve.append(point)
        state.seconds = time.perf_counter() - self.start_time
        logged = point | {f"validation/{name}": value for name, value in point.get("validation", {}).items()}
        logged = {key: value for key, value in logged.items() if isinstance(value, float | int) and key != "step"}
        self.accelerator.log(logged, step=state.step)
        if due:
            self.checkpoints.save(state)

    def _load_image_embeds(self, plan: StepPlan, pixels: Iterator[list] | None) -> tuple[StepPlan, Tensor]:
        """Load the image embeddings of a step from the cache, or compute them with the frozen image tower.

        Args:
            plan: Plan of the step.
            pixels: Iterator over preloaded images, see `_prefetch_steps`. None if image embeddings are cached.

        Returns:
            The plan, in which pairs with unusable images have been replaced, and the embeddings, (pairs, width), on the
            device.

        Raises:
            ValueError: If more than `max_bad_share` of the images can't be used, or no replacement is left.
        """
        if pixels is None:
            return plan, read_cached_step_image_embeds(self.inputs.training, plan).to(self.accelerator.device)
        self.model.vision_model.eval()
        embeds = torch.zeros(len(plan.rows), embedding_width(self.model.config), device=self.accelerator.device)
        parts = self._local_places(plan)
        while True:
            bad = []
            for places in parts:
                images = dict(zip(places.tolist(), next(pixels), strict=True))
                bad += [(place, images.pop(place)) for place in [*images] if isinstance(images[place], BadImage)]
                if images:
                    stacked = torch.stack([*images.values()])
                    embeds[[*images]] = embed_pixels(self.prepared_model, stacked, self.accelerator)
            # Collect the unusable images of all processes. They are sorted by position in the batch, so that their
            # replacements do not depend on the number of processes.
            bad = dict(sorted(gather_object(bad), key=lambda item: item[0]))
            if not bad:
                # Each process has filled the rows of its own images and left all others zero. The sum over all
                # processes has all embeddings.
                return plan, self.accelerator.reduce(embeds, "sum")
            self._record_bad_images(plan, bad)
            plan = self.executor.submit(self.planner.replace_pairs, plan, [*bad]).result()
            parts = self._local_places(plan, bad)
            pixels = prefetch_pixels(self.inputs.training, map(plan.items, parts), 0)

    def _record_bad_images(self, plan: StepPlan, bad: dict[int, BadImage]) -> None:
        """Record the rows of unusable images in the state of the run and in skipped.jsonl. A row is listed only once.

        Args:
            plan: Plan of the step.
            bad: A dict `{position in the batch: reason why the image can't be used}`.

        Raises:
            ValueError: If more than `max_bad_share` of the training rows are unusable. If a step is complete, a
                checkpoint is saved first, so that the run can be resumed.
        """
        inputs, recorded = self.inputs, self.state.skipped
        for place, image in bad.items():
            pairs = inputs.training[plan.dataset_indices[place]]
            row = pairs.table[int(plan.rows[place])]["row"]
            skipped = SkippedRow(pairs.source.name, pairs.source.split, row, image.reason, image.detail)
            if asdict(skipped) not in recorded:
                recorded.append(asdict(skipped))
                inputs.skipped.append(skipped)
                logger.warning("%s, row %d: %s. Other pairs are used instead.", pairs.source.display_name, row, image)
        self._write_skipped()
        # Rows whose image turned out to be unusable during training are in both `inputs.training` and `inputs.skipped`.
        # `recorded` lists them, so subtracting its length counts each row once.
        rows = sum(map(len, inputs.training)) + len(inputs.skipped) - len(recorded)
        try:
            check_bad_share(inputs.skipped, rows, self.args.max_bad_share)
        except ValueError as error:
            if not self.state.step:
                raise
            self.checkpoints.save(self.state)
            raise ValueError(
                f"{error} Step {self.state.step} is saved. To go on, use --resume auto and a larger --max_bad_share."
            ) from error

    def _write_skipped(self) -> None:
        """Write skipped.jsonl, the list of all training rows that can't be used, into the folder of the run."""
        if self.accelerator.is_main_process:
            write_skipped_rows(self.checkpoints.folder.parent / "skipped.jsonl", self.inputs.skipped)

    def _prefetch_steps(self, plans: Callable[[int], Future]) -> Iterator[list[Tensor | BadImage]] | None:
        """Start loading the images of all remaining steps.

        Args:
            plans: Function that gets the number of a step and returns a `Future` with the step's plan.

        Returns:
            An iterator over the batches of images that this process embeds, see `prefetch_pixels`. None if image
            embeddings are cached.
        """
        if self.inputs.training[0].vectors is not None:
            return None
        steps = (plans(step).result() for step in range(self.state.step, self.args.max_steps))
        items = (plan.items(places) for plan in steps for places in self._local_places(plan))
        workers = resolve_loading_workers(self.args, self.accelerator.device)
        return prefetch_pixels(self.inputs.training, items, workers)

    def _local_places(self, plan: StepPlan, among: Container[int] | None = None) -> Sequence[Tensor]:
        """Return the positions of the images that this process embeds, in the batch of all processes.

        Args:
            plan: Plan of the step.
            among: Positions to choose from. None: all positions of the batch.

        Returns:
            Tensors of at most `embedding_batch_size` positions. The images of a tensor go through the image tower
            together.
        """
        local = [place for batch in self._local_batches(plan) for place in batch.positions.tolist()]
        if among is not None:
            local = [place for place in local if place in among]
        return torch.tensor(local).split(self.args.embedding_batch_size) if local else []

    def _local_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """Return the micro-batches of this process.

        With n processes, each gets every n-th micro-batch, so that all processes get short and long texts.
        """
        return plan.batches[self.accelerator.process_index :: self.accelerator.num_processes]

    @torch.no_grad()
    def _measure_validation(self) -> dict[str, float]:
        """Evaluate the model on the validation split in the main process, and send the results to all processes.

        Returns:
            A dict with the keys "text_to_image" and "image_to_text" (mean recall of this direction, from 0 to 1),
            "mean_recall" (the mean of both) and "loss" (in nats, over all images, each paired with its first caption).
        """
        measures, inputs = [None], self.inputs
        if self.accelerator.is_main_process:
            model, captions = self.model.eval(), inputs.validation.captions()
            embeddings = embed_captions_for_retrieval(model, inputs.processor, captions, inputs.validation_embeds)
            recalls = {direction: mean_recall(ranks) for direction, ranks in embeddings.ranks.items()}
            rows = torch.arange(len(embeddings.image_embeds))
            # The loss compares each image with its first caption.
            texts = embeddings.text_embeds[torch.searchsorted(embeddings.image_of_text, rows)]
            loss = select_loss(self.model)(texts, embeddings.image_embeds, self.model.logit_scale, rows)
            measures = [recalls | {"mean_recall": sum(recalls.values()) / len(recalls), "loss": loss.item()}]
        return broadcast_object_list(measures)[0]
