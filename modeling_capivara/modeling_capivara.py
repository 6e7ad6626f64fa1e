"""CAPIVARA: an image tower and a multilingual text tower that embed into one space, and the loss of their training.

An image classifier out of it starts as the zero-shot classifier of its labels.
"""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_capivara import CapivaraConfig

TEXT_BATCH_SIZE = 64  # prompts that go through the text tower at once
SHARED_PARAMETER_PREFIXES = (
    "vision_model.",
    "visual_projection.",
    "logit_scale",
)  # what both models have, under the same names


@dataclass
class CapivaraOutput(ModelOutput):
    """What `CapivaraModel` returns, in float32; the parts of a modality that was not given are None."""

    loss: Tensor | None = None  # scalar in nats, when `return_loss` was set
    logits_per_image: Tensor | None = None  # (images, texts), cosines times the scale
    logits_per_text: Tensor | None = None  # (texts, images), its transpose
    text_embeds: Tensor | None = None  # (texts, projection_dim), unit length
    image_embeds: Tensor | None = None  # (images, projection_dim), unit length
    # Of the towers, in their type; `pooler_output` is (texts or images, width) before the projection
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    pooler_output: Tensor | None = None  # `image_embeds` of images alone, under the name that pipelines pool by

    def to_tuple(self) -> tuple:
        """As transformers' own CLIPOutput: the outputs of the towers become tuples, too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class CapivaraPreTrainedModel(PreTrainedModel):
    """What both models have in common: `vision_model`, `visual_projection`, `logit_scale` and `image_tower_frozen`."""

    config_class = CapivaraConfig
    config: CapivaraConfig
    base_model_prefix = "capivara"
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

    def freeze_image_encoder(self) -> None:
        """Fix the image side for good: no gradient to its parameters, and evaluation mode also after `train()`.

        Gradients still flow through it to `pixel_values`.
        """
        self.image_encoder_frozen = True
        self.vision_model.requires_grad_(False)
        self.visual_projection.requires_grad_(False)
        self.vision_model.eval()

    def train(self, mode: bool = True) -> "CapivaraPreTrainedModel":
        """As in torch, but a frozen image tower stays in evaluation mode."""
        super().train(mode)
        if self.image_encoder_frozen:
            self.vision_model.eval()  # batch norm statistics would move, dropout would be drawn
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, truncate_dim: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Image tower and projection of `pixel_values`, (images, 3, height, width).

        `truncate_dim` keeps the first so many numbers of each embedding; see `matryoshka_dims` of the configuration. Of
        the tower's output `pooler_output` is (images, truncate_dim or projection_dim), projected, not normalised.
        ValueError for no batch of images, or a `truncate_dim` below 1 or above `projection_dim`.
        """
        check_truncate_dim(truncate_dim, self.config.projection_dim)
        outputs = self._run_image_tower(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    def _run_image_tower(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if pixel_values.ndim != 4:
            shape = f"{tuple(pixel_values.shape)}; `CapivaraImageProcessor` makes them so"
            raise ValueError(f"`pixel_values` must be (images, 3, height, width), got shape {shape}.")
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=_get_pooler_output(outputs, self.config.vision_config),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )


class CapivaraModel(CapivaraPreTrainedModel):
    """Image tower and text tower of CAPIVARA (arXiv 2310.13683, section 3), embedding into one space.

    Texts are the mean of the token states that the mask keeps, then a projection; images are the tower's pooled
    output, then a projection. Equal to open_clip's `CustomTextCLIP` with a mean pooler.
    """

    input_modalities = ("image", "text")

    def __init__(self, config: CapivaraConfig):
        super().__init__(config)
        dtype = torch.get_default_dtype()  # not the one a tower was saved in: the parts of one model agree
        self.vision_model = AutoModel.from_config(config.vision_config, dtype=dtype)
        self.text_model = AutoModel.from_config(config.text_config, dtype=dtype, **_pooler_kwargs(config.text_config))
        check_main_input("vision_config", self.vision_model, "pixel_values", "clip_vision_model")
        check_main_input("text_config", self.text_model, "input_ids", "xlm-roberta")
        self.visual_projection = nn.Linear(infer_vision_width(config.vision_config), config.projection_dim, bias=False)
        self.text_projection = _build_text_projection(config)
        self.logit_scale, bias = nn.Parameter(torch.tensor(config.logit_scale_init_value)), config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.image_encoder_frozen = False
        self.post_init()

    @classmethod
    def from_open_clip(cls, source: str, revision: str | None = None, **kwargs) -> "CapivaraModel":
        """A model of open_clip, such as "hiaac-nlp/CAPIVARA"; open_clip itself is not needed.

        The first time it is fetched, converted, checked and kept in `$CAPIVARA_CACHE`, or ~/.cache/capivara; after that
        neither the Hub nor the converter is asked. Its processor: `AutoProcessor.from_pretrained(model.name_or_path)`.
        `source` is a Hub id, folder or checkpoint file. Without a revision (branch, tag, commit), what is in the cache
        is taken, else the main branch.

        Raises:
            ValueError: there is no such model, it can't be converted, or the Hub can't be reached.
            ImportError: this is a copy of the code that has travelled with a model, without the rest of the package.
        """
        from importlib import import_module  # cache and converter stay at home when this file travels with a model

        try:
            hub_cache = import_module("capivara_common.hub_cache")
            converter = import_module("modeling_capivara.convert_open_clip")
        except ImportError as error:
            raise ImportError("from_open_clip needs the package modeling-capivara: install it.") from error
        folder = hub_cache.model_folder(source, converter.convert_into, revision)
        if (kind := CapivaraConfig.get_config_dict(folder)[0].get("model_type")) != "capivara":
            raise ValueError(f"{folder} is of no CAPIVARA model: model_type is {kind!r}, not 'capivara'.")
        return cls.from_pretrained(folder, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in transformers; the folder also names the classes for image classification, zero-shot and fine-tuned."""
        # transformers writes the key of one Auto class alone, and the files that this one imports.
        names = {"ZeroShotImage": "CapivaraModel", "Image": "CapivaraForImageClassification"}
        auto_map = {f"AutoModelFor{task}Classification": f"modeling_capivara.{name}" for task, name in names.items()}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode texts with the text tower and its projection.

        Args:
            input_ids: (texts, tokens). Give either these or `inputs_embeds`.
            attention_mask: (texts, tokens), 1 for a token and 0 for padding. Default: padding tokens of `input_ids` are
                masked; no row of `inputs_embeds` is, because an embedding does not say whether it is padding.
            position_ids: (texts, tokens), positions of the tokens. Default: those that the text tower counts.
            token_type_ids: accepted because BERT's tokenizers return them, and ignored: a single text has one type.
            inputs_embeds: (texts, tokens, text width), word embeddings instead of `input_ids`.
            truncate_dim: keep this many leading dimensions of each embedding, see `matryoshka_dims` of the
                configuration. Default: all.

        Returns:
            The output of the text tower, with the projected embeddings as `pooler_output`, (texts, truncate_dim or
            projection_dim), not normalized.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, the mask keeps no token of a
                text, or a shape or `truncate_dim` is wrong.
        """
        check_truncate_dim(truncate_dim, self.config.projection_dim)
        outputs = self._run_text_tower(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    def _run_text_tower(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode texts with the text tower alone; `pooler_output` is the mean of its states, before the projection."""
        _check_tokens(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            tokens, kwargs["inputs_embeds"] = inputs_embeds[..., 0], inputs_embeds
            kept = torch.ones_like(tokens, dtype=torch.long)
        else:
            tokens, kwargs["input_ids"] = input_ids, input_ids
            pad = self.config.text_config.pad_token_id
            kept = (input_ids != (-1 if pad is None else pad)).long()  # -1 is no token: some towers have no padding
        attention_mask = kept if attention_mask is None else attention_mask
        _check_attention_mask(attention_mask, tokens)
        if position_ids is not None:  # otherwise not passed on: not every text tower accepts it
            kwargs["position_ids"] = position_ids
        outputs = self.text_model(attention_mask=attention_mask, return_dict=True, **kwargs)
        pooled = mean_pooling(outputs.last_hidden_state, attention_mask)  # (texts, text width), float32
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooled.to(outputs.last_hidden_state.dtype),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CapivaraOutput:
        """Embed texts, images or both; with both, compare every text with every image.

        The order of the parameters is that of transformers' `CLIPModel`.

        Args:
            input_ids: (texts, tokens), or None for images alone.
            pixel_values: (images, 3, height, width), or None for texts alone.
            attention_mask: (texts, tokens), 1 for a token and 0 for padding. Default: padding tokens are masked.
            position_ids: (texts, tokens), positions of the tokens. Default: those that the text tower counts.
            return_loss: also compute the contrastive loss, where text i belongs to image i.
            token_type_ids: accepted because BERT's tokenizers return them, and ignored: a single text has one type.

        Raises:
            ValueError: If neither modality is given, or if the loss is requested with a single modality or with unequal
                numbers of texts and images.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Give `input_ids`, `pixel_values` or both; got neither.")
        if return_loss and (input_ids is None or pixel_values is None):
            raise ValueError("`return_loss=True` needs both `input_ids` and `pixel_values`.")
        text_embeds = image_embeds = logits_per_text = text_outputs = image_outputs = None
        if input_ids is not None:
            text_outputs = self._run_text_tower(input_ids, attention_mask, position_ids, **kwargs)
            text_embeds = l2_normalize(self.text_projection(text_outputs.pooler_output))
        if pixel_values is not None:
            image_outputs = self._run_image_tower(pixel_values, **kwargs)
            image_embeds = l2_normalize(self.visual_projection(image_outputs.pooler_output))
        if text_embeds is not None and image_embeds is not None:
            logits_per_text = similarity_logits(text_embeds, image_embeds, self.logit_scale, self.logit_bias)
        loss = None
        if return_loss:
            loss = clip_loss(text_embeds, image_embeds, self.logit_scale, self.logit_bias)
        return CapivaraOutput(
            loss=loss,
            logits_per_image=logits_per_text.T if logits_per_text is not None else None,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
            pooler_output=image_embeds if text_embeds is None else None,
        )


class CapivaraForImageClassification(CapivaraPreTrainedModel):
    """Image tower and projection of CAPIVARA with a linear head, to be fine-tuned on labelled images.

    Logits are the head's, on unit-length image embeddings times exp(`logit_scale`): with class embeddings as rows, as
    `from_zero_shot` starts, the zero-shot classifier (CLIP, arXiv 2103.00020, section 3.1.2). Folded into the rows, the
    scale would make them up to a hundred times longer, and Adam's steps would hardly turn them.

    A folder of `CapivaraModel` loads too: its text side is left out, and the head is new.
    """

    main_input_name = "pixel_values"
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
        self.visual_projection = nn.Linear(infer_vision_width(config.vision_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        # Also `from_config(config, dtype=torch.bfloat16)` builds the head in float32: it knows of no exceptions.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels, dtype=dtype)
        self.image_encoder_frozen = False
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

        `labels` are names of the classes, in the order of the logits; or name -> what stands for it in the templates,
        one text or several: `{"0": ["o número 0", "o algarismo zero"]}`. `templates` are texts in which `{}` is where a
        label goes, such as "uma foto de {}."; `["{}"]` for whole texts. ValueError for fewer than two labels, an empty
        one or the same twice; no template, or one without `{}`.
        """
        prompts = _fill_templates(labels, templates)
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(prompts))
        config.label2id = {label: number for number, label in enumerate(prompts)}
        state = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if name.startswith(SHARED_PARAMETER_PREFIXES)
        }
        state["classifier.weight"] = _embed_classes(model, processor, list(prompts.values()))
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

        These are (images,), whole numbers, for cross-entropy; (images, num_labels), 0.0 or 1.0, for binary
        cross-entropy: `config.problem_type` chooses where it is set, else their type, once for all. ValueError where
        their shape does not fit, or `pixel_values` is no batch of images, (images, 3, height, width).
        """
        outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        image_embeds = l2_normalize(outputs.pooler_output)  # (images, projection_dim), float32
        with torch.autocast(image_embeds.device.type, enabled=False):
            scaled = self.logit_scale.float().exp() * image_embeds
            logits = self.classifier(scaled.to(self.classifier.weight.dtype)).float()
        return ImageClassifierOutput(
            loss=self.loss_function(labels, logits, self.config) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def similarity_logits(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """(texts, images), scaled cosines, in float32 also under autocast.

    Of unit-length embeddings (texts, projection_dim) and (images, projection_dim), the natural logarithm of the scale,
    and SigLIP's bias, scalars.
    """
    with torch.autocast(text_embeds.device.type, enabled=False):
        logits = logit_scale.float().exp() * text_embeds.float() @ image_embeds.float().T
        return logits if logit_bias is None else logits + logit_bias.float()


def clip_loss(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Mean of the two cross-entropies over the whole batch: text to image and image to text; with a bias SigLIP's loss.

    Source: CLIP (arXiv 2103.00020), section 2.3, figure 3; SigLIP (arXiv 2303.15343), algorithm 1.

    Args:
        text_embeds: (pairs, projection_dim), unit length.
        image_embeds: (pairs, projection_dim), unit length; row i belongs to row i of the texts.
        logit_scale: scalar, natural logarithm of the scale.
        logit_bias: scalar, SigLIP's bias. Default: CLIP's loss.

    Returns:
        The loss in nats, a scalar in float32. CLIP's loss of a single pair is 0: it has no wrong answer.

    Raises:
        ValueError: If the numbers of texts and images differ, or there is no pair.
    """
    if len(text_embeds) != len(image_embeds):
        raise ValueError(f"The loss needs as many texts as images, got {len(text_embeds)} and {len(image_embeds)}.")
    if not len(text_embeds):
        raise ValueError("The loss needs at least 1 pair, got 0.")
    logits_per_text = similarity_logits(text_embeds, image_embeds, logit_scale, logit_bias)
    if logit_bias is not None:
        signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
        return -F.logsigmoid(signs * logits_per_text).sum() / len(logits_per_text)
    targets = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """(texts, width), the mean of token states (texts, tokens, width) that the mask (texts, tokens) keeps, float32."""
    mask = attention_mask.unsqueeze(-1).float()  # (texts, tokens, 1)
    return (last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)


def _check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise ValueError(f"Give either `input_ids` or `inputs_embeds`, got {found}.")
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"`input_ids` must be (texts, tokens), got shape {tuple(input_ids.shape)}.")
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(f"`inputs_embeds` must be (texts, tokens, width), got shape {tuple(inputs_embeds.shape)}.")


def _check_attention_mask(attention_mask: Tensor, tokens: Tensor) -> None:
    if attention_mask.shape != tokens.shape:
        shapes = f"{tuple(tokens.shape)}, got {tuple(attention_mask.shape)}"
        raise ValueError(f"`attention_mask` must have the shape of the tokens, {shapes}; pass both as given.")
    # Values are checked on the CPU alone: a GPU would be waited for. There, a text of padding alone embeds as NaN.
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if empty := (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist():
        rows = f"rows {empty[:10]} of {len(tokens)} are all padding"
        raise ValueError(f"Every text needs at least one token that the attention mask keeps; {rows}.")


def _pooler_kwargs(text_config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments that build a text encoder without the pooler that mean pooling leaves unused."""
    model_class = MODEL_MAPPING.get(type(text_config), object)  # AutoModel says so when it does not know the kind
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def _build_text_projection(config: CapivaraConfig) -> nn.Module:
    width = config.text_config.hidden_size
    if config.text_projection_type == "linear":
        return nn.Linear(width, config.projection_dim, bias=False)
    hidden = (width + config.projection_dim) // 2  # open_clip's rule: 640 for 768 -> 512
    first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, config.projection_dim, bias=False)
    return nn.Sequential(first, nn.GELU(), last)


def _embed_classes(model: PreTrainedModel, processor: ProcessorMixin, prompts: list[list[str]]) -> Tensor:
    """(classes, projection_dim), unit length, float32: the mean of each class's embedded prompts."""
    texts, was_training = [text for filled in prompts for text in filled], model.training
    model.eval()  # dropout would blur the classes
    try:
        parts = [texts[start : start + TEXT_BATCH_SIZE] for start in range(0, len(texts), TEXT_BATCH_SIZE)]
        inputs = (processor(text=part, return_tensors="pt").to(model.device) for part in parts)
        embeds = torch.cat([model(**part).text_embeds for part in inputs])
    finally:
        model.train(was_training)
    return l2_normalize(torch.stack([part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts])]))


def _fill_templates(
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


def l2_normalize(features: Tensor) -> Tensor:
    """`features` (rows, width) scaled to Euclidean length 1 a row, in float32, or in float64 where they are."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_truncate_dim(dim: int | None, width: int, name: str = "truncate_dim") -> None:
    """Raise ValueError, about the argument `name`, unless `dim` is None, for all, or from 1 to `width`."""
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"{name} must be from 1 to the embedding's width, {width}, got {dim}.")


def check_main_input(name: str, tower: PreTrainedModel, expected: str, example: str) -> None:
    """Raise ValueError where the configuration `name` is of a tower that does not take `wanted`."""
    if (found := tower.main_input_name) != expected:
        kind = f"{tower.config.model_type!r}, which takes `{found}`; use a model type such as {example!r}"
        raise ValueError(f"{name} must be a tower that takes `{expected}`, got {kind}.")


@torch.no_grad()
def infer_vision_width(config: PreTrainedConfig) -> int:
    """Width of the image tower's `pooler_output`: as stated, else (of convolutions) tried on one without weights."""
    if getattr(config, "hidden_size", None):
        return config.hidden_size
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        tower = AutoModel.from_config(config).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", None) or 3, height, width)
        return _get_pooler_output(tower(pixel_values=pixels, return_dict=True), config).shape[1]


def _get_pooler_output(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    """(images, width), the image tower's pooled output."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        other = "use one that does, such as 'clip_vision_model', 'vit' or 'timm_wrapper'"
        raise ValueError(f"The image tower {config.model_type!r} gives no `pooler_output` to be projected; {other}.")
    return pooled.flatten(1)  # some convolutional towers keep (images, width, 1, 1)
