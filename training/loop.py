"""The loop over optimiser steps: plan, images, gradients, optimiser, measurement, checkpoint."""

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
from eval.retrieval import compute_validation_metrics, embed_captions
from modeling_capivara.two_towers import embedding_width, uses_sigmoid_loss
from training.arguments import RunArguments
from training.batches import MicroBatch, StepPlan
from training.checkpoints import Checkpoints, TrainingState, handle_signals
from training.inputs import TrainingInputs, embed_pixels, load_cached_embeds, prefetch_pixels, resolve_loading_workers
from training.trainable import build_optimizer, clamp_logit_scale, learning_rate_at
from training.whole_batch import WholeBatch, select_loss

logger = logging.getLogger("capivara")
MAX_CONSECUTIVE_OVERFLOWS = 20  # the scaler halves its scale at each; after as many, the loss itself is at fault
CACHED_PLANS = 16  # steps whose plan is drawn once, though the images of several are read ahead


@dataclass
class TrainingLoop:
    """The training of one model."""

    args: RunArguments
    inputs: TrainingInputs  # pairs, their images, and the validation split
    model: PreTrainedModel  # the plain model; its adapters, where there are any, are in it
    wrapped_model: nn.Module  # what is trained: the model, or peft's wrapper around it
    checkpoints: Checkpoints  # of the run, with its device, precision and processes
    state: TrainingState  # where the run is
    overflows: int = field(default=0, init=False)  # in a row, of fp16

    def train(self, resume: Path | None = None) -> TrainingState:
        """Train to `max_steps`.

        Raises KeyboardInterrupt at SIGTERM and Ctrl-C, with its number and what to say, a checkpoint being written;
        FloatingPointError, with the step, where loss or gradient is not finite; OSError as of `Checkpoints.save`.
        """
        args, accelerator = self.args, self.checkpoints.accelerator
        self.accelerator = accelerator
        self.prepared_model = accelerator.prepare_model(self.wrapped_model, evaluation_mode=True)  # see WholeBatch
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(self.wrapped_model, args))
        if resume:
            self.state = self.checkpoints.load(resume, self.state)
        state, self.planner = self.state, self.inputs.make_planner(args)
        self.inputs.skipped += [SkippedRow(**line) for line in state.skipped]
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
            handle_signals(self._handle_stop_signal, signal.SIGTERM, signal.SIGINT),
            ThreadPoolExecutor(1) as self.executor,
            bar,
        ):
            plans = lru_cache(CACHED_PLANS)(lambda step: self.executor.submit(self.planner, step))
            pixels = self._prefetch_steps(plans)
            while state.step < args.max_steps:
                started = time.perf_counter()
                plan = plans(state.step).result()
                plans(min(state.step + 1, args.max_steps - 1))  # drawn while this step computes
                try:
                    point = self._run_step(plan, pixels, started)
                    bar.set_postfix(loss=f"{point['loss']:.3f}", lr=f"{point['learning_rate']:.1e}")
                    bar.update(size)
                    self._finish_step(point)
                except FloatingPointError as error:
                    way_out = "Lower the learning rate or use --mixed_precision no."
                    raise FloatingPointError(f"Step {plan.step + 1}: {error} {way_out}") from error
                if self.received_signals:
                    accelerator.set_trigger()
                if accelerator.check_trigger():  # of any process: all stop after the same step
                    self.checkpoints.save(state)
                    number = self.received_signals[0][0] if self.received_signals else signal.SIGTERM
                    raise KeyboardInterrupt(number, f"Stopped at step {state.step}, which is saved.")
        # Without Accelerate's autocast around `forward`: base and result are measured in the same precision.
        accelerator.unwrap_model(self.prepared_model, keep_fp32_wrapper=False).eval()
        accelerator.free_memory()
        return state

    def _handle_stop_signal(self, number: int, frame: object) -> None:
        """SIGTERM and Ctrl-C end the run after its step, a second Ctrl-C at once.

        A launcher passes on what the terminal has sent already: what comes within a second is the same Ctrl-C.
        """
        self.received_signals.append((number, time.monotonic()))
        if len(self.received_signals) == 1:
            logger.info("Stopping after this step; the run will be saved.")
        elif number == signal.SIGINT and self.received_signals[-1][1] - self.received_signals[0][1] > 1:
            raise KeyboardInterrupt

    def _run_step(self, plan: StepPlan, pixels: Iterator[list] | None, started: float) -> dict:
        """One optimiser step, whose plan was awaited from `started` on; returns its entry of the curve."""
        plan, image_embeds = self._load_image_embeds(plan, pixels)
        waited = time.perf_counter() - started
        self.wrapped_model.train()  # the image tower, whose batch norms would be moved, is not run in it
        self.optimizer.zero_grad(set_to_none=False)
        learning_rate = learning_rate_at(plan.step, self.args)
        report = self.compute_gradients(plan.step, self._local_batches(plan), len(plan.rows), image_embeds)
        norm = self._update_weights(learning_rate)
        seconds, device = time.perf_counter() - started, self.accelerator.device
        held = psutil.Process().memory_info().rss  # by this process; on a GPU, the most that it has held
        return {
            "step": plan.step + 1,
            "loss": report.loss,
            "learning_rate": learning_rate,
            "logit_scale": self.model.logit_scale.item(),
            "gradient_norm": norm,
            "pairs_per_second": len(plan.rows) / seconds,
            "data_share_of_time": waited / seconds,
            "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held,
        }

    def _update_weights(self, learning_rate: float) -> float | None:
        """The optimiser's step and the clamp; returns the norm of the gradient.

        Raises FloatingPointError where it is not finite, and there is no scaler that leaves such a step out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.wrapped_model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows and self.accelerator.scaler is None:
            raise FloatingPointError(f"The norm of the gradient is {norm}.")
        if self.overflows > MAX_CONSECUTIVE_OVERFLOWS:
            raise FloatingPointError(f"The gradient overflowed fp16 at {self.overflows} steps in a row.")
        self.optimizer.step()  # the scaler leaves out one of a norm that is not finite
        if self.model.logit_scale.requires_grad and not uses_sigmoid_loss(self.model):  # SigLIP's is above 100
            clamp_logit_scale(self.model.logit_scale)
        return None if self.overflows else norm

    def _finish_step(self, point: dict) -> None:
        """Measure, keep the curve, write a checkpoint where one is due."""
        args, state = self.args, self.state
        state.step = point["step"]
        last = state.step == args.max_steps
        checkpointed = args.max_steps > args.save_steps  # a shorter run has none
        due = checkpointed and (last or state.step % args.save_steps == 0)
        if last or state.step % args.eval_steps == 0:
            try:
                point["validation"] = measures = self._measure_validation()
            except ValueError as error:  # of numbers: the same measurement was taken before the first step
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
        """(pairs, width) on the device, by the frozen image tower; and the plan, spares where images can't be used."""
        if pixels is None:
            return plan, load_cached_embeds(self.inputs.training, plan).to(self.accelerator.device)
        self.model.vision_model.eval()
        embeds = torch.zeros(len(plan.rows), embedding_width(self.model.config), device=self.accelerator.device)
        parts = self._local_places(plan)
        while True:
            bad = []
            for places in parts:
                images = dict(zip(places.tolist(), next(pixels), strict=True))
                bad += [(place, images.pop(place)) for place in [*images] if isinstance(images[place], BadImage)]
                if images:
                    embeds[[*images]] = embed_pixels(
                        self.prepared_model, torch.stack([*images.values()]), self.accelerator
                    )
            bad = dict(sorted(gather_object(bad), key=lambda one: one[0]))  # the same for any number of processes
            if not bad:
                return plan, self.accelerator.reduce(embeds, "sum")  # the rows of the other processes
            self._record_bad_images(plan, bad)
            plan = self.executor.submit(self.planner.replace_pairs, plan, [*bad]).result()
            parts = self._local_places(plan, bad)
            pixels = prefetch_pixels(self.inputs.training, map(plan.items, parts), 0)

    def _record_bad_images(self, plan: StepPlan, bad: dict[int, BadImage]) -> None:
        """List rows of a batch, once in a run. Raises ValueError where they are more than `max_bad_share` by now."""
        inputs, known = self.inputs, self.state.skipped
        for place, image in bad.items():
            pairs = inputs.training[plan.dataset_indices[place]]
            row = pairs.table[int(plan.rows[place])]["row"]
            line = SkippedRow(pairs.source.name, pairs.source.split, row, image.reason, image.detail)
            if asdict(line) not in known:
                known.append(asdict(line))
                inputs.skipped.append(line)
                logger.warning("%s, row %d: %s. Other pairs take its place.", pairs.source.display_name, row, image)
        self._write_skipped()
        rows = sum(map(len, inputs.training)) + len(inputs.skipped) - len(known)
        try:
            check_bad_share(inputs.skipped, rows, self.args.max_bad_share)
        except ValueError as error:
            if not self.state.step:
                raise
            self.checkpoints.save(self.state)
            raise ValueError(f"{error} Step {self.state.step} is saved, which a larger share goes on from.") from error

    def _write_skipped(self) -> None:
        if self.accelerator.is_main_process:
            write_skipped_rows(self.checkpoints.folder.parent / "skipped.jsonl", self.inputs.skipped)

    def _prefetch_steps(self, plans: Callable[[int], Future]) -> Iterator[list[Tensor | BadImage]] | None:
        """The pixels of all steps to come, as they go through the tower at once; None with a cache."""
        if self.inputs.training[0].vectors is not None:
            return None
        steps = (plans(step).result() for step in range(self.state.step, self.args.max_steps))
        items = (plan.items(places) for plan in steps for places in self._local_places(plan))
        return prefetch_pixels(self.inputs.training, items, resolve_loading_workers(self.args, self.accelerator))

    def _local_places(self, plan: StepPlan, among: Container[int] | None = None) -> Sequence[Tensor]:
        """This process's places in the batch, or those `among` some, as many at once as go through the tower."""
        own = [place for batch in self._local_batches(plan) for place in batch.positions.tolist()]
        own = torch.tensor(own if among is None else [place for place in own if place in among])
        return own.split(self.args.embedding_batch_size) if len(own) else []

    def _local_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """Every n-th micro-batch: all processes get short and long ones."""
        return plan.batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def _measure_validation(self) -> dict[str, float]:
        """Of the validation split: mean recall in each direction and of both, shares from 0 to 1; the loss in nats."""
        measures, inputs = [None], self.inputs
        if self.accelerator.is_main_process:
            split = self.model.eval(), inputs.processor, inputs.validation.captions(), inputs.validation_embeds
            embeddings = embed_captions(*split)
            own = torch.arange(len(embeddings.image_embeds))
            loss = lambda texts, images: select_loss(self.model)(texts, images, self.model.logit_scale, own)  # noqa: E731
            measures = [compute_validation_metrics(embeddings, loss)]
        return broadcast_object_list(measures)[0]
