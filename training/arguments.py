"""Arguments of a training run: a YAML file, and flags that override it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import at_least, between, flag, parse
from training.argument_groups import Batch, Hub, ModelAndData, Optimisation, Output, Trained

RECIPE = "it lost, or made no difference, see docs/recipe.md; --interpolate 0.7 is what is left of it"
GONE = {  # flags of earlier versions -> what there is instead
    **dict.fromkeys(
        ("text_teacher", "teacher_language", "teacher_weight", "teacher_loss", "anchor_share", "parallel_text"), RECIPE
    ),
    **dict.fromkeys(("parallel_batch_size", "hard_negatives", "layer_decay", "decay_towards"), RECIPE),
    "matryoshka_dims": "`python -m training.rotate` makes the first numbers of embeddings hold most, after a training",
    "towers": "the image tower is always frozen",
    "patience": "a run has --max_steps; its best checkpoint by validation recall is kept",
    "streaming": "data sets of any size are read in place",
    "accumulation": "the graphs of as many micro-batches as fit are kept",
    "dataset_weights": "several data sets are mixed by their sizes; repeat the rows of one that should count more",
    "runs": "run the command once a --seed, with --output_dir RUN/seed-0, RUN/seed-1, …; `python -m eval.report RUN` "
    "shows their mean and deviation",
    "trained_vocabulary": "`python -m modeling_capivara.trim_vocabulary` makes the base small before the training",
}
GROUPS = (ModelAndData, Batch, Optimisation, Trained, Output, Hub)


@dataclass
class RunArguments(Hub, Output, Trained, Optimisation, Batch, ModelAndData):
    """All arguments of a run, flat. Raises ValueError where a value breaks its rule."""

    gone = GONE

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        self.dataset = [name.rstrip("/") or name for name in self.dataset]
        if not self.model:
            raise ValueError("`model` is missing: give --model, or a --config that has it.")
        if not self.dataset:
            raise ValueError("`dataset` is missing: give --dataset, or a --config that has it.")
        at_least(self, 1, "micro_batch_size", "embedding_batch_size", "max_steps", "eval_steps", "save_steps")
        at_least(self, 1, "keep_last", "num_threads")
        at_least(self, 2, "effective_batch_size")
        at_least(self, 0, "warmup_steps", "weight_decay", "min_learning_rate", "seed", "augmented_views", "lora_rank")
        at_least(self, 0, "loading_workers")
        between(self, 0, 1, "max_bad_share", "interpolate", "lora_dropout")
        between(self, 1, 1024, "num_threads")
        if self.carbon_country is not None and not re.fullmatch(r"[A-Z]{3}", self.carbon_country):
            raise ValueError(
                f"carbon_country must be a three-letter ISO code such as BRA, got {self.carbon_country!r}."
            )
        self.check_image_files()
        self.check_choice()
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
        if self.seed >= 2**31:
            raise ValueError(f"seed must be below 2^31, got {self.seed}.")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha must be a number above 0, got {self.lora_alpha:g}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name):g}.")
        self.check_hub()
        self.eval_languages = list(dict.fromkeys([self.language, *self.eval_languages]))

    def _check_images(self) -> None:
        if self.image_embedding_cache != "off" and self.augmented_views == 0:
            raise ValueError(
                "augmented_views 0 is a fresh augmentation at every step, which no cache holds: use "
                "--image_embedding_cache off, or a number of fixed views."
            )

    def _check_sources(self) -> None:
        if len(set(self.dataset)) < len(self.dataset):
            raise ValueError(f"dataset names one twice: {self.dataset}.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass
class InterpolateArguments:
    """Arguments of `training.interpolate`."""

    base: str = flag(..., "Folder or Hub id of the model before training.", positional=True)
    trained: list[str] = flag(..., "Folder or Hub id of the model after training, one.", positional=True)
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
        if len(self.trained) > 1:
            raise ValueError(
                f"One trained model is taken, got {len(self.trained)}: {', '.join(self.trained)}. Means of several "
                "have left the program, three seeds were as good as one (docs/recipe.md); commit a876dd5 has them."
            )
        between(self, 0, 1, "share")
        at_least(self, 0, "max_loss")


@dataclass
class RotateArguments:
    """Arguments of `training.rotate`."""

    model: str = flag(..., "Folder or Hub id of the trained model.", positional=True)
    dataset: str = flag(..., "Data set of the images, in the forms of a training's.")
    output: Path = flag(..., "Folder of the new model.")
    dims: list[int] = flag(..., "Widths that are to be embeddings, too, such as 256 128 64; each divides the whole.")
    split: str = flag("train", "Split of the data set.")
    image_column: str = flag("image", "Name of the image column.")


def parse_arguments(argv: list[str] | None, description: str) -> RunArguments:
    """Arguments out of `--config FILE.yaml` and flags, as `capivara_common.cli.parse` reads them."""
    return parse(RunArguments, description, argv, groups=GROUPS, config=True)
