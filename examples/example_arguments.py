"""Arguments of the examples: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from capivara_search.common.cli import at_least, flag

CONFIG = Path("configs/openmoji_captions.yaml")
DIGITS = "mnist"  # benchmark whose names and templates the embedded images have


@dataclass
class RealImagesArguments:
    """Arguments of `examples.real_images`."""

    model: str = flag(..., "Folder of the trained model, as a run of configs/openmoji.yaml leaves it.")
    baseline: str = flag("data/openmoji/base", "What it is compared with.")
    openmoji: str = flag("data/openmoji/dataset", "OpenMoji data set, as prepared.")
    data: Path = flag(Path("data/real_images"), "Where the data sets are written, once.")
    output: Path = flag(Path("runs/real_images"), "Folder of the result files.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")


@dataclass
class ClassifierArguments:
    """Arguments of `examples.fine_tune_classifier`."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    benchmark: str = flag(DIGITS, "Key in eval/prompts/pt: class names and templates.")
    images: str | None = flag(None, "Labelled images; scikit-learn's digits where none.")
    output_dir: Path = flag(Path("runs/classifier"), "Folder for model and processor.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    train_split: str = flag("train", "Split of --images that is learnt from.")
    split: str = flag("test", "Split of --images that is measured.")
    image_column: str | None = flag(None, "Name of the image column; found where none.")
    label_column: str | None = flag(None, "Name of the label column; found where none.")
    head_only: bool = flag(False, "Keep the image tower as it is.")
    image_size: int | None = flag(
        None, "Pixels a side, for a convolutional tower, which takes any; the processor's where none."
    )
    epochs: float = flag(3.0, "Passes over the training images.")
    batch_size: int = flag(32, "Images a step.")
    learning_rate: float = flag(1e-3, "At its height; 1e-5 suits a large ViT better.")
    seed: int = flag(0, "Seed of the order, and of the digits that are held out.")

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")


@dataclass
class ExchangeArguments:
    """Arguments of `examples.exchange_text_side`."""

    text_side: Path = flag(..., "Folder that `hub_upload.export --formats drop_in` has written.")
    base: str = flag("data/openmoji/base", "Folder of the model that the pictures are embedded with.")
    dataset: str = flag("data/openmoji/dataset", "Data set with pictures and captions.")
    split: str = flag("test", "Split of it.")
    language: str = flag("pt", "Language of the captions.")
    batch_size: int = flag(32, "Pictures that go through the base at once.")
    output: Path = flag(Path("runs/exchange_text_side"), "Folder of the stores and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


@dataclass
class SentenceTuningArguments:
    """Arguments of `examples.tune_sentence_transformers`."""

    model: Path = flag(..., "Folder of a model that was exported with the format sentence_transformers.")
    dataset: Path = flag(..., "Saved HF data set with the columns image and captions-LANGUAGE.")
    language: str = flag("pt", "Language of the captions.")
    output_dir: Path = flag(Path("runs/tuned"), "Folder for the model and its figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    train_split: str = flag("train", "Split that is learnt from.")
    split: str = flag("test", "Split that is measured, before and after.")
    epochs: float = flag(3.0, "Passes over the training pictures, each with one caption.")
    batch_size: int = flag(256, "Pictures, with a caption each, that the loss compares in a step.")
    mini_batch_size: int = flag(32, "Of them, how many are embedded at once; changes memory, not the result.")
    learning_rate: float = flag(1e-5, "At its height.")
    seed: int = flag(0, "Seed of the order and of the captions that are drawn.")

    def __post_init__(self) -> None:
        at_least(self, 2, "batch_size")
        at_least(self, 1, "mini_batch_size")


@dataclass
class PrepareArguments:
    """Arguments of `examples.openmoji.prepare`."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "Folder of the data set.")
    model: Path = flag(Path("data/openmoji/base"), "Folder of the base model.")


@dataclass
class MiniatureArguments:
    """Arguments of `examples.openmoji.fit_miniature`."""

    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    output: Path = flag(Path("capivara_search/miniature.safetensors"), "File that is written.")


@dataclass
class ProxiesArguments:
    """Arguments of `examples.openmoji.proxies`."""

    openmoji: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    output: Path = flag(Path("data/openmoji/proxies"), "Folder that is made; it must be missing or empty.")


@dataclass
class OpenMojiCaptionsArguments:
    """Arguments of `examples.openmoji.captions`."""

    source: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    config: Path = flag(CONFIG, "Config of the build.")
