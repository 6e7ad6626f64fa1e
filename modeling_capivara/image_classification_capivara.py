"""The image side of CAPIVARA: what both models share, and an image classifier out of it.

The classifier starts as the zero-shot classifier of its labels.
"""

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_capivara import CapivaraConfig

TEXT_BATCH_SIZE = 64  # prompts that go through the text tower at once
IMAGE_SIDE = ("vision_model.", "visual_projection.", "logit_scale")  # what both models have, under the same names


class CapivaraPreTrainedModel(PreTrainedModel):
    """What both models have in common: `vision_model`, `visual_projection`, `logit_scale` and `image_tower_frozen`."""

    config_class = CapivaraConfig
    config: CapivaraConfig
    base_model_prefix = "capivara"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if getattr(self, "logit_bias", None) is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def freeze_image_tower(self) -> None:
        """Fix the image side for good: no gradient to its parameters, and evaluation mode also after `train()`.

        Gradients still flow through it to `pixel_values`.
        """
        self.image_tower_frozen = True
        self.vision_model.requires_grad_(False)
        self.visual_projection.requires_grad_(False)
        self.vision_model.eval()

    def train(self, mode: bool = True) -> "CapivaraPreTrainedModel":
        """As in torch, but a frozen image tower stays in evaluation mode."""
        super().train(mode)
        if self.image_tower_frozen:
            self.vision_model.eval()  # batch norm statistics would move, dropout would be drawn
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, truncate_dim: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Image tower and projection of `pixel_values`, (images, 3, height, width).

        `truncate_dim` keeps the first so many numbers of each embedding; see `matryoshka_dims` of the configuration.

        Returns:
            The tower's output; `pooler_output` is (images, truncate_dim or projection_dim), projected, not normalised.

        Raises:
            ValueError: `pixel_values` is no batch of images, the tower has no pooled output, or `truncate_dim` is below
                1 or above `projection_dim`.
        """
        check_truncate_dim(truncate_dim, self.config.projection_dim)
        outputs = self._image_outputs(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    def _image_outputs(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if pixel_values.ndim != 4:
            shape = f"{tuple(pixel_values.shape)}; `CapivaraImageProcessor` makes them so"
            raise ValueError(f"`pixel_values` must be (images, 3, height, width), got shape {shape}.")
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=_pooler_output(outputs, self.config.vision_config),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )


class CapivaraForImageClassification(CapivaraPreTrainedModel):
    """Image tower and projection of CAPIVARA with a linear head, to be fine-tuned on labelled images.

    Logits are the head's, on unit-length image embeddings times exp(`logit_scale`): with class embeddings as rows, as
    `from_zero_shot` starts, the zero-shot classifier (CLIP, arXiv 2103.00020, section 3.1.2). Folded into the rows, the
    scale would make them up to a hundred times longer, and Adam's steps would hardly turn them.

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
        """A classifier whose softmax equals the zero-shot probabilities of `model`, a `CapivaraModel`.

        A class is the normalised mean of the normalised embeddings of its filled templates (CLIP, section 3.1.4). It
        shares no weight with the model, and is in evaluation mode, on its device, in its type, nothing frozen.

        Args:
            labels: names of the classes, in the order of the logits; or name -> what stands for it in the templates,
                one text or several: `{"0": ["o número 0", "o algarismo zero"]}`.
            templates: texts in which `{}` is where a label goes, such as "uma foto de {}."; `["{}"]` for whole texts.

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
        """Logits of every label, (images, num_labels), float32, and the loss in nats where `labels` are given.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` makes them.
            labels: (images,), whole numbers, for cross-entropy; (images, num_labels), 0.0 or 1.0, for binary
                cross-entropy. `config.problem_type` chooses where it is set, else the type of `labels`, once for all.

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
    texts, was_training = [text for filled in prompts for text in filled], model.training
    model.eval()  # dropout would blur the classes
    try:
        parts = [texts[start : start + TEXT_BATCH_SIZE] for start in range(0, len(texts), TEXT_BATCH_SIZE)]
        inputs = (processor(text=part, return_tensors="pt").to(model.device) for part in parts)
        embeds = torch.cat([model(**part).text_embeds for part in inputs])
    finally:
        model.train(was_training)
    return unit_length(torch.stack([part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts])]))


def _filled_prompts(
    labels: Sequence[str] | Mapping[str, str | Sequence[str]], templates: Sequence[str]
) -> dict[str, list[str]]:
    """Label -> its filled templates, in the order of the labels."""
    if isinstance(labels, str) or len(labels) < 2:
        raise ValueError(f"`labels` must be a list of at least 2, got {labels!r}.")
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise ValueError(f"`templates` must be a list of texts with {{}} where the label goes, got {templates!r}.")
    prompts = {}
    for name in labels:
        texts = labels[name] if isinstance(labels, Mapping) else name
        texts = list(texts) if isinstance(texts, list | tuple) else [texts]
        if name in prompts:
            raise ValueError(f"`labels` must differ, got {[name]} repeatedly.")
        if not texts or not all(isinstance(text, str) and text.strip() for text in [name, *texts]):
            raise ValueError(f"`labels` must be texts that are not blank, at least one each, got {texts} for {name!r}.")
        prompts[name] = [template.replace("{}", text) for text in texts for template in templates]
    return prompts


def unit_length(features: Tensor) -> Tensor:
    """`features` (rows, width) scaled to Euclidean length 1 a row, in float32, or in float64 where they are."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_truncate_dim(dim: int | None, width: int, name: str = "truncate_dim") -> None:
    """Raise ValueError, about the argument `name`, unless `dim` is None, for all, or from 1 to `width`."""
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"{name} must be from 1 to the embedding's width, {width}, got {dim}.")


def check_main_input(name: str, tower: PreTrainedModel, wanted: str, example: str) -> None:
    """Raise ValueError where the configuration `name` is of a tower that does not take `wanted`."""
    if (found := tower.main_input_name) != wanted:
        kind = f"{tower.config.model_type!r}, which takes `{found}`; use a model type such as {example!r}"
        raise ValueError(f"{name} must be a tower that takes `{wanted}`, got {kind}.")


@torch.no_grad()
def vision_width(config: PreTrainedConfig) -> int:
    """Width of the image tower's `pooler_output`: as stated, else (of convolutions) tried on one without weights."""
    if getattr(config, "hidden_size", None):
        return config.hidden_size
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        tower = AutoModel.from_config(config).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", None) or 3, height, width)
        return _pooler_output(tower(pixel_values=pixels, return_dict=True), config).shape[1]


def _pooler_output(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    """(images, width), the image tower's pooled output."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        other = "use one that does, such as 'clip_vision_model', 'vit' or 'timm_wrapper'"
        raise ValueError(f"The image tower {config.model_type!r} gives no `pooler_output` to be projected; {other}.")
    return pooled.flatten(1)  # some convolutional towers keep (images, width, 1, 1)
