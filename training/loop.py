"""The loop over optimiser steps: plan, images, gradients, optimiser, measurement, checkpoint."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from capivara_common.environment import handle_signals
from capivara_common.files import write_json
from modeling_capivara import CapivaraModel
from training.arguments import RunArguments
from training.batches import MicroBatch, Planner, StepPlan
from training.checkpoints import Checkpoints, TrainerState
from training.images import TrainingImages, embed_pixels, loading_workers
from training.optimiser import build_optimizer, clamp_logit_scale, learning_rate_at
from training.trainable import set_training_mode
from training.whole_batch import WholeBatch, used_memory

logger = logging.getLogger("capivara")
MAX_OVERFLOWS = 20  # the scaler halves its scale at each; after as many, the loss itself is at fault


class Interrupted(Exception):
    """SIGTERM or Ctrl-C, by the number of the signal: the run is saved at a step and can be resumed."""

    def __init__(self, number: int, step: int):
        super().__init__(f"Stopped at step {step}, which is saved.")
        self.signal, self.step = number, step


@dataclass
class Trainer:
    """The training of one model."""

    args: RunArguments
    model: CapivaraModel  # the plain model; its adapters, where there are any, are in it
    wrapped: nn.Module  # what is trained: the model, or peft's wrapper around it
    planner: Planner  # draws the batches
    images: TrainingImages  # of the pairs
    accelerator: Accelerator  # device, precision and processes
    # measures the model, as `validation`; only the main process calls it
    validate: Callable[[CapivaraModel], dict[str, dict[str, float]]]
    checkpoints: Checkpoints
    state: TrainerState  # where the run is
    # called on the main process with the number of a step whose checkpoint was written
    after_checkpoint: Callable[[int], object] | None = None
    reported: bool = field(default=False, init=False)
    overflows: int = field(default=0, init=False)  # in a row, of fp16

    def train(self, resume: Path | None = None) -> TrainerState:
        """Train to `max_steps`.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; a checkpoint is written.
            FloatingPointError: loss or gradient is not finite; the batch is written beside the checkpoints.
            OSError: the disk is full; earlier checkpoints are whole.
        """
        args, accelerator = self.args, self.accelerator
        self.prepared = accelerator.prepare_model(self.wrapped, evaluation_mode=True)  # see WholeBatch
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(self.wrapped, args))
        if resume:
            self.state = self.checkpoints.load(resume)
        self.step = WholeBatch(self.prepared, self.model.logit_scale, accelerator, args.seed)
        if not self.state.curve:
            self.state.curve.append({"step": 0, **self._measured()})
        self.started = time.perf_counter() - self.state.seconds
        with _signals() as received, ThreadPoolExecutor(1) as executor, self._bar() as bar:
            plans = _PlansAhead(self.planner, executor, args.max_steps)
            pixels = self._pixels(plans)
            while self.state.step < args.max_steps:
                started = time.perf_counter()
                plan = plans.pop(self.state.step)
                point = self._one_step(plan, pixels, started)
                bar.set_postfix(loss=f"{point['loss']:.3f}", lr=f"{point['learning_rate']:.1e}")
                bar.update(args.effective_batch_size)
                self._after_step(point, plan)
                if number := self._agreed(received):
                    self._save()
                    raise Interrupted(number, self.state.step)
        # Without Accelerate's autocast around `forward`: base and result are measured in the same precision.
        accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False).eval()
        accelerator.free_memory()
        return self.state

    def _one_step(self, plan: StepPlan, pixels: Iterator[Tensor] | None, started: float) -> dict:
        """One optimiser step, whose plan was awaited from `started` on; returns its entry of the curve."""
        args = self.args
        own = self._own(plan)
        image_embeds = self._image_embeds(plan, own, pixels)
        waited = time.perf_counter() - started
        set_training_mode(self.wrapped)
        self.optimizer.zero_grad(set_to_none=False)
        try:
            report = self.step(plan.step, own, len(plan.rows), image_embeds)
            norm = self._update(learning_rate_at(plan.step, args))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._save_batch(plan)}") from error
        seconds = time.perf_counter() - started
        if not self.reported:
            self._report_first_step(report.graphs_kept, len(own), seconds * (args.max_steps - plan.step))
        return {
            "step": plan.step + 1,
            "loss": report.loss,
            "learning_rate": learning_rate_at(plan.step, args),
            "logit_scale": self.model.logit_scale.item(),
            "gradient_norm": norm,
            "padding_share": plan.padding,
            "pairs_per_second": len(plan.rows) / seconds,
            "tokens_per_second": plan.tokens / seconds,
            "data_share_of_time": waited / seconds,
            "memory_bytes": used_memory(self.accelerator.device),
        }

    def _update(self, learning_rate: float) -> float | None:
        """The optimiser's step and the clamp; returns the norm of the gradient.

        Raises:
            FloatingPointError: it is not finite, and there is no scaler that leaves such a step out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.wrapped.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(f"The norm of the gradient is {norm}.")
        self.optimizer.step()
        if self.model.logit_scale.requires_grad:
            clamp_logit_scale(self.model.logit_scale)
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > MAX_OVERFLOWS:
            raise FloatingPointError(f"The gradient overflowed fp16 at {self.overflows} steps in a row.")
        return norm if math.isfinite(norm) else None  # the scaler has left this step out

    def _after_step(self, point: dict, plan: StepPlan) -> None:
        """Measure, keep the curve, write a checkpoint where one is due."""
        args, state = self.args, self.state
        state.step = point["step"]
        checkpointed = args.max_steps > args.save_steps  # a shorter run has none
        due = checkpointed and (state.step % args.save_steps == 0 or state.step == args.max_steps)
        if state.step % args.eval_steps == 0 or state.step == args.max_steps:
            try:
                point |= self._measured()
            except ValueError as error:  # of numbers: the same measurement was taken before the first step
                raise FloatingPointError(f"After step {state.step}: {error} {self._save_batch(plan)}") from error
            recall = _recall(point["validation"])
            is_best = state.best_recall is None or recall > state.best_recall
            if is_best and checkpointed:
                state.best_step, state.best_recall, due = state.step, recall, True
        state.curve.append(point)
        state.seconds = time.perf_counter() - self.started
        self.accelerator.log(self._logged(point), step=state.step)
        if due:
            self._save()
            if self.after_checkpoint and self.accelerator.is_main_process:
                before = time.perf_counter()
                self.after_checkpoint(state.step)
                self.started += time.perf_counter() - before  # of the pushes, not of training

    def _logged(self, point: dict) -> dict[str, float]:
        """An entry of the curve as trackers take it."""
        values = {f"validation/{key}": value for key, value in point.get("validation", {}).items()}
        values |= {key: value for key, value in point.items() if key not in ("step", "validation")}
        return {key: value for key, value in values.items() if value is not None}

    def _image_embeds(self, plan: StepPlan, own: list[MicroBatch], pixels: Iterator[Tensor] | None) -> Tensor:
        """(pairs, width) on the device, by the frozen image tower."""
        if pixels is None:
            return self.images.cached_embeds(plan.sources, plan.rows, plan.views).to(self.accelerator.device)
        positions = torch.cat([batch.positions for batch in own]) if own else torch.empty(0, dtype=torch.long)
        self.model.vision_model.eval()
        parts = [
            embed_pixels(self.prepared, next(pixels), self.accelerator)
            for _ in positions.split(self.args.embedding_batch_size)
            if len(positions)
        ]
        return self._of_all(parts, positions, len(plan.rows))

    def _of_all(self, parts: list[Tensor], own: Tensor, pairs: int) -> Tensor:
        """(pairs, width) of all processes, without gradient; `parts` are this one's rows `own`."""
        embeds = torch.zeros(pairs, self.model.config.projection_dim, device=self.accelerator.device)
        if parts:
            embeds[own.to(embeds.device)] = torch.cat(parts)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(embeds)
        return embeds

    def _pixels(self, plans: "_PlansAhead") -> Iterator[Tensor] | None:
        """The pixels of all steps to come, in order; None with a cache."""
        if self.images.cached:
            return None
        return self.images.pixel_batches(self._items(plans), loading_workers(self.args, self.accelerator))

    def _items(self, plans: "_PlansAhead") -> Iterator[list[tuple[int, int, int]]]:
        """Data set, pair and view of every image of this process, as they go through the tower at once."""
        for step in range(self.state.step, self.args.max_steps):
            plan = plans.get(step)
            own = [batch.positions for batch in self._own(plan)]
            own = torch.cat(own).split(self.args.embedding_batch_size) if own else []
            for positions in own:
                yield [(plan.sources[i], plan.rows[i], plan.views[i]) for i in positions.tolist()]

    def _own(self, plan: StepPlan) -> list[MicroBatch]:
        """Every n-th micro-batch: all processes get short and long ones."""
        return plan.batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def _measured(self) -> dict[str, dict[str, float]]:
        results = [self.validate(self.model) if self.accelerator.is_main_process else None]
        return broadcast_object_list(results)[0]

    def _agreed(self, received: list[int]) -> int:
        """The signal that any process has got, else 0: all stop after the same step."""
        number = torch.tensor(received[-1] if received else 0, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def _save(self) -> None:
        self.state.seconds = time.perf_counter() - self.started
        self.checkpoints.save(self.state)

    def _save_batch(self, plan: StepPlan) -> str:
        """Write the pairs of a step that failed; returns a sentence with the path and what to do."""
        path = self.checkpoints.folder / f"bad-batch-step-{plan.step + 1}.json"
        if self.accelerator.is_main_process:
            texts = [t for batch in plan.batches for t in self.planner.processor.batch_decode(batch.input_ids)]
            drawn = zip(plan.sources.tolist(), plan.rows.tolist(), plan.views.tolist(), texts, strict=True)
            rows = [{"data_set": self.args.dataset[s], "pair": p, "view": v, "tokens": text} for s, p, v, text in drawn]
            write_json(path, {"step": plan.step + 1, "seed": self.args.seed, "pairs": rows})
        return f"Its batch is in {path}. Lower the learning rate or use --mixed_precision no, and look at the batch."

    def _report_first_step(self, kept: int, batches: int, remaining_s: float) -> None:
        self.reported = True
        if self.accelerator.is_main_process:
            logger.info(
                "The graphs of %s of %s micro-batches are kept (%.1f GB of them fit), the others are made twice. About "
                "%.0f minutes to step %s; Ctrl-C saves the run, and --resume auto goes on with it.",
                kept, batches, self.step.budget / 1e9, remaining_s / 60 + 0.5, self.args.max_steps,
            )  # fmt: skip

    def _bar(self) -> tqdm:
        size = self.args.effective_batch_size
        return tqdm(
            total=self.args.max_steps * size, initial=self.state.step * size, desc=f"Training, seed {self.args.seed}",
            unit="pair", unit_scale=True, disable=not self.accelerator.is_main_process,
        )  # fmt: skip


class _PlansAhead:
    """Plans by step; the next one is made while a step computes."""

    def __init__(self, planner: Planner, executor: ThreadPoolExecutor, max_steps: int):
        self._planner, self._executor, self._max_steps = planner, executor, max_steps
        self._plans: dict[int, Future] = {}

    def get(self, step: int) -> StepPlan:
        return self._future(step).result()

    def pop(self, step: int) -> StepPlan:
        plan = self.get(step)
        del self._plans[step]
        if step + 1 < self._max_steps:
            self._future(step + 1)
        return plan

    def _future(self, step: int) -> Future:
        if step not in self._plans:
            self._plans[step] = self._executor.submit(self._planner, step)
        return self._plans[step]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within it, SIGTERM and Ctrl-C are noted and end the run after its step; a second Ctrl-C ends it at once.

    A launcher passes on what the terminal has sent already: what comes within a second is the same Ctrl-C.
    """
    received: list[int] = []
    first = 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if received:
            if number == signal.SIGINT and time.monotonic() - first > 1:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        received.append(number)
        logger.info("Stopping after this step; the run will be saved.")

    with handle_signals(note, signal.SIGTERM, signal.SIGINT):
        yield received


def _recall(validation: dict[str, float]) -> float:
    values = [value for key, value in validation.items() if key != "loss"]
    return sum(values) / max(len(values), 1)
