"""Arguments of the embedded default's commands: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

CONFIG = Path("configs/openmoji_captions.yaml")
# Help where the locale is Portuguese: the description, and the text of every flag.
PREPARE_HELP_PT = {
    "": """Prepara o conjunto de dados e o modelo de base do exemplo, onde ainda não existem.

    python -m examples.openmoji.prepare

O conjunto de dados é o OpenMoji, em inglês e em português. O modelo de base junta EfficientNet-Lite0 e
multilingual-e5-small, alinhados só com as legendas em inglês: o ponto de partida do CAPIVARA, em miniatura.
""",
    "dataset": "Pasta do conjunto de dados.",
    "model": "Pasta do modelo de base.",
}


@dataclass
class PrepareArguments:
    help_pt: ClassVar[dict[str, str]] = PREPARE_HELP_PT

    dataset: Path = field(default=Path("data/openmoji/dataset"), metadata={"help": "Folder of the data set."})
    model: Path = field(default=Path("data/openmoji/base"), metadata={"help": "Folder of the base model."})


@dataclass
class OpenMojiCaptionsArguments:
    source: Path = field(
        default=Path("data/openmoji/dataset"),
        metadata={"help": "OpenMoji data set as `examples.openmoji.prepare` makes it."},
    )
    config: Path = field(default=CONFIG, metadata={"help": "Config of the build."})
