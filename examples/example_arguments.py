"""Arguments of the examples: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path

DIGITS = "mnist"  # benchmark whose names and templates the embedded images have


@dataclass
class RealImagesArguments:
    model: str = field(metadata={"help": "Folder of the trained model, as a run of configs/openmoji.yaml leaves it."})
    baseline: str = field(default="data/openmoji/base", metadata={"help": "What it is compared with."})
    openmoji: str = field(default="data/openmoji/dataset", metadata={"help": "OpenMoji data set, as prepared."})
    data: Path = field(default=Path("data/real_images"), metadata={"help": "Where the data sets are written, once."})
    output: Path = field(default=Path("runs/real_images"), metadata={"help": "Folder of the result files."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU where there is one."})


@dataclass
class ClassifierArguments:
    model: str = field(default="data/openmoji/base", metadata={"help": "Folder or Hub id of a CAPIVARA model."})
    benchmark: str = field(default=DIGITS, metadata={"help": "Key in eval/prompts/pt: class names and templates."})
    images: str | None = field(default=None, metadata={"help": "Labelled images; scikit-learn's digits where none."})
    output_dir: Path = field(default=Path("runs/classifier"), metadata={"help": "Folder for model and processor."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is in the output folder."})
    train_split: str = field(default="train", metadata={"help": "Split of --images that is learnt from."})
    split: str = field(default="test", metadata={"help": "Split of --images that is measured."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found where none."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found where none."})
    head_only: bool = field(default=False, metadata={"help": "Keep the image tower as it is."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side, for a convolutional tower, which takes any; the processor's where none."},
    )
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "At its height; 1e-5 suits a large ViT better."})
    seed: int = field(default=0, metadata={"help": "Seed of the order, and of the digits that are held out."})

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}.")
