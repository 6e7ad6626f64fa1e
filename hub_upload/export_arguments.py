"""Arguments of `hub_upload.export`: light, so that `--help` answers before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path

FORMATS = ("transformers", "open_clip", "sentence_transformers", "onnx")


@dataclass
class ExportArguments:
    model: Path = field(
        metadata={"help": "Folder of a CAPIVARA model, as a training run or `save_pretrained` leaves it."}
    )
    output: Path = field(metadata={"help": "Folder of the repository. Must be missing or empty."})
    formats: str = field(
        default=",".join(FORMATS),
        metadata={
            "help": f"What shall be able to load it, with commas between, of {', '.join(FORMATS)}. transformers is "
            "always among them: the others read its files. onnx needs the extra of its name and, for the full size, "
            "minutes."
        },
    )
    text_config: str | None = field(
        default=None,
        metadata={
            "help": "Where open_clip finds the text tower's configuration. The published architecture needs none: it "
            "is that of XLM-RoBERTa base, on the Hub. For any other: a Hub id; or a folder that holds it, such as the "
            "model's own, to be copied to text_model/ in the repository, where open_clip finds it only when started "
            "in the downloaded folder, as local-dir:. Without it open_clip is left out."
        },
    )
    repo_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, OWNER/NAME, under which the repository will be published. hf-hub: of open_clip then takes "
            "its tokenizer from there; without it, that of the text tower's Hub id."
        },
    )
    recall_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Data set with images and captions, in the forms that eval.retrieval reads, on which the recall of "
            "the int8 graphs is measured beside the float32 ones; not measured without it."
        },
    )
    recall_split: str = field(default="test", metadata={"help": "Split of it."})
    recall_language: str = field(default="pt", metadata={"help": "Language of its captions."})
    recall_caption_column: str = field(
        default="captions-{language}", metadata={"help": "Column of a caption or a list of captions an image."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the output folder."})
