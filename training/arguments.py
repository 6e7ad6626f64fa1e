"""Arguments of a training run: a YAML file, and flags that override it."""

import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from caption_data.image_files import ImageFileArguments
from common.cli import parser, refuse_unknown, reject
from training.hub import Hub


@dataclass
class ModelAndData(ImageFileArguments):
    _argument_group_name = "model and data"

    model: str | None = field(
        default=None, metadata={"help": "Base checkpoint to fine-tune: folder or Hub id of a CAPIVARA model. Required."}
    )
    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Where the pairs are: folder of a saved HF DatasetDict, of parquet files, of images with "
            "metadata.jsonl or of WebDataset tars, or a Hub id. Required. Several are mixed in every batch."
        },
    )
    evaluation_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the validation and test splits, in the same forms; the first `dataset` if none."
        },
    )
    dataset_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Share of the batch from each of several data sets; by their sizes where none is given."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training data in order instead of copying it to this machine: one pass for the captions, "
            "one for the image-embedding cache."
        },
    )
    max_bad_share: float = field(
        default=0.01,
        metadata={
            "help": "Share of the training rows, 0 to 1, that may be skipped for a broken image or a missing caption; "
            "above it the run ends before training. They are counted and listed in skipped.jsonl."
        },
    )
    language: str = field(default="pt", metadata={"help": "Language to train on: column `captions-<language>`."})
    eval_languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages of the final table; the trained one where none is given."}
    )
    caption_strategy: Literal["none", "first", "all", "rank", "threshold", "diverse"] = field(
        default="none",
        metadata={
            "help": "Which captions of an image one is drawn from at every step: none = the originals; first = these "
            "and the first `caption_count` generated; all; rank = the `caption_count` most similar to the image; "
            "threshold = those of `min_similarity` at least; diverse = of these, those unlike each other."
        },
    )
    caption_count: int = field(default=5, metadata={"help": "Captions of the strategies first and rank."})
    min_similarity: float = field(
        default=0.2, metadata={"help": "Image-caption cosine that threshold and diverse ask for."}
    )
    min_pair_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Leave out images whose first caption is less similar to them; all stay where none is given."
        },
    )
    caption_column: str = field(
        default="captions-{language}",
        metadata={"help": "Column of the captions, a list or one text; {language} stands for the language's code."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    validation_split: str = field(default="validation", metadata={"help": "Split that choices are made on."})
    test_split: str = field(default="test", metadata={"help": "Split of the final table."})
    prepare: Literal["openmoji"] | None = field(
        default=None,
        metadata={"help": "Embedded default that makes `model` and `dataset` where they are missing: openmoji."},
    )


@dataclass
class Batch:
    _argument_group_name = "batch"

    effective_batch_size: int = field(
        default=2816, metadata={"help": "Pairs of one contrastive batch; each is a negative to all others."}
    )
    micro_batch_size: int = field(
        default=128,
        metadata={
            "help": "Captions that go through the text tower at once. They are cut in order of length, so that little "
            "is padded; the loss is taken over the whole batch and does not depend on it."
        },
    )
    accumulation: Literal["auto", "keep", "recompute"] = field(
        default="auto",
        metadata={
            "help": "Keep the graphs of all micro-batches, recompute them with the same random states, or keep as many "
            "as fit into the memory that is free. The gradient is the same to the bit."
        },
    )
    image_embedding_cache: str = field(
        default="auto",
        metadata={
            "help": "Folder for the frozen image tower's embeddings, computed once; auto = under $CAPIVARA_CACHE or "
            "~/.cache/capivara; off = every image is embedded at every step."
        },
    )
    augmented_views: int = field(
        default=1,
        metadata={
            "help": "Views of every image: 1 = as it is; V above 1 = V fixed augmentations, one drawn at every step; "
            "0 = a fresh augmentation at every step, as the paper did (needs the cache off)."
        },
    )
    embedding_batch_size: int = field(
        default=32, metadata={"help": "Images that go through the frozen image tower at once."}
    )
    loading_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode images; up to 12 on a GPU, none on a CPU, where none is given."},
    )
    max_steps: int = field(default=5863, metadata={"help": "Optimiser steps."})


@dataclass
class Optimisation:
    _argument_group_name = "optimisation"

    optimizer: Literal["adam", "adamw"] = field(
        default="adam", metadata={"help": "adam = with coupled L2, the paper's; adamw = with decoupled decay."}
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "Highest learning rate, after the warm-up."})
    min_learning_rate: float = field(
        default=1e-7, metadata={"help": "Where the linear warm-up starts and the cosine decay ends."}
    )
    warmup_steps: int = field(default=500, metadata={"help": "Steps of the linear warm-up."})
    weight_decay: float = field(default=0.2, metadata={"help": "L2 penalty of adam, decay of adamw."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of Adam's first moment, 0 to 1."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of Adam's second moment, 0 to 1."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    seed: int = field(default=0, metadata={"help": "Seed of order, captions and dropout; run i of `runs` adds i."})
    runs: int = field(default=1, metadata={"help": "Repetitions with further seeds; the table then has mean ± sd."})
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads; all cores where none is given. Figures are repeatable to the bit "
            "only with the same number."
        },
    )
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = field(
        default="auto",
        metadata={
            "help": "Autocast; auto is bf16 where the device computes in it natively, else no; fp16 needs a GPU. "
            "Pooling, loss, weights and the final table stay in float32."
        },
    )


@dataclass
class Trained:
    _argument_group_name = "what is trained"

    towers: Literal["text", "both"] = field(
        default="text", metadata={"help": "text = the image tower is frozen, as in the paper; both (cache off)."}
    )
    frozen_parameters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Regular expressions: parameters whose whole name one of them matches are left as they are, such "
            r"as 'text_model\.embeddings\..*'."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute each layer in the backward pass: less memory, a third more time."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters (peft); 0 = full fine-tuning."})
    lora_alpha: float = field(default=8, metadata={"help": "LoRA's alpha; the update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters, 0 to 1."})
    lora_targets: str = field(
        default=r"text_model\..*\.(query|value)",
        metadata={"help": "Regular expression of the linear layers that get an adapter, on their whole names."},
    )
    lora_modules_to_save: list[str] = field(
        default_factory=lambda: ["text_projection"], metadata={"help": "Modules trained as a whole beside adapters."}
    )
    interpolate: float = field(
        default=1.0,
        metadata={
            "help": "Weights of the saved model: this share of the trained ones, 0 to 1, and the rest of the base "
            "(WiSE-FT). Below 1 more of what the base knew is kept."
        },
    )


@dataclass
class Output:
    _argument_group_name = "output"

    output_dir: Path | None = field(
        default=None, metadata={"help": "Folder of the run; a new numbered one under runs/ where none is given."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace `output_dir` once the run is complete, if it is not empty."}
    )
    eval_steps: int = field(default=100, metadata={"help": "Steps between measurements of the validation split."})
    patience: int | None = field(
        default=None,
        metadata={
            "help": "Measurements without a new best recall after which training stops and goes back to the best."
        },
    )
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints of the run."})
    keep_last: int = field(
        default=2,
        metadata={
            "help": "Checkpoints that are kept beside the best by validation recall, saved when it is measured. "
            "They stay in the output folder. A run of no more than `save_steps` steps has none."
        },
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "auto = go on with the unfinished run of these settings at `output_dir`, or start it; or a folder "
            "of a checkpoint. The result is that of the undisturbed run, to the bit on a CPU."
        },
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = field(
        default="none", metadata={"help": "Where the curves also go, through Accelerate (extra: trackers)."}
    )
    carbon_country: str | None = field(
        default=None,
        metadata={
            "help": "ISO code such as BRA: energy and CO2e by codecarbon, offline, into run.json (extra: carbon)."
        },
    )


GROUPS = (ModelAndData, Batch, Optimisation, Trained, Output, Hub)


@dataclass
class RunArguments(Hub, Output, Trained, Optimisation, Batch, ModelAndData):
    """All arguments of a run, flat. Raises ValueError where a value breaks its rule."""

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        self.dataset = [name.rstrip("/") or name for name in self.dataset]
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: give --{name}, or a --config that has it.")
        _at_least(self, 1, "micro_batch_size", "embedding_batch_size", "max_steps", "runs", "eval_steps")
        _at_least(self, 1, "save_steps", "keep_last", "caption_count")
        _at_least(self, 2, "effective_batch_size")
        _at_least(self, 0, "warmup_steps", "weight_decay", "min_learning_rate", "seed", "augmented_views", "lora_rank")
        for name in ("max_bad_share", "interpolate", "lora_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name):g}.")
        if self.carbon_country is not None and not re.fullmatch(r"[A-Z]{3}", self.carbon_country):
            raise ValueError(
                f"carbon_country must be a three-letter ISO code such as BRA, got {self.carbon_country!r}."
            )
        self.check_image_files()
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
        for name, minimum in (("num_threads", 1), ("patience", 1), ("loading_workers", 0)):
            if getattr(self, name) is not None:
                _at_least(self, minimum, name)
        if (self.num_threads or 0) > 1024 or not 0 < self.lora_alpha < float("inf"):
            raise ValueError(
                f"num_threads must be at most 1024 and lora_alpha a number above 0, got {self.num_threads} and "
                f"{self.lora_alpha:g}."
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name):g}.")
        if self.runs > 1 and self.resume not in (None, "auto"):
            raise ValueError(f"The checkpoint {self.resume} is of one run, not of {self.runs}. Use --resume auto.")
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

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON takes them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass
class InterpolateArguments:
    """Of `training.interpolate`."""

    base: str = field(metadata={"positional": True, "help": "Folder or Hub id of the model before training."})
    trained: str = field(metadata={"positional": True, "help": "Folder or Hub id of the model after training."})
    output: Path = field(metadata={"help": "Folder of the new model."})
    share: float = field(default=0.5, metadata={"help": "Of the trained weights, 0 to 1."})


def parse_arguments(argv: list[str] | None, description: str) -> RunArguments:
    """Arguments out of `--config FILE.yaml` and flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` where None.
        description: text of `--help`.

    Raises:
        ValueError: a key or flag is unknown (the nearest name is given), or a value breaks its rule.
        SystemExit: `--help`, or a value is of the wrong type.
    """
    flags = parser(GROUPS, description=description)
    flags.add_argument("--config", help="YAML file of the same names as the flags below; flags win over it.")
    known, _ = flags.parse_known_args(argv)
    from_file = _as_flags(Path(known.config)) if known.config else []
    # The file stands before the command line: values of both are read, checked and converted by the same code, so
    # `1e-4`, which PyYAML takes for text, becomes a number.
    given = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = flags.parse_known_args(from_file + given)
    refuse_unknown(unknown, [*_names(), "config"])
    values = vars(namespace)
    values.pop("config")
    return RunArguments(**values)


def _as_flags(path: Path) -> list[str]:
    """A YAML file as the flags that say the same."""
    if not path.is_file():
        raise ValueError(f"The config file {path} does not exist.")
    try:
        # BaseLoader leaves every scalar as text: `no` stays "no", and `1e-4` is converted like a flag's value.
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(config).__name__}.")
    flags = []
    for key, value in config.items():
        if key not in _names():
            reject(str(key), f"key in {path}", _names())
        if isinstance(value, dict):
            raise ValueError(f"{path}: `{key}` must be a value or a list, got a mapping.")
        if value not in ("", "~", "null", []):
            flags += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def _names() -> list[str]:
    return [f.name for f in fields(RunArguments)]


def _at_least(arguments: RunArguments, minimum: int, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name) >= minimum:  # also refuses NaN
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(arguments, name)}.")
