"""Arguments of a training run: a YAML file, and flags that override it; group by group as `--help` shows them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from capivara_common.cli import check_at_least, check_between, flag
from capivara_common.image_files import ImageFileArguments
from caption_data.rows import DATASET_HELP, CaptionChoice

RECIPE = "it lost, or made no difference, see docs/recipe.md; --interpolate 0.7 is what is left of it"
GONE = {  # flags of earlier versions -> what there is instead
    **dict.fromkeys(["text_teacher", "teacher_language", "teacher_weight", "teacher_loss", "anchor_share"], RECIPE),
    **dict.fromkeys(["parallel_text", "parallel_batch_size", "hard_negatives", "layer_decay", "decay_towards"], RECIPE),
    "matryoshka_dims": "`python -m training.rotate` makes the first numbers of embeddings hold most, after a training",
    "towers": "the image tower is always frozen",
    "patience": "a run has --max_steps; its best checkpoint by validation recall is kept",
    "streaming": "data sets of any size are read in place",
    "accumulation": "the graphs of as many micro-batches as fit are kept",
    "dataset_weights": "several data sets are mixed by their sizes; repeat the rows of one that should count more",
    "runs": "run the command once a --seed, with --output_dir RUN/seed-0, RUN/seed-1, …; `python -m eval.report RUN` "
    "shows their mean and deviation",
    "trained_vocabulary": "`python -m modeling_capivara.trim_vocabulary` makes the base small before the training",
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "they are 0.9 and 0.98, as in every recipe"),
    "embedding_batch_size": "the frozen image tower takes 32 images at once, which need little memory",
    "gradient_checkpointing": "a smaller --micro_batch_size needs less memory, with the same result",
    "lora_dropout": "adapters have no dropout, as in the paper; the model's own stays",
    "lora_modules_to_save": "beside adapters the text projection is trained, as in the paper",
    "prepare": "run `python -m examples.openmoji.prepare` before, which makes what is missing of data/openmoji",
}
# Flags without which a run of before goes on.
GONE_SINCE = {
    "hub_strategy": "the finished model is pushed, no checkpoint; --push_to_hub true is enough",
    "carbon_country": "run `codecarbon monitor --offline --country-iso-code BRA` beside it",
}


@dataclass
class ModelAndDataArguments(CaptionChoice, ImageFileArguments):
    """The base model, the data sets, and which of their captions are trained on."""

    _argument_group_name = "model and data"

    model: str | None = flag(
        None, "Base checkpoint to fine-tune: folder or Hub id of a CAPIVARA, SigLIP, CLIP … Required."
    )
    dataset: list[str] = flag([], f"Where the pairs are: {DATASET_HELP} Required. Several are mixed in every batch.")
    evaluation_dataset: str | None = flag(None, "Data set of the validation and test splits; the first of `dataset`.")
    max_bad_share: float = flag(
        0.01, "Share of the training rows, 0 to 1, that may be bad; they are skipped, and listed in skipped.jsonl."
    )
    language: str = flag("pt", "Code of the language to train on: column `captions-<language>`.")
    eval_languages: list[str] = flag([], "Languages of the final table; the trained one where none is given.")
    image_column: str = flag("image", "Name of the image column.")
    caption_column: str = flag("captions-{language}", "Name of the caption column; {language} is the language's code.")
    train_split: str = flag("train", "Name of the training split.")
    validation_split: str = flag("validation", "Name of the validation split, on which choices are made.")
    test_split: str = flag("test", "Name of the test split, of the final table.")


@dataclass
class BatchArguments:
    """The size of a step, and how it fits into memory."""

    _argument_group_name = "batch"

    effective_batch_size: int = flag(2816, "Pairs of one contrastive batch; each is a negative to all others.")
    micro_batch_size: int = flag(
        128, "Captions that go through the text tower at once: fewer need less memory, with the same result."
    )
    image_embedding_cache: str = flag(
        "auto",
        "Folder for the frozen image tower's embeddings, computed once; auto = under $CAPIVARA_CACHE or "
        "~/.cache/capivara; off = every image is embedded at every step.",
    )
    augmented_views: int = flag(
        1,
        "Views of every image: 1 = as it is; V above 1 = V fixed augmentations, one drawn at every step; "
        "0 = a fresh augmentation at every step, as the paper did (needs the cache off).",
    )
    loading_workers: int | None = flag(None, "Processes that decode images; by default up to 12 on a GPU, else none.")
    max_steps: int = flag(5863, "Optimiser steps.")


@dataclass
class OptimizationArguments:
    """Optimiser, schedule, seeds and precision; which parameters are trained."""

    _argument_group_name = "optimization"

    optimizer: Literal["adam", "adamw"] = flag("adam", "With coupled L2, the paper's; adamw = with decoupled decay.")
    learning_rate: float = flag(5e-7, "Highest learning rate, after the warm-up.")
    min_learning_rate: float = flag(1e-7, "Where the linear warm-up starts and the cosine decay ends.")
    warmup_steps: int = flag(500, "Steps of the linear warm-up.")
    weight_decay: float = flag(0.2, "L2 penalty of adam, decay of adamw.")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.")
    seed: int = flag(0, "Seed of order, captions and dropout.")
    num_threads: int | None = flag(None, "CPU threads, all by default; another number gives other last bits.")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = flag(
        "auto",
        "Autocast; auto is bf16 where the device computes in it natively, else no; fp16 needs a GPU. "
        "Pooling, loss, weights and the final table stay in float32.",
    )
    frozen_parameters: list[str] = flag(
        [],
        r"Regular expressions: whole names of parameters that stay as they are: 'text_model\.embeddings\..*'. Scale "
        "and bias of a sigmoid loss stay, too, unless `none` is among them: they fit the batch of the base's training.",
    )
    lora_rank: int = flag(0, "Rank of LoRA adapters (peft), trained beside the text projection; 0 = full fine-tuning.")
    lora_alpha: float = flag(8, "LoRA's alpha; the update is scaled by alpha / rank.")
    lora_targets: str = flag(
        r"text_model\..*\.(query|value)", "Regular expression: whole names of the linear layers that get an adapter."
    )
    interpolate: float = flag(
        1.0, "Share of the trained weights in the saved model, 0 to 1, the rest is the base's (WiSE-FT)."
    )


@dataclass
class OutputArguments:
    """What is written, measured, kept and pushed, and when."""

    _argument_group_name = "output"

    output_dir: Path | None = flag(None, "Folder of the run; a new numbered one under runs/ where none is given.")
    overwrite_output_dir: bool = flag(False, "Replace `output_dir` once the run is complete, if it is not empty.")
    eval_steps: int = flag(100, "Steps between measurements of the validation split.")
    save_steps: int = flag(100, "Steps between checkpoints of the run; one of no more steps has none.")
    keep_last: int = flag(2, "Checkpoints that are kept in the output folder, beside the best by validation recall.")
    resume: str | None = flag(
        None,
        "auto = resume the unfinished run of these settings at `output_dir`, or start it; or a folder "
        "of a checkpoint. The result is that of the undisturbed run, to the bit on a CPU.",
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "Where the curves also go, through Accelerate (extra: trackers)."
    )
    push_to_hub: bool = flag(
        False,
        "Push the model to the Hub when the run is complete, by HF_TOKEN or `hf auth login`. The right to write is "
        "checked before it; a push that fails costs nothing, and the command that repeats it is said.",
    )
    hub_model_id: str | None = flag(None, "Repository on the Hub, owner/name.")
    hub_private: bool = flag(False, "Make a new repository private.")


@dataclass
class RunArguments(OutputArguments, OptimizationArguments, BatchArguments, ModelAndDataArguments):
    """All arguments of a run, flat. Raises ValueError where a value breaks its rule."""

    groups = (ModelAndDataArguments, BatchArguments, OptimizationArguments, OutputArguments)
    gone = GONE | GONE_SINCE
    embedding_batch_size = 32  # images that go through the frozen image tower at once

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        self.dataset = [name.rstrip("/") or name for name in self.dataset]
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: give --{name}, or a --config that has it.")
        check_at_least(self, 1, "micro_batch_size", "max_steps", "eval_steps", "save_steps", "keep_last")
        check_at_least(self, 2, "effective_batch_size")
        check_at_least(self, 0, "weight_decay", "augmented_views", "lora_rank", "loading_workers")
        check_between(self, 0, 1, "max_bad_share", "interpolate")
        check_between(self, 1, 1024, "num_threads")
        check_between(self, 0, 2**31 - 1, "seed")
        check_between(self, 0, self.max_steps, "warmup_steps")
        for name, highest in (("learning_rate", float("inf")), ("lora_alpha", float("inf")), ("adam_epsilon", 1)):
            if not 0 < getattr(self, name) < highest:
                limit = "" if highest > 1 else f" and below {highest}"
                raise ValueError(f"{name} must be a number above 0{limit}, got {getattr(self, name):g}.")
        check_between(self, 0, self.learning_rate, "min_learning_rate")
        self.check_image_files()
        self.check_choice()
        if self.image_embedding_cache != "off" and self.augmented_views == 0:
            raise ValueError(
                "augmented_views 0 is a fresh augmentation at every step, which no cache holds: use "
                "--image_embedding_cache off, or a number of fixed views."
            )
        if len(set(self.dataset)) < len(self.dataset):
            raise ValueError(f"dataset names one twice: {self.dataset}.")
        self.evaluation_dataset = self.evaluation_dataset or self.dataset[0]
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, the owner/name of the repository.")
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:  # it is not shown: it may be a token
            raise ValueError("hub_model_id must be owner/name, such as my-name/my-model.")
        self.eval_languages = list(dict.fromkeys([self.language, *self.eval_languages]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self), default=str))  # paths, also those in a list, are text
