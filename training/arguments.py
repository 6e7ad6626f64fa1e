"""Arguments of a training run: a YAML file, and flags that override it."""

import difflib
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


@dataclass
class ModelAndData:
    _argument_group_name = "model and data"

    model: str | None = field(
        default=None, metadata={"help": "Base checkpoint to fine-tune: folder or Hub id of a CAPIVARA model. Required."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Folder of a saved HF DatasetDict, or its Hub id. Required."}
    )
    language: str = field(default="pt", metadata={"help": "Language to train on: column `captions-<language>`."})
    eval_languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages of the final table; the trained one where none is given."}
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
    embedding_batch_size: int = field(
        default=32, metadata={"help": "Images that go through the frozen image tower at once."}
    )
    max_steps: int = field(default=5863, metadata={"help": "Optimiser steps."})


@dataclass
class Optimisation:
    _argument_group_name = "optimisation"

    learning_rate: float = field(default=5e-7, metadata={"help": "Highest learning rate, after the warm-up."})
    min_learning_rate: float = field(
        default=1e-7, metadata={"help": "Where the linear warm-up starts and the cosine decay ends."}
    )
    warmup_steps: int = field(default=500, metadata={"help": "Steps of the linear warm-up."})
    weight_decay: float = field(default=0.2, metadata={"help": "Coupled L2 penalty of Adam (not AdamW)."})
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
class Output:
    _argument_group_name = "output"

    output_dir: Path | None = field(
        default=None, metadata={"help": "Folder of the run; a new numbered one under runs/ where none is given."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace `output_dir` once the run is complete, if it is not empty."}
    )
    eval_steps: int = field(default=100, metadata={"help": "Steps between measurements of the validation recall."})


GROUPS = (ModelAndData, Batch, Optimisation, Output)


@dataclass
class RunArguments(Output, Optimisation, Batch, ModelAndData):
    """All arguments of a run, flat. Raises ValueError where a value breaks its rule."""

    def __post_init__(self) -> None:
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: give --{name}, or a --config that has it.")
        _at_least(self, 1, "micro_batch_size", "embedding_batch_size", "max_steps", "runs", "eval_steps")
        _at_least(self, 2, "effective_batch_size")
        _at_least(self, 0, "warmup_steps", "weight_decay", "min_learning_rate", "seed")
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
        if self.num_threads is not None:
            _at_least(self, 1, "num_threads")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name):g}.")
        self.eval_languages = list(dict.fromkeys([self.language, *self.eval_languages]))

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON takes them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def parse_arguments(argv: list[str] | None, description: str) -> RunArguments:
    """Arguments out of `--config FILE.yaml` and flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` where None.
        description: text of `--help`.

    Raises:
        ValueError: a key or flag is unknown (the nearest name is given), or a value breaks its rule.
        SystemExit: `--help`, or a value is of the wrong type.
    """
    parser = HfArgumentParser(GROUPS, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of the same names as the flags below; flags win over it.")
    known, _ = parser.parse_known_args(argv)
    from_file = _as_flags(Path(known.config)) if known.config else []
    # The file stands before the command line: values of both are read, checked and converted by the same code, so
    # `1e-4`, which PyYAML takes for text, becomes a number.
    given = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = parser.parse_known_args(from_file + given)
    if unknown:
        _reject(unknown[0].lstrip("-").split("=")[0], "flag")
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
            _reject(str(key), f"key in {path}")
        if isinstance(value, dict):
            raise ValueError(f"{path}: `{key}` must be a value or a list, got a mapping.")
        if value not in ("", "~", "null", []):
            flags += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def _names() -> list[str]:
    return [f.name for f in fields(RunArguments)]


def _reject(name: str, kind: str) -> None:
    nearest = difflib.get_close_matches(name, [*_names(), "config"], n=1, cutoff=0.0)[0]
    raise ValueError(f"Unknown {kind}: `{name}`. Did you mean `{nearest}`? `--help` lists all.")


def _at_least(arguments: RunArguments, minimum: int, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name) >= minimum:  # also refuses NaN
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(arguments, name)}.")
