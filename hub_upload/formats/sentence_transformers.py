"""Export a model for Sentence Transformers, and check that the exported model gives the same text embeddings."""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import ProcessorMixin

from capivara_common.files import write_json
from hub_upload.formats import check_embedding_difference
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_texts, pads_to_max_length, random_texts

# Python package that contains the module classes of Sentence Transformers since its version 6. The class names in
# modules.json start with it.
SENTENCE_TRANSFORMERS_MODULES = "sentence_transformers.base.modules"
SENTENCE_EMBEDDING_KEY = "sentence_embedding"  # key under which Sentence Transformers passes embeddings between modules
logger = logging.getLogger("capivara")


def write_sentence_transformers_config(folder: Path, processor: ProcessorMixin) -> None:
    """Write the configuration files with which Sentence Transformers loads the exported model.

    The pipeline has two modules: the whole model, for texts and images, and a module that scales embeddings to unit
    length.

    Args:
        folder: Folder of the export, which already has the files for transformers.
        processor: Processor of the model.
    """
    classes = {"": "transformer.Transformer", "1_Normalize": "normalize.Normalize"}
    write_sentence_transformers_pipeline_files(folder, SENTENCE_TRANSFORMERS_MODULES, classes)
    settings = {
        "transformer_task": "feature-extraction",
        # Without these entries, Sentence Transformers 6 would silently treat the model as a text-only model.
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": SENTENCE_EMBEDDING_KEY,
    }
    if pads_to_max_length(processor):
        # Some models, such as SigLIP, need texts that are padded to the full length. By default, Sentence Transformers
        # pads texts only to the length of the longest text in a batch.
        rule = {"padding": "max_length", "max_length": processor.tokenizer.model_max_length}
        settings["processing_kwargs"] = {"text": rule}
    write_json(folder / "sentence_bert_config.json", settings)
    names = {"module_input_name": SENTENCE_EMBEDDING_KEY, "module_output_name": SENTENCE_EMBEDDING_KEY}
    write_json(folder / "1_Normalize/config.json", names)


def check_sentence_transformers_embeddings(source: Path, folder: Path) -> None:
    """Check that an export gives the same text embeddings in Sentence Transformers as the original model.

    If Sentence Transformers is not installed, the comparison is skipped, and a message is logged.

    Args:
        source: Folder of the model.
        folder: Folder of the export.

    Raises:
        ValueError: If a component of an embedding differs by `EMBEDDING_TOLERANCE` or more.
    """
    if not find_spec("sentence_transformers"):
        logger.info(
            "sentence-transformers is not installed, so its text embeddings were not compared with the model's."
        )
        return
    from sentence_transformers import SentenceTransformer

    texts = [*random_texts(), "Uma FOTO de São João"]  # texts of several lengths, one with capital letters
    ours = embed_texts(load_model(source).eval(), load_processor(source), texts)
    # SigLIP's text tower needs texts that are padded to the full length. Each batch has a single text, so that missing
    # padding changes the embeddings. In a larger batch, padding to the longest text could hide the error.
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=1, show_progress_bar=False)
    check_embedding_difference("sentence-transformers", [(ours, torch.from_numpy(theirs))])


def write_sentence_transformers_pipeline_files(folder: Path, package: str, classes: dict[str, str]) -> None:
    """Write modules.json and config_sentence_transformers.json, from which Sentence Transformers builds its pipeline.

    Args:
        folder: Folder to write to.
        package: Python package that holds the classes of the modules.
        classes: Dict {subfolder: class name} with the modules of the pipeline, in the order of execution.
    """
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{package}.{class_name}"}
        for index, (path, class_name) in enumerate(classes.items())
    ]
    write_json(folder / "modules.json", modules)
    # The library versions that this file usually contains are left out, because users with an older release of Sentence
    # Transformers 6 would see a warning.
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    write_json(folder / "config_sentence_transformers.json", settings)
