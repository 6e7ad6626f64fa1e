"""sentence-transformers' part of a repository: the methods that embed, and unit length. Weights are transformers'.

Without `modality_config` sentence-transformers 6 takes the model for a text encoder, and says nothing.
"""

from pathlib import Path

from common.files import write_json

MODULES = "sentence_transformers.base.modules"  # as version 6 writes and reads it
FEATURE = "sentence_embedding"  # its name for a finished embedding, which Normalize scales to unit length


def write_sentence_transformers(folder: Path) -> None:
    """Write `modules.json` and what it names."""
    modules = [("", "transformer.Transformer"), ("1_Normalize", "normalize.Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"{MODULES}.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
                "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
            },
            "module_output_name": FEATURE,
        },
    )
    names = {"module_input_name": FEATURE, "module_output_name": FEATURE}
    write_json(folder / "1_Normalize/config.json", names)
    # No versions in it: an older sentence-transformers 6 would warn of a newer one.
    facts = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    write_json(folder / "config_sentence_transformers.json", facts)
