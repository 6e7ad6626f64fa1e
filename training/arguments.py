"""Define the command-line arguments of a training run, one dataclass for each group that `--help` shows.

`train_accelerate.py` reads the arguments from a YAML file (`--config`) and from flags. A flag overrides the file.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from capivara_common.cli import check_at_least, check_between, flag
from capivara_common.image_files import ImageFileArguments
from caption_data.rows import DATASET_HELP, CaptionChoice


@dataclass
class RequiredArguments:
    """Arguments that every training run needs: the base model and the training data."""

    _argument_group_name = "required, as flags or in --config"

    model: str | None = flag(None, "Base model: folder or Hub id of a CAPIVARA, SigLIP, CLIP or similar model.")
    dataset: list[str] = flag([], f"Pairs to train on: {DATASET_HELP} Several datasets are mixed in every batch.")


@dataclass
class DataArguments:
    """Arguments for languages, splits and columns of the training and evaluation data."""

    _argument_group_name = "data"

    language: str = flag(
        "pt", "Code of the language to train on. With pt, captions are read from the column captions-pt."
    )
    eval_languages: list[str] = flag([], "Codes of languages for the final evaluation, in addition to `language`.")
    evaluation_dataset: str | None = flag(None, "Dataset to evaluate on. Default: the first of `dataset`.")
    train_split: str = flag("train", "Name of the training split.")
    validation_split: str = flag("validation", "Name of the validation split, which is evaluated during training.")
    test_split: str = flag("test", "Name of the test split, which the final evaluation uses.")
    image_column: str = flag("image", "Name of the image column.")
    caption_column: str = flag("captions-{language}", "Caption column; {language} stands for the language code.")
    max_bad_share: float = flag(
        0.01,
        "Largest share of training rows, 0 to 1, that may be unusable. They are skipped and listed in skipped.jsonl; "
        "above this share the run stops.",
    )


@dataclass
class PairArguments(ImageFileArguments, CaptionChoice):
    """Arguments that select the captions to train on and the image files that may be read.

    The fields are inherited from `CaptionChoice` and `ImageFileArguments`.
    """

    _argument_group_name = "captions and images"


@dataclass
class BatchArguments:
    """Arguments for the batch size, the number of steps, image augmentation, and the memory that a step needs."""

    _argument_group_name = "batch"

    effective_batch_size: int = flag(2816, "Pairs in the batch of a training step; each is a negative for all others.")
    micro_batch_size: int = flag(
        128, "Captions that go through the text tower at once. Fewer need less memory, with the same result."
    )
    image_embedding_cache: str = flag(
        "auto",
        "Folder for image embeddings. The image tower is frozen, so they are computed once. auto: a folder below "
        "$CAPIVARA_CACHE or ~/.cache/capivara. off: images are embedded again at every step.",
    )
    augmented_views: int = flag(
        1,
        "Number of views of each image. 1: the image itself. 2 or more: augmented copies, computed once. Each step "
        "draws one. 0: a new augmentation at every step, as in the paper; needs --image_embedding_cache off.",
    )
    loading_workers: int | None = flag(None, "Processes that decode images. Default: up to 12 with a GPU, otherwise 0.")
    max_steps: int = flag(5863, "Number of optimizer steps of the run.")


@dataclass
class OptimizationArguments:
    """Arguments for optimizer, learning-rate schedule, seed, precision, and the choice of trainable parameters."""

    _argument_group_name = "optimization"

    optimizer: Literal["adam", "adamw"] = flag(
        "adam", "adam: coupled L2 penalty, as in the paper. adamw: decoupled weight decay."
    )
    learning_rate: float = flag(5e-7, "Peak learning rate, reached after the warm-up.")
    min_learning_rate: float = flag(
        1e-7, "Learning rate at the start of the warm-up and at the end of the cosine decay."
    )
    warmup_steps: int = flag(500, "Steps in which the learning rate rises linearly to its peak.")
    weight_decay: float = flag(0.2, "Strength of the L2 penalty (adam) or of the weight decay (adamw).")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon, a small number that prevents a division by zero.")
    seed: int = flag(0, "Seed of the order of the pairs, the choice of captions, augmentation and dropout.")
    num_threads: int | None = flag(None, "CPU threads. Default: all. Their number affects the last bits of the result.")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = flag(
        "auto",
        "Precision of autocast; no is float32. auto: bf16 if the device supports it natively, otherwise no. fp16 needs "
        "a GPU. Pooling, loss, weights and the final evaluation are always in float32.",
    )
    # True if the user chose "auto" for `mixed_precision`. `train_accelerate.py` sets this before it replaces "auto" by
    # the precision that suits the device.
    has_auto_precision: ClassVar[bool] = False
    frozen_parameters: list[str] = flag(
        [],
        "Regular expressions for names of parameters to freeze; a whole name must match, as in "
        r"'text_model\.embeddings\..*'. With a sigmoid loss, logit scale and logit bias are frozen, too, because they "
        "suit the batch size of the base model's training. If `none` is in the list, these two are trained.",
    )
    lora_rank: int = flag(0, "Rank of LoRA adapters (peft); the text projection is trained, too. 0: full fine-tuning.")
    lora_alpha: float = flag(8, "LoRA's alpha. The output of an adapter is scaled by alpha / rank.")
    lora_targets: str = flag(
        r"text_model\..*\.(query|value)",
        "Regular expression for names of linear layers that get an adapter; a whole name must match.",
    )
    interpolate: float = flag(
        1.0, "Weight of the trained model, 0 to 1, in the saved mean of base and trained model (WiSE-FT)."
    )


@dataclass
class OutputArguments:
    """Arguments for output folder, evaluation and checkpoint intervals, resuming, tracking and pushing to the Hub."""

    _argument_group_name = "output"

    output_dir: Path | None = flag(None, "Folder of the run. Default: a new numbered folder below runs/.")
    overwrite_output_dir: bool = flag(False, "Replace an existing `output_dir` when the run is complete.")
    eval_steps: int = flag(100, "Steps between evaluations on the validation split.")
    save_steps: int = flag(100, "Steps between checkpoints. A run of at most this many steps writes no checkpoints.")
    keep_last: int = flag(2, "Number of latest checkpoints to keep, besides the one with the best validation recall.")
    resume: str | None = flag(
        None,
        "auto: resume the unfinished run of `output_dir`, or start a run if there is none. Otherwise the folder of a "
        "checkpoint. Settings that affect the weights must be the same. On a CPU, the result is bit-identical to that "
        "of an uninterrupted run.",
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "Experiment tracker that also gets the training curves. tensorboard: install the extra `trackers`."
    )
    push_to_hub: bool = flag(
        False,
        "Push the model to the Hub when the run is complete, with HF_TOKEN or the token of `hf auth login`. Write "
        "access is checked before training. If the push fails, the run is kept and the command to push it is printed.",
    )
    hub_model_id: str | None = flag(None, "Repository on the Hub, as owner/name. Required with --push_to_hub.")
    hub_private: bool = flag(False, "Create the repository as private.")


@dataclass
class RunArguments(
    OutputArguments, OptimizationArguments, BatchArguments, PairArguments, DataArguments, RequiredArguments
):
    """All arguments of a training run, validated on creation.

    Raises:
        ValueError: If `model` or `dataset` is missing, a value is out of range, or arguments contradict each other.
    """

    groups = (RequiredArguments, DataArguments, PairArguments, BatchArguments, OptimizationArguments, OutputArguments)
    embedding_batch_size = 32  # number of images that go through the frozen image tower at a time

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        self.dataset = [name.rstrip("/") or name for name in self.dataset]
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing. Give --{name}, or set it in the file of --config.")
        check_at_least(self, 1, "micro_batch_size", "max_steps", "eval_steps", "save_steps", "keep_last")
        check_at_least(self, 2, "effective_batch_size")
        check_at_least(self, 0, "weight_decay", "augmented_views", "lora_rank", "loading_workers")
        check_between(self, 0, 1, "max_bad_share", "interpolate")
        check_between(self, 1, 1024, "num_threads")
        check_between(self, 0, 2**31 - 1, "seed")
        check_between(self, 0, self.max_steps, "warmup_steps")
        for name, limit in (("learning_rate", float("inf")), ("lora_alpha", float("inf")), ("adam_epsilon", 1)):
            if not 0 < getattr(self, name) < limit:
                upper_rule = "" if limit > 1 else f" and below {limit}"
                raise ValueError(f"{name} must be a number above 0{upper_rule}, got {getattr(self, name):g}.")
        check_between(self, 0, self.learning_rate, "min_learning_rate")
        self.check_image_files()
        self.check_choice()
        if self.image_embedding_cache != "off" and self.augmented_views == 0:
            raise ValueError(
                "augmented_views 0 draws a new augmentation at every step, whose embeddings can't be cached. Use "
                "--image_embedding_cache off, or --augmented_views with the number of views to compute once."
            )
        if len(set(self.dataset)) < len(self.dataset):
            raise ValueError(f"dataset must not name the same dataset twice, got {self.dataset}.")
        self.evaluation_dataset = self.evaluation_dataset or self.dataset[0]
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id. Give the repository as owner/name.")
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            # The value is not shown, because it may be a token that was given in the wrong place.
            raise ValueError("hub_model_id must be owner/name, such as my-name/my-model.")
        self.eval_languages = list(dict.fromkeys([self.language, *self.eval_languages]))

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as a dict that can be stored in a JSON file, `{argument name: value}`.

        Paths become strings.
        """
        return json.loads(json.dumps(asdict(self), default=str))


def resolve_loading_workers(args: RunArguments, device: torch.device) -> int:
    """Return how many worker processes should decode images.

    - If `args.loading_workers` is set: this number.
    - Otherwise, on a GPU: 12, but at most the number of CPU cores.
    - Otherwise, on a CPU: 0. The training process then decodes the images itself, because the model needs all cores.
    """
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if device.type == "cpu" else min(12, os.cpu_count() or 1)
