"""CAPIVARA for Hugging Face transformers: configuration, models, processor, tokenizer and image processor.

Importing this package registers its classes with transformers, so that `AutoModel`, `AutoProcessor` and pipelines load
CAPIVARA models without `trust_remote_code`.
"""

import transformers

from .configuration_capivara import CapivaraConfig
from .image_processing_capivara import CapivaraImageProcessor
from .modeling_capivara import CapivaraForImageClassification, CapivaraModel, CapivaraOutput, clip_loss
from .processing_capivara import CapivaraProcessor
from .text_cleaning_capivara import clean_text
from .tokenization_capivara import CapivaraTokenizer

__version__ = "0.1.0"

__all__ = [
    "CapivaraConfig",
    "CapivaraForImageClassification",
    "CapivaraImageProcessor",
    "CapivaraModel",
    "CapivaraOutput",
    "CapivaraProcessor",
    "CapivaraTokenizer",
    "clean_text",
    "clip_loss",
]

transformers.AutoConfig.register("capivara", CapivaraConfig)
transformers.AutoModel.register(CapivaraConfig, CapivaraModel)
transformers.AutoModelForZeroShotImageClassification.register(CapivaraConfig, CapivaraModel)
transformers.AutoModelForImageClassification.register(CapivaraConfig, CapivaraForImageClassification)
# transformers looks up image processors by backend, PIL or torchvision. CAPIVARA has one class, which serves for both.
transformers.AutoImageProcessor.register(
    CapivaraConfig, image_processor_classes={"pil": CapivaraImageProcessor, "torchvision": CapivaraImageProcessor}
)
transformers.AutoTokenizer.register(CapivaraConfig, CapivaraTokenizer)
transformers.AutoProcessor.register(CapivaraConfig, CapivaraProcessor)

# After this registration, `save_pretrained` copies the source files of the classes into the model folder, so that users
# without this package can load the model with `trust_remote_code=True`.
CapivaraConfig.register_for_auto_class()
CapivaraModel.register_for_auto_class("AutoModel")
CapivaraForImageClassification.register_for_auto_class("AutoModelForImageClassification")
CapivaraImageProcessor.register_for_auto_class()
CapivaraTokenizer.register_for_auto_class()
CapivaraProcessor.register_for_auto_class()
