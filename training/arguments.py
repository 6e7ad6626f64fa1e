"""Arguments of a training run: a YAML file, and flags that override it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import at_least, between, flag, parse
from training.argument_groups import Batch, Hub, ModelAndData, Optimisation, Output, TextTeacher, Trained

GROUPS = (ModelAndData, Batch, Optimisation, Trained, TextTeacher, Output, Hub)


@dataclass
class RunArguments(Hub, Output, TextTeacher, Trained, Optimisation, Batch, ModelAndData):
    """All arguments of a run, flat. Raises ValueError where a value breaks its rule."""

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        self.dataset = [name.rstrip("/") or name for name in self.dataset]
        if not self.model:
            raise ValueError("`model` is missing: give --model, or a --config that has it.")
        if not self.dataset and not (self.parallel_text and self.evaluation_dataset):
            raise ValueError(
                "`dataset` is missing: give --dataset, or a --config that has it. A training on --parallel_text alone "
                "needs an --evaluation_dataset."
            )
        if not self.dataset and (self.prepare or self.anchor_share or self.hard_negatives or self.towers == "both"):
            raise ValueError(
                "Without a dataset there are no pictures: leave out prepare, anchor_share, hard_negatives and towers: "
                "both, which need them, or give --dataset."
            )
        at_least(self, 1, "micro_batch_size", "embedding_batch_size", "max_steps", "runs", "eval_steps", "save_steps")
        at_least(self, 1, "keep_last", "num_threads", "patience")
        at_least(self, 2, "effective_batch_size")
        at_least(self, 0, "warmup_steps", "weight_decay", "min_learning_rate", "seed", "augmented_views", "lora_rank")
        at_least(self, 0, "loading_workers")
        between(self, 0, 1, "max_bad_share", "interpolate", "lora_dropout", "layer_decay")
        between(self, 0, 10, "hard_negatives")
        if 0 < self.hard_negatives < 1e-6:  # float32 would take it for 0
            raise ValueError(f"hard_negatives must be 0, or from 1e-6 to 10, got {self.hard_negatives:g}.")
        between(self, 1, 1024, "num_threads")
        if self.carbon_country is not None and not re.fullmatch(r"[A-Z]{3}", self.carbon_country):
            raise ValueError(
                f"carbon_country must be a three-letter ISO code such as BRA, got {self.carbon_country!r}."
            )
        self.check_image_files()
        self.check_choice()
        self.check_teacher(self.language)
        self._check_images()
        self._check_sources()
        self.evaluation_dataset = self.evaluation_dataset or self.dataset[0]
        if not 0 <= self.min_learning_rate <= self.learning_rate < float("inf") or not self.learning_rate:
            raise ValueError(
                f"learning_rate must be above 0 and not below min_learning_rate, got {self.learning_rate:g} and "
                f"{self.min_learning_rate:g}."
            )
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) exceeds max_steps ({self.max_steps}).")
        if not 0 < self.adam_epsilon < 1:
            raise ValueError(f"adam_epsilon must be between 0 and 1, got {self.adam_epsilon:g}.")
        if self.seed + self.runs > 2**31:
            raise ValueError(f"seed must be below 2^31, got {self.seed}.")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha must be a number above 0, got {self.lora_alpha:g}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name):g}.")
        if self.runs > 1 and self.resume not in (None, "auto"):
            raise ValueError(f"The checkpoint {self.resume} is of one run, not of {self.runs}. Use --resume auto.")
        self._choose_vocabulary()
        self.check_hub(self.runs)
        self.eval_languages = list(dict.fromkeys([self.language, *self.eval_languages]))

    def _check_images(self) -> None:
        cached = self.image_embedding_cache != "off"
        if cached and self.towers == "both":
            raise ValueError(
                "towers: both trains the image tower, so its embeddings change: use --image_embedding_cache off."
            )
        if cached and self.augmented_views == 0:
            raise ValueError(
                "augmented_views 0 is a fresh augmentation at every step, which no cache holds: use "
                "--image_embedding_cache off, or a number of fixed views."
            )
        if self.streaming and not cached:
            raise ValueError(
                "streaming reads every image once, in order, so it needs the image-embedding cache: use "
                "--image_embedding_cache auto, or no --streaming."
            )

    def _check_sources(self) -> None:
        if len(set(self.dataset)) < len(self.dataset):
            raise ValueError(f"dataset names one twice: {self.dataset}.")
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            raise ValueError(
                f"dataset_weights has {len(self.dataset_weights)} numbers for {len(self.dataset)} data "
                "sets; give one each."
            )
        if any(not 0 < weight < float("inf") for weight in self.dataset_weights):
            raise ValueError(f"dataset_weights must be above 0, got {self.dataset_weights}.")

    @property
    def texts_per_step(self) -> int:
        """Texts of a whole batch: those with an image, and those of the parallel text."""
        pairs = self.effective_batch_size if self.dataset else 0
        return pairs + (self.parallel_batch_size if self.parallel_text else 0)

    def _choose_vocabulary(self) -> None:
        moves_all = self.weight_decay > 0 and self.decay_towards == "zero"
        if self.trained_vocabulary == "used" and moves_all:
            raise ValueError(
                f"trained_vocabulary: used leaves unused rows as they are, but a weight_decay of {self.weight_decay:g} "
                "moves them, too. Use --trained_vocabulary all, --decay_towards base or --weight_decay 0."
            )
        self.trained_vocabulary = self.trained_vocabulary or ("all" if moves_all else "used")

    @property
    def micro_batches_per_step(self) -> int:
        """Of all processes."""
        pairs = self.effective_batch_size if self.dataset else 0
        return sum(-(-count // self.micro_batch_size) for count in (pairs, self.texts_per_step - pairs))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass
class InterpolateArguments:
    """Arguments of `training.interpolate`."""

    base: str = flag(..., "Folder or Hub id of the model before training.", positional=True)
    trained: list[str] = flag(
        ..., "Folders or Hub ids of the model after training; of several, their mean.", positional=True, nargs="+"
    )
    output: Path = flag(..., "Folder of the new model.")
    share: float = flag(0.5, "Of the trained weights, 0 to 1.")
    validation: str | None = flag(
        None,
        "Data set on which the share is chosen, in the forms of a training's; `share` is then not used.",
    )
    split: str = flag("validation", "Split of the data set.")
    languages: list[str] = flag(["pt", "en"], "Languages that are measured; the first is the one that was trained.")
    max_loss: float = flag(0.5, "Points of mean recall that a further language may lose in either direction.")

    def __post_init__(self) -> None:
        between(self, 0, 1, "share")
        at_least(self, 0, "max_loss")


def parse_arguments(argv: list[str] | None, description: str) -> RunArguments:
    """Arguments out of `--config FILE.yaml` and flags, as `capivara_common.cli.parse` reads them."""
    return parse(RunArguments, description, argv, groups=GROUPS, config=True)
