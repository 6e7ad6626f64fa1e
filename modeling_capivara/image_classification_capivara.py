"""An image classifier out of CAPIVARA's image tower, which starts as the zero-shot classifier of its labels."""

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_capivara import CapivaraConfig
from .image_tower_capivara import CapivaraPreTrainedModel, check_main_input, unit_length, vision_width

TEXT_BATCH_SIZE = 64  # prompts that go through the text tower at once
IMAGE_SIDE = ("vision_model.", "visual_projection.", "logit_scale")  # what both models have, under the same names


class CapivaraForImageClassification(CapivaraPreTrainedModel):
    """Image tower and projection of CAPIVARA with a linear head, to be fine-tuned on labelled images.

    Logits are the head's, on unit-length image embeddings times exp(`logit_scale`). A head whose rows are class
    embeddings is the zero-shot classifier (CLIP, arXiv 2103.00020, section 3.1.2); `from_zero_shot` starts there. The
    scale is a factor of its own. Folded into the rows, which have length 1, it would make them up to a hundred times
    longer, and Adam's steps, as long as the learning rate says, would hardly turn them.

    A folder of `CapivaraModel` loads too: its text side is left out, and the head is new.
    """

    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch; `Trainer` averages it over accumulated ones
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\."]
    # Cosines of similar classes would be equal in bfloat16, which has 8 bits of precision.
    _keep_in_fp32_modules_strict = ["classifier"]

    def __init__(self, config: CapivaraConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = AutoModel.from_config(config.vision_config, dtype=torch.get_default_dtype())
        check_main_input("vision_config", self.vision_model, "pixel_values", "clip_vision_model")
        self.visual_projection = nn.Linear(vision_width(config.vision_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.classifier = nn.Linear(config.projection_dim, config.num_labels)
        self.image_tower_frozen = False
        self.post_init()

    @classmethod
    @torch.no_grad()
    def from_zero_shot(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        labels: Sequence[str] | Mapping[str, str | Sequence[str]],
        templates: Sequence[str],
    ) -> "CapivaraForImageClassification":
        """A classifier whose softmax equals the zero-shot probabilities of `model`.

        A class is the normalised mean of the normalised embeddings of its filled templates (CLIP, section 3.1.4).

        Args:
            model: a `CapivaraModel`; is not changed, and shares no weight with the classifier.
            processor: the model's own.
            labels: names of the classes, in the order of the logits; or name -> what stands for it in the templates,
                one text or several: `{"0": ["o número 0", "o algarismo zero"]}`.
            templates: texts in which `{}` is where a label goes, such as "uma foto de {}."; `["{}"]` for labels that
                are whole texts.

        Returns:
            In evaluation mode, on the device and in the type of `model`; nothing is frozen.

        Raises:
            ValueError: fewer than two labels, an empty one or the same twice; no template, or one without `{}`.
        """
        prompts = _filled_prompts(labels, templates)
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(prompts))
        config.label2id = {label: number for number, label in enumerate(prompts)}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(IMAGE_SIDE)}
        state["classifier.weight"] = _class_embeddings(model, processor, list(prompts.values()))
        state["classifier.bias"] = torch.zeros(len(prompts))
        return cls.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype).to(model.device)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in transformers; the folder names this class alone, not `CapivaraModel`, whose text tower it lacks."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {name: where for name, where in auto_map.items() if not where.endswith(".CapivaraModel")}
        super().save_pretrained(save_directory, **kwargs)
        self.config.auto_map = auto_map  # a `CapivaraModel` of the same configuration must not name this class

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the image tower."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | ImageClassifierOutput:
        """Logits of every label, and the loss where `labels` are given.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` makes them.
            labels: (images,), whole numbers, for cross-entropy; (images, num_labels), 0.0 or 1.0, for binary
                cross-entropy. `config.problem_type` chooses where it is set, else the type of `labels` does, and that
                choice is kept.

        Returns:
            `loss`, scalar in nats; `logits`, (images, num_labels), float32; `hidden_states` and `attentions` of the
            image tower, where asked for.

        Raises:
            ValueError: `pixel_values` is no batch of images, or the shape of `labels` does not fit.
        """
        outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        image_embeds = unit_length(outputs.pooler_output)  # (images, projection_dim), float32
        with torch.autocast(image_embeds.device.type, enabled=False):
            scaled = self.logit_scale.float().exp() * image_embeds
            logits = self.classifier(scaled.to(self.classifier.weight.dtype)).float()
        return ImageClassifierOutput(
            loss=self.loss_function(labels, logits, self.config) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _class_embeddings(model: PreTrainedModel, processor: ProcessorMixin, prompts: list[list[str]]) -> Tensor:
    """(classes, projection_dim), unit length, float32: the mean of each class's embedded prompts."""
    texts = [text for filled in prompts for text in filled]
    was_training = model.training
    model.eval()  # dropout would blur the classes
    try:
        parts = [texts[start : start + TEXT_BATCH_SIZE] for start in range(0, len(texts), TEXT_BATCH_SIZE)]
        inputs = (processor(text=part, return_tensors="pt").to(model.device) for part in parts)
        embeds = torch.cat([model(**part).text_embeds for part in inputs])
    finally:
        model.train(was_training)
    means = [part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts])]
    return unit_length(torch.stack(means))


def _filled_prompts(
    labels: Sequence[str] | Mapping[str, str | Sequence[str]], templates: Sequence[str]
) -> dict[str, list[str]]:
    """Label -> its filled templates, in the order of the labels."""
    names = list(labels) if isinstance(labels, Mapping) else labels
    _check_texts("labels", names, '["gato", "cachorro"]')
    _check_texts("templates", templates, '["uma foto de {}."]')
    if len(names) < 2:
        raise ValueError(f"`labels` must be at least 2 for a choice between them, got {names}; add the others.")
    repeated = [label for label, times in Counter(names).items() if times > 1]
    if repeated:
        raise ValueError(f"`labels` must differ, got {repeated} more than once; leave repetitions out or rename them.")
    without = [template for template in templates if "{}" not in template]
    if without:
        raise ValueError(f"Every template needs {{}} where the label goes, {without[0]!r} has none; write it there.")
    prompts = {}
    for label in names:
        texts = labels[label] if isinstance(labels, Mapping) else label
        texts = [texts] if isinstance(texts, str) else texts
        _check_texts(f"labels[{label!r}]", texts, '["gato", "gatinho"]')
        prompts[label] = [template.replace("{}", text) for text in texts for template in templates]
    return prompts


def _check_texts(name: str, texts: Sequence[str], example: str) -> None:
    """Raise ValueError unless `texts` is a list of texts, at least one and none of them blank."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"`{name}` must be a list of at least one text, got {texts!r}; write it as {example}.")
    wrong = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if wrong:
        raise ValueError(f"`{name}` must be texts that are not blank, got {wrong[0]!r}; write them as {example}.")
