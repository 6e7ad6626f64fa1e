"""Arguments of the examples: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import at_least, between, flag
from capivara_common.files import check_output_file

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
class CaptionArguments:
    """Arguments of `examples.caption`. Raises ValueError where a value breaks its rule."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output: Path | None = flag(None, "File for the captions, .json or .csv; a few are printed where none.")
    pictures: Path | None = flag(None, "Folder of pictures; those of --split, which are measured, where none.")
    dataset: str = flag("data/openmoji/dataset", "Pictures with captions, in the forms that eval.retrieval reads.")
    split: str = flag("test", "Split whose pictures get captions.")
    train_split: str = flag("train", "Split that captions come from: the bank, or what the mapping network learns.")
    validation_split: str = flag("validation", "Split that says when the mapping network has learnt enough.")
    language: str = flag("pt", "Language of the captions.")
    caption_column: str = flag("captions-{language}", "Column of a caption or a list of captions a picture.")
    bank: Path | None = flag(None, "Text file of sentences, a line each, in place of the captions of --train_split.")
    top_k: int = flag(3, "Captions a picture.")
    language_model: str | None = flag(
        None,
        "Folder or Hub id of a causal language model of transformers, which writes the captions in place of a bank.",
    )
    mapper: Path | None = flag(None, "Folder of the mapping network of --language_model; trained where it is missing.")
    rerank: bool = flag(False, "Let CAPIVARA order what the language model proposes, the one that fits best first.")
    num_beams: int = flag(5, "Beams of the language model's search; 1 is greedy.")
    max_new_tokens: int = flag(30, "Tokens of a caption, at most.")
    prefix_length: int = flag(10, "Embeddings before the caption that stand for the picture.")
    mapper_layers: int = flag(8, "Transformer layers of the mapping network.")
    epochs: int = flag(30, "Passes over the training captions, at most; the best by --validation_split is kept.")
    learning_rate: float = flag(3e-4, "Of the mapping network, at its height.")
    batch_size: int = flag(32, "Pictures or captions at once.")
    seed: int = flag(0, "Seed of the mapping network's start and of the order of captions.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        names = ("top_k", "num_beams", "max_new_tokens", "prefix_length", "mapper_layers", "epochs", "batch_size")
        at_least(self, 1, *names)
        if bool(self.language_model) != bool(self.mapper):
            raise ValueError(
                "--language_model and --mapper, the folder of its mapping network, go together: give both."
            )
        if self.language_model and self.bank:
            raise ValueError("--bank is for captions without --language_model. Leave one of them out.")
        if self.language_model and self.top_k > self.num_beams:
            raise ValueError(f"A search of {self.num_beams} beams has no {self.top_k} captions: raise --num_beams.")
        if self.output:
            if self.output.suffix.lower() not in (".json", ".csv"):
                raise ValueError(f"The output file must end in .json or .csv, got {self.output.name}.")
            check_output_file(self.output)


@dataclass
class GuideArguments:
    """Arguments of `examples.guide_generation`. Raises ValueError where a value breaks its rule."""

    sentence: str = flag(..., "What the picture shall show, in Portuguese.")
    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output_dir: Path = flag(Path("runs/guided"), "Folder for the pictures and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    others: list[str] = flag(
        ["lua crescente", "coração azul", "coração vermelho", "gato", "carro", "rosto sorridente"],
        "Sentences that the picture is compared with as well.",
    )
    steps: int = flag(60, "Steps of the optimisation, or of the pipeline.")
    size: int = flag(224, "Pixels a side.")
    cells: int = flag(24, "Colours a side that are optimised, enlarged smoothly; as many as --size are single pixels.")
    views: int = flag(4, "Random crops, turned and noisy, that are judged at each step; 0 judges the picture itself.")
    learning_rate: float = flag(0.1, "Of the optimisation.")
    pipeline: str | None = flag(None, "Folder or Hub id of a latent diffusion pipeline of diffusers, guided instead.")
    prompt: str = flag("", "What the pipeline itself is told, in its own language.")
    scale: float = flag(0.1, "How far a step of the pipeline is moved, as a share of its latents' length.")
    seed: int = flag(0, "Seed of the start and of the views.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "size", "cells")
        at_least(self, 0, "views")
        between(self, 0, 1, "scale")
        if self.pipeline:
            at_least(self, 2, "steps")  # the first one is not guided
        if not self.sentence.strip():
            raise ValueError("The sentence is empty. Say what the picture shall show.")


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
    cldr: Path | None = flag(
        None, "Folder node_modules with cldr-annotations-modern and cldr-annotations-derived-modern, for `translators`."
    )


@dataclass
class OpenMojiCaptionsArguments:
    """Arguments of `examples.openmoji.captions`."""

    source: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    config: Path = flag(CONFIG, "Config of the build.")
