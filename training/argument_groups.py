"""The arguments of a training run, group by group as `--help` shows them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from capivara_common.cli import flag
from capivara_common.image_files import DATASET_HELP, CaptionDataArguments
from caption_data.selection import CaptionChoice


@dataclass
class ModelAndData(CaptionChoice, CaptionDataArguments):
    """The base model, the data sets, and which of their captions are trained on."""

    _argument_group_name = "model and data"

    model: str | None = flag(None, "Base checkpoint to fine-tune: folder or Hub id of a CAPIVARA model. Required.")
    dataset: list[str] = flag([], f"Where the pairs are: {DATASET_HELP} Required. Several are mixed in every batch.")
    evaluation_dataset: str | None = flag(
        None, "Data set of the validation and test splits, in the same forms; the first `dataset` if none."
    )
    max_bad_share: float = flag(
        0.01,
        "Share of the training rows, 0 to 1, that may be skipped for a broken image or a missing caption; "
        "above it the run ends before training. They are counted and listed in skipped.jsonl.",
    )
    language: str = flag("pt", "Code of the language to train on: column `captions-<language>`.")
    eval_languages: list[str] = flag([], "Languages of the final table; the trained one where none is given.")
    caption_column: str = flag(
        "captions-{language}",
        "Name of the caption column, a list or one text; {language} stands for the language's code.",
    )
    train_split: str = flag("train", "Name of the training split.")
    validation_split: str = flag("validation", "Name of the validation split, on which choices are made.")
    test_split: str = flag("test", "Name of the test split, of the final table.")
    prepare: Literal["openmoji"] | None = flag(
        None,
        "Embedded default, openmoji: its own `model` and `dataset`, in data/openmoji, are made where they are missing.",
    )


@dataclass
class Batch:
    """The size of a step, and how it fits into memory."""

    _argument_group_name = "batch"

    effective_batch_size: int = flag(2816, "Pairs of one contrastive batch; each is a negative to all others.")
    micro_batch_size: int = flag(
        128,
        "Captions that go through the text tower at once. They are cut in order of length, so that little "
        "is padded; the loss is taken over the whole batch and does not depend on it.",
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
    embedding_batch_size: int = flag(32, "Images that go through the frozen image tower at once.")
    loading_workers: int | None = flag(
        None, "Processes that decode images; up to 12 on a GPU, none on a CPU, where none is given."
    )
    max_steps: int = flag(5863, "Optimiser steps.")


@dataclass
class Optimisation:
    """Optimiser, schedule, seeds and precision."""

    _argument_group_name = "optimisation"

    optimizer: Literal["adam", "adamw"] = flag(
        "adam", "adam = with coupled L2, the paper's; adamw = with decoupled decay."
    )
    learning_rate: float = flag(5e-7, "Highest learning rate, after the warm-up.")
    min_learning_rate: float = flag(1e-7, "Where the linear warm-up starts and the cosine decay ends.")
    warmup_steps: int = flag(500, "Steps of the linear warm-up.")
    weight_decay: float = flag(0.2, "L2 penalty of adam, decay of adamw.")
    adam_beta1: float = flag(0.9, "Decay of Adam's first moment, 0 to 1.")
    adam_beta2: float = flag(0.98, "Decay of Adam's second moment, 0 to 1.")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.")
    seed: int = flag(0, "Seed of order, captions and dropout.")
    num_threads: int | None = flag(
        None, "CPU threads; all cores where none is given. Figures are repeatable to the bit only with the same number."
    )
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = flag(
        "auto",
        "Autocast; auto is bf16 where the device computes in it natively, else no; fp16 needs a GPU. "
        "Pooling, loss, weights and the final table stay in float32.",
    )


@dataclass
class Trained:
    """Which parameters are trained."""

    _argument_group_name = "what is trained"

    frozen_parameters: list[str] = flag(
        [],
        "Regular expressions: parameters whose whole name one of them matches are left as they are, such "
        r"as 'text_model\.embeddings\..*'.",
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute each layer in the backward pass: less memory, a third more time."
    )
    lora_rank: int = flag(0, "Rank of LoRA adapters (peft); 0 = full fine-tuning.")
    lora_alpha: float = flag(8, "LoRA's alpha; the update is scaled by alpha / rank.")
    lora_dropout: float = flag(0.0, "Dropout before the adapters, 0 to 1.")
    lora_targets: str = flag(
        r"text_model\..*\.(query|value)",
        "Regular expression of the linear layers that get an adapter, on their whole names.",
    )
    lora_modules_to_save: list[str] = flag(["text_projection"], "Modules trained as a whole beside adapters.")
    interpolate: float = flag(
        1.0,
        "Weights of the saved model: this share of the trained ones, 0 to 1, and the rest of the base "
        "(WiSE-FT). Below 1 more of what the base knew is kept.",
    )


@dataclass
class Output:
    """What is written, measured and kept, and when."""

    _argument_group_name = "output"

    output_dir: Path | None = flag(None, "Folder of the run; a new numbered one under runs/ where none is given.")
    overwrite_output_dir: bool = flag(False, "Replace `output_dir` once the run is complete, if it is not empty.")
    eval_steps: int = flag(100, "Steps between measurements of the validation split.")
    save_steps: int = flag(100, "Steps between checkpoints of the run.")
    keep_last: int = flag(
        2,
        "Checkpoints that are kept beside the best by validation recall, saved when it is measured. "
        "They stay in the output folder. A run of no more than `save_steps` steps has none.",
    )
    resume: str | None = flag(
        None,
        "auto = resume the unfinished run of these settings at `output_dir`, or start it; or a folder "
        "of a checkpoint. The result is that of the undisturbed run, to the bit on a CPU.",
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "Where the curves also go, through Accelerate (extra: trackers)."
    )
    carbon_country: str | None = flag(
        None, "ISO code such as BRA: energy and CO2e by codecarbon, offline, into run.json (extra: carbon)."
    )


@dataclass
class Hub:
    """What is pushed to the Hub, by `hub_upload.publish`."""

    _argument_group_name = "hub"

    push_to_hub: bool = flag(
        False,
        "Push the model to the Hub when the run is complete. The right to write is checked before it, when "
        "the repository is made; a push that fails is reported, with the command that repeats it, and the run "
        "ends as without it. The token is huggingface_hub's own: HF_TOKEN, or that of `hf auth login`.",
    )
    hub_model_id: str | None = flag(None, "Repository on the Hub, owner/name.")
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end",
        "end = the finished model; checkpoint = also the model at every checkpoint of the run, as a commit "
        "on the branch `checkpoints`, while the training waits.",
    )
    hub_private: bool = flag(False, "Make a new repository private.")

    def check_hub(self) -> None:
        """Raise ValueError where nothing could be pushed; nobody is asked. Values are not shown: one may be a token."""
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError:
                raise ValueError("hub_model_id must be owner/name, in letters, digits, '-', '_' and '.'.") from None
            if self.hub_model_id.count("/") != 1:
                raise ValueError("hub_model_id must be owner/name, such as my-name/my-model.")
        if not self.push_to_hub:
            return
        if self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, the owner/name of the repository.")
