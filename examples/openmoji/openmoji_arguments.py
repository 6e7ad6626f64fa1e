"""Arguments of the embedded default's commands: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path

CONFIG = Path("configs/openmoji_captions.yaml")


@dataclass
class PrepareArguments:
    dataset: Path = field(default=Path("data/openmoji/dataset"), metadata={"help": "Folder of the data set."})
    model: Path = field(default=Path("data/openmoji/base"), metadata={"help": "Folder of the base model."})


@dataclass
class OpenMojiCaptionsArguments:
    source: Path = field(
        default=Path("data/openmoji/dataset"),
        metadata={"help": "OpenMoji data set as `examples.openmoji.prepare` makes it."},
    )
    config: Path = field(default=CONFIG, metadata={"help": "Config of the build."})
