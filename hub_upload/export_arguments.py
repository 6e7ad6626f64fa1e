"""Arguments of `hub_upload.export`, which its formats read, too."""

from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import flag

FORMATS = ("transformers", "open_clip", "sentence_transformers", "onnx")  # in one repository
MORE_FORMATS = ("transformers_js",)  # in it, too, where they are named
FOLDER_FORMATS = ("drop_in", "immich")  # each a folder of its own


@dataclass
class ExportArguments:
    """Arguments of `hub_upload.export`."""

    model: Path = flag(..., "Folder of a CAPIVARA model, as a training run or `save_pretrained` leaves it.")
    output: Path = flag(..., "Folder of the repository. Must be missing or empty.")
    formats: str = flag(
        ",".join(FORMATS),
        f"What shall be able to load it, with commas between, of {', '.join(FORMATS)}. transformers is "
        "always among them: the others read its files. onnx needs the extra of its name and, for the full size, "
        f"minutes. On demand, {', '.join(MORE_FORMATS)}: the same graphs, and more, for a browser and Node. Or one "
        "alone: drop_in, the text side for pictures that --base has embedded; immich, a folder for the "
        "machine-learning service of Immich.",
    )
    base: str | None = flag(
        None,
        "For drop_in and --textual_only: the model that the pictures were embedded with, which this one was trained "
        "from. A folder of CAPIVARA or open_clip, or a Hub id. Its image side must be the model's to the bit.",
    )
    text_config: str | None = flag(
        None,
        "Where open_clip finds the text tower's configuration. The published architecture needs none: it "
        "is that of XLM-RoBERTa base, on the Hub. For any other: a Hub id; or a folder that holds it, such as the "
        "model's own, to be copied to text_model/ in the repository, where open_clip finds it only when started "
        "in the downloaded folder, as local-dir:. Without it open_clip is left out.",
    )
    repo_id: str | None = flag(
        None,
        "Hub id, OWNER/NAME, under which the repository will be published. hf-hub: of open_clip then takes "
        "its tokenizer from there; without it, that of the text tower's Hub id.",
    )
    recall_dataset: str | None = flag(
        None,
        "Data set with images and captions, in the forms that eval.retrieval reads, on which the recall of "
        "the int8 graphs is measured beside the float32 ones; not measured without it.",
    )
    recall_split: str = flag("test", "Split of it.")
    recall_language: str = flag("pt", "Language of its captions.")
    recall_caption_column: str = flag("captions-{language}", "Column of a caption or a list of captions an image.")
    textual_only: bool = flag(
        False, "Of immich, the text side alone, which takes the place of that of --base; no picture is embedded again."
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")

    def __post_init__(self) -> None:
        formats = set(self.format_names())
        if "drop_in" in formats and self.base is None:
            raise ValueError("drop_in needs --base: the model that the pictures of the index were embedded with.")
        if self.textual_only and formats != {"immich"}:
            raise ValueError(f"textual_only is of --formats immich, got --formats {self.formats}; leave it out.")
        if self.textual_only and self.base is None:
            raise ValueError("textual_only needs --base, the model that the pictures in Immich are embedded with.")
        if self.base is not None and "drop_in" not in formats and not self.textual_only:
            raise ValueError("--base is for --formats drop_in and for --textual_only; leave it out.")
        if formats & set(FOLDER_FORMATS) and (self.text_config or self.recall_dataset):
            raise ValueError(
                "--text_config and --recall_dataset are for a whole repository; leave them out, or these formats: "
                f"{', '.join(FOLDER_FORMATS)}."
            )

    def format_names(self) -> list[str]:
        """The names in `formats`, in order."""
        return [name.strip() for name in self.formats.split(",") if name.strip()]
