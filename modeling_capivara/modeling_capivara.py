"""PyTorch models of CAPIVARA: a CLIP-like dual encoder with a multilingual text tower, and an image classifier.

`CapivaraModel` embeds texts and images into one space. `CapivaraForImageClassification` classifies images with the same
image encoder and a linear head.
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

TEXT_BATCH_SIZE = 64  # prompts per forward pass when class embeddings are computed
# Prefixes of the parameters that `CapivaraModel` and `CapivaraForImageClassification` have in common.
SHARED_PREFIXES = ("vision_model.", "visual_projection.", "logit_scale")
# For each tower, the name of its main input, and a model type that takes this input, for error messages.
TOWER_INPUTS = {"vision_config": ("pixel_values", "clip_vision_model"), "text_config": ("input_ids", "xlm-roberta")}


@dataclass
class CapivaraOutput(ModelOutput):
    """Output of `CapivaraModel`. A field is None if it needs texts or images that were not given.

    Attributes:
        loss: Contrastive loss in nats, a float32 scalar. None without `return_loss=True`.
        logits_per_image: (images, texts), float32. Cosine similarities times exp(`logit_scale`), plus `logit_bias` if
            the model has one.
        logits_per_text: (texts, images), the transpose of `logits_per_image`.
        text_embeds: (texts, projection_dim), float32, unit length.
        image_embeds: (images, projection_dim), float32, unit length.
        text_model_output: Output of the text tower in its own dtype. Its `pooler_output`, (texts, text width), is the
            mean of the token states, not projected.
        vision_model_output: Output of the image tower in its own dtype. Its `pooler_output`, (images, image width), is
            not projected.
        pooler_output: Same as `image_embeds` if only images were given, otherwise None.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    pooler_output: Tensor | None = None  # transformers' pipeline "image-feature-extraction" reads this field

    def to_tuple(self) -> tuple:
        """Convert the output to a tuple of its fields that are not None, in the order of their declaration.

        The outputs of the text tower and of the image tower become nested tuples.
        """
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class CapivaraPreTrainedModel(PreTrainedModel):
    """Base class of the CAPIVARA models, with the code that all models with an image encoder share.

    This class initializes weights, computes image embeddings and can freeze the image encoder. Subclasses must define
    the attributes `vision_model` (image tower), `visual_projection` and `logit_scale`.
    """

    config_class = CapivaraConfig
    config: CapivaraConfig
    base_model_prefix = "capivara"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    image_encoder_frozen = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if getattr(self, "logit_bias", None) is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def freeze_image_encoder(self) -> None:
        """Freeze the image tower and its projection, so that training does not change image embeddings.

        The parameters of both get no gradient, and the image tower stays in evaluation mode even after `train()`.
        Gradients still flow through both to `pixel_values`.
        """
        self.image_encoder_frozen = True
        self.vision_model.requires_grad_(False)
        self.visual_projection.requires_grad_(False)
        self.vision_model.eval()

    def train(self, mode: bool = True) -> "CapivaraPreTrainedModel":
        """Set the model to training or evaluation mode. A frozen image tower always stays in evaluation mode.

        Args:
            mode: True for training mode, False for evaluation mode.

        Returns:
            The model itself.
        """
        super().train(mode)
        if self.image_encoder_frozen:
            self.vision_model.eval()  # batch norm must not update its statistics, and dropout must not be applied
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, truncate_dim: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode images with the image tower and its projection.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` returns them.
            truncate_dim: Number of leading dimensions to keep, ideally one of `config.matryoshka_dims`. Default: all.
            **kwargs: Options of the image tower, such as `output_hidden_states`. With `return_dict=False` a tuple is
                returned.

        Returns:
            The output of the image tower. Its `pooler_output` is the projected embedding, not normalized, (images,
            width). The width is `truncate_dim` if given, otherwise `projection_dim`.

        Raises:
            ValueError: If `pixel_values` does not have four dimensions, or `truncate_dim` is not from 1 to
                `projection_dim`.
        """
        check_truncate_dim(truncate_dim, self.config.projection_dim)
        outputs = self._run_image_tower(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    def _run_image_tower(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Run the image tower without the projection.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` returns them.
            **kwargs: Options of the image tower, such as `output_hidden_states`.

        Returns:
            The output of the image tower. Its `pooler_output`, (images, image width), is not projected.

        Raises:
            ValueError: If `pixel_values` does not have four dimensions, or the tower returns no `pooler_output`.
        """
        if pixel_values.ndim != 4:
            rule = "`pixel_values` must be (images, 3, height, width), as `CapivaraImageProcessor` returns them"
            raise ValueError(f"{rule}, got shape {tuple(pixel_values.shape)}.")
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return _with_pooler_output(outputs, _get_pooler_output(outputs, self.config.vision_config))


class CapivaraModel(CapivaraPreTrainedModel):
    """CAPIVARA model (arXiv 2310.13683, section 3), which embeds images and texts in one shared space.

    An image tower and a text tower are each followed by a projection to the shared space. The states of a text's
    tokens, except padding, are averaged before the projection. The outputs equal those of open_clip's `CustomTextCLIP`
    with a mean pooler.

    Args:
        config: Architecture of the model. The weights are random. Use `from_pretrained` or `from_open_clip` to load
            trained weights.

    Raises:
        ValueError: If the image tower does not take `pixel_values` or has no `pooler_output`, or the text tower does
            not take `input_ids`.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from modeling_capivara import CapivaraModel, CapivaraProcessor
        >>> model = CapivaraModel.from_pretrained(folder)  # or from_open_clip("hiaac-nlp/CAPIVARA")
        >>> processor = CapivaraProcessor.from_pretrained(folder)
        >>> image = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
        >>> inputs = processor(text=["uma foto de um gato", "uma casa"], images=image, return_tensors="pt")
        >>> probabilities = model(**inputs).logits_per_image.softmax(dim=-1)
        >>> probabilities.shape  # (images, texts)
        torch.Size([1, 2])
    """

    input_modalities = ("image", "text")

    def __init__(self, config: CapivaraConfig):
        super().__init__(config)
        self.vision_model = _build_tower("vision_config", config.vision_config)
        self.text_model = _build_tower("text_config", config.text_config)
        self.visual_projection = nn.Linear(_infer_vision_width(config.vision_config), config.projection_dim, bias=False)
        self.text_projection = _build_text_projection(config)
        self.logit_scale, bias = nn.Parameter(torch.tensor(config.logit_scale_init_value)), config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.post_init()

    @classmethod
    def from_open_clip(cls, source: str, revision: str | None = None, **kwargs) -> "CapivaraModel":
        """Load a model in open_clip's format as a `CapivaraModel`. The package open_clip is not needed.

        The first call downloads and converts the model, and stores it in the cache `$CAPIVARA_CACHE` (default:
        ~/.cache/capivara). Load its processor with `AutoProcessor.from_pretrained(model.name_or_path)`.

        Args:
            source: Hub id such as "hiaac-nlp/CAPIVARA", folder of a model, or path of a checkpoint file.
            revision: Branch, tag or commit on the Hub. A branch or tag needs a network in every call. Default: the
                cached model, otherwise the main branch.
            **kwargs: Options of `from_pretrained`, such as `dtype`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If there is no such model, it can't be converted, or the Hub can't be reached.
            ImportError: If the package modeling-capivara is not installed, as is possible with
                `trust_remote_code=True`.
        """
        # `save_pretrained` copies this file into model folders, and also every module that this file names in an import
        # statement. `import_module` is used, because the modules of the cache and the converter must not be copied.
        from importlib import import_module

        try:
            hub_cache = import_module("capivara_common.hub_cache")
            converter = import_module("modeling_capivara.convert_open_clip")
        except ImportError as error:
            raise ImportError("from_open_clip needs the package modeling-capivara: install it.") from error
        folder = hub_cache.find_download_or_convert_model_folder(source, converter.convert_to_folder, revision)
        model_type = CapivaraConfig.get_config_dict(folder)[0].get("model_type")
        if model_type != "capivara":
            raise ValueError(f"The model in {folder} is not a CAPIVARA model: its model_type is {model_type!r}.")
        return cls.from_pretrained(folder, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model so that `AutoModel` and the Auto classes for image classification can load it.

        Args:
            save_directory: Folder to write to; it is created if necessary.
            **kwargs: Options of transformers' `PreTrainedModel.save_pretrained`.
        """
        # transformers itself writes only `AutoModel` to `auto_map`, so the Auto classes for image classification are
        # added here.
        names = {"ZeroShotImage": "CapivaraModel", "Image": "CapivaraForImageClassification"}
        auto_map = {f"AutoModelFor{task}Classification": f"modeling_capivara.{name}" for task, name in names.items()}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding layer of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding layer of the text tower.

        Args:
            value: New embedding layer.
        """
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
            input_ids: (texts, tokens). Give either `input_ids` or `inputs_embeds`.
            attention_mask: (texts, tokens), 1 for a token and 0 for padding. Default: padding tokens in `input_ids` are
                masked; with `inputs_embeds`, nothing is masked.
            position_ids: (texts, tokens). Default: the text tower counts the positions.
            token_type_ids: Ignored.
            inputs_embeds: (texts, tokens, text width), token embeddings instead of `input_ids`.
            truncate_dim: Number of leading dimensions to keep, ideally one of `config.matryoshka_dims`. Default: all.
            **kwargs: Options of the text tower, such as `output_hidden_states`. With `return_dict=False` a tuple is
                returned.

        Returns:
            The output of the text tower. Its `pooler_output` is the projected embedding, not normalized, (texts,
            width). The width is `truncate_dim` if given, otherwise `projection_dim`.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, a shape is wrong, `truncate_dim`
                is not from 1 to `projection_dim`, or the attention mask of a text is all 0 (checked only on the CPU).
        """
        # The first three parameters have the order of transformers' `CLIPModel.get_text_features`. `token_type_ids` is
        # accepted because BERT's tokenizers return it; a single text has only one type.
        check_truncate_dim(truncate_dim, self.config.projection_dim)
        outputs = self._run_text_tower(input_ids, attention_mask, inputs_embeds, position_ids=position_ids, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    def _run_text_tower(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Run the text tower and average its token states, without the projection.

        Args:
            input_ids: (texts, tokens), or None if `inputs_embeds` is given.
            attention_mask: (texts, tokens), 1 for a token and 0 for padding. None masks the padding tokens of
                `input_ids`.
            inputs_embeds: (texts, tokens, text width), token embeddings instead of `input_ids`.
            **kwargs: `position_ids`, (texts, tokens) or None, and options of the text tower.

        Returns:
            The output of the text tower. Its `pooler_output`, (texts, text width), is the mean of the unmasked token
            states.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, a shape is wrong, or the attention
                mask of a text is all 0 (checked only on the CPU).
        """
        _check_text_inputs(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            tokens = inputs_embeds[..., 0]
            # The default masks nothing, because an embedding does not show whether its token is padding.
            default_mask = torch.ones_like(tokens, dtype=torch.long)
        else:
            tokens, pad = input_ids, self.config.text_config.pad_token_id
            # Some towers have no padding token. Comparing with -1 then masks nothing, because no token has this id.
            default_mask = (input_ids != (-1 if pad is None else pad)).long()
        attention_mask = default_mask if attention_mask is None else attention_mask
        _check_attention_mask(attention_mask, tokens)
        # Positions are passed on only if they are given, because some text towers don't accept them.
        if kwargs.get("position_ids") is None:
            kwargs.pop("position_ids", None)
        kwargs |= {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        outputs = self.text_model(attention_mask=attention_mask, return_dict=True, **kwargs)
        pooled = mean_pooling(outputs.last_hidden_state, attention_mask)  # (texts, text width), float32
        return _with_pooler_output(outputs, pooled.to(outputs.last_hidden_state.dtype))

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
        """Embed texts, images or both. If both are given, also compute the similarity of every text to every image.

        Args:
            input_ids: (texts, tokens), or None to embed only images.
            pixel_values: (images, 3, height, width), or None to embed only texts.
            attention_mask: (texts, tokens), 1 for a token and 0 for padding. Default: padding tokens are masked.
            position_ids: (texts, tokens). Default: the text tower counts the positions.
            return_loss: Whether to compute the contrastive loss. Text i must then belong to image i.
            token_type_ids: Ignored.
            **kwargs: Options of both towers, such as `output_hidden_states`. With `return_dict=False` a tuple is
                returned.

        Returns:
            A `CapivaraOutput` with embeddings of unit length. Fields of missing inputs are None.

        Raises:
            ValueError: If neither texts nor images are given, a shape is wrong, or the attention mask of a text is all
                0 (checked only on the CPU). With `return_loss`, also if texts or images are missing, or their numbers
                differ.
        """
        # The positional parameters have the order of transformers' `CLIPModel.forward`. `token_type_ids` is accepted
        # because BERT's tokenizers return it; a single text has only one type.
        if input_ids is None and pixel_values is None:
            raise ValueError("Give `input_ids`, `pixel_values` or both; got neither.")
        if return_loss and (input_ids is None or pixel_values is None):
            raise ValueError("`return_loss=True` needs both `input_ids` and `pixel_values`.")
        text_embeds = image_embeds = logits_per_text = text_outputs = image_outputs = None
        if input_ids is not None:
            text_outputs = self._run_text_tower(input_ids, attention_mask, position_ids=position_ids, **kwargs)
            text_embeds = l2_normalize(self.text_projection(text_outputs.pooler_output))
        if pixel_values is not None:
            image_outputs = self._run_image_tower(pixel_values, **kwargs)
            image_embeds = l2_normalize(self.visual_projection(image_outputs.pooler_output))
        if text_embeds is not None and image_embeds is not None:
            logits_per_text = similarity_logits(text_embeds, image_embeds, self.logit_scale, self.logit_bias)
        return CapivaraOutput(
            loss=clip_loss(text_embeds, image_embeds, self.logit_scale, self.logit_bias) if return_loss else None,
            logits_per_image=logits_per_text.T if logits_per_text is not None else None,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
            pooler_output=image_embeds if text_embeds is None else None,
        )


class CapivaraForImageClassification(CapivaraPreTrainedModel):
    """CAPIVARA's image encoder with a linear classification head, for fine-tuning on labeled images.

    `from_zero_shot` initializes the head with the text embeddings of the classes. The model then starts as a zero-shot
    classifier (CLIP, arXiv 2103.00020, section 3.1.2). `from_pretrained` also loads the folder of a `CapivaraModel`,
    and then creates a head with random weights.

    Args:
        config: Architecture of the model; `num_labels` is the number of classes.

    Raises:
        ValueError: If the image tower of `config` does not take `pixel_values` or has no `pooler_output`.

    Example:
        >>> import torch
        >>> from modeling_capivara import CapivaraForImageClassification, CapivaraModel, CapivaraProcessor
        >>> model, processor = CapivaraModel.from_pretrained(folder), CapivaraProcessor.from_pretrained(folder)
        >>> classifier = CapivaraForImageClassification.from_zero_shot(
        ...     model, processor, labels=["gato", "cachorro", "capivara"], templates=["uma foto de {}."]
        ... )
        >>> classifier.config.id2label
        {0: 'gato', 1: 'cachorro', 2: 'capivara'}
        >>> size = classifier.config.vision_config.image_size
        >>> classifier(pixel_values=torch.zeros(2, 3, size, size)).logits.shape  # (images, labels)
        torch.Size([2, 3])
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss is a mean over the batch, so transformers' `Trainer` must average it over accumulation steps itself.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\."]
    # The classifier stays float32. In bfloat16, which has a precision of only 8 bits, the logits of similar classes
    # could be equal.
    _keep_in_fp32_modules_strict = ["classifier"]

    def __init__(self, config: CapivaraConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = _build_tower("vision_config", config.vision_config)
        self.visual_projection = nn.Linear(_infer_vision_width(config.vision_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        # `from_config(config, dtype=torch.bfloat16)` ignores `_keep_in_fp32_modules_strict`, so the head is created
        # explicitly in float32, or in float64 if that is the default dtype.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels, dtype=dtype)
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
        """Build a classifier that starts with the zero-shot probabilities of a `CapivaraModel`, ready for fine-tuning.

        The initial weights of a class are the mean embedding of its prompts, scaled to unit length (prompt ensembling,
        CLIP, arXiv 2103.00020, section 3.1.4).

        Args:
            model: A `CapivaraModel`. It is not changed, and the classifier shares no weights with it.
            processor: The model's `CapivaraProcessor`.
            labels: At least two class names, in the order of the logits. Or a dictionary `{class name: text or list of
                texts}`, whose texts replace the class names in the templates.
            templates: Texts in which `{}` is replaced by the class name, such as "uma foto de {}.". Use `["{}"]` if the
                texts in `labels` are complete sentences.

        Returns:
            The classifier in evaluation mode, on the device of `model`. The image encoder has the dtype of `model`, the
            head is in float32. No parameter is frozen.

        Raises:
            ValueError: If there are fewer than two labels, a label is blank or repeated, there is no template, or a
                template lacks `{}`.
        """
        prompts = _fill_templates(labels, templates)
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(prompts))
        config.label2id = {label: number for number, label in enumerate(prompts)}
        state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith(SHARED_PREFIXES)}
        state["classifier.weight"] = _embed_classes(model, processor, list(prompts.values()))
        state["classifier.bias"] = torch.zeros(len(prompts))
        return cls.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype).to(model.device)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the classifier, without a text encoder. The folder can't be loaded as a `CapivaraModel`.

        Args:
            save_directory: Folder to write to; it is created if necessary.
            **kwargs: Options of transformers' `PreTrainedModel.save_pretrained`.
        """
        # transformers reads in `auto_map` which class an Auto class loads. `CapivaraModel` is removed, because it could
        # not be loaded without a text encoder.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {key: name for key, name in auto_map.items() if not name.endswith(".CapivaraModel")}
        super().save_pretrained(save_directory, **kwargs)
        # Undo the change of `auto_map`, because a `CapivaraModel` may share this configuration object.
        self.config.auto_map = auto_map

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding layer of the image tower."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | ImageClassifierOutput:
        """Classify images and, if `labels` are given, compute the loss.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` returns them.
            labels: Class indices, (images,), for a cross-entropy loss. If an image may have several labels: 0.0 or 1.0
                for each class, (images, num_labels), for a binary cross-entropy loss. `config.problem_type` selects the
                loss. If it is None, the dtype of the first `labels` sets it.
            **kwargs: Options of the image tower, such as `output_hidden_states`. With `return_dict=False` a tuple is
                returned.

        Returns:
            An output with `logits`, (images, num_labels), float32, and `loss` in nats (None without `labels`).

        Raises:
            ValueError: If `pixel_values` does not have four dimensions, or `labels` has a wrong shape.
        """
        outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        image_embeds = l2_normalize(outputs.pooler_output)  # float32
        with torch.autocast(image_embeds.device.type, enabled=False):
            # The factor multiplies the embeddings, not the rows of the head. Otherwise, the rows would be up to a
            # hundred times longer, and Adam's steps would hardly change their direction.
            scaled = self.logit_scale.float().exp() * image_embeds
            logits = self.classifier(scaled.to(self.classifier.weight.dtype)).float()
        # If `config.problem_type` is None, the first loss sets it according to the dtype of `labels`.
        return ImageClassifierOutput(
            loss=self.loss_function(labels, logits, self.config) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def similarity_logits(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Compute the similarity logits of every text with every image, in float32 even inside autocast.

    A logit is the cosine similarity times exp(`logit_scale`), plus `logit_bias` if given.

    Args:
        text_embeds: (texts, projection_dim), unit length.
        image_embeds: (images, projection_dim), unit length.
        logit_scale: Scalar, natural logarithm of the factor that multiplies the cosines.
        logit_bias: Scalar, SigLIP's bias. Default: no bias.

    Returns:
        Logits, (texts, images), float32.
    """
    with torch.autocast(text_embeds.device.type, enabled=False):
        logits = logit_scale.float().exp() * text_embeds.float() @ image_embeds.float().T
        return logits if logit_bias is None else logits + logit_bias.float()


def clip_loss(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Compute the contrastive loss of a batch of matching texts and images.

    Without `logit_bias`, this is CLIP's symmetric cross-entropy loss (arXiv 2103.00020, section 2.3, figure 3). With
    `logit_bias`, it is SigLIP's sigmoid loss (arXiv 2303.15343, algorithm 1).

    Args:
        text_embeds: (pairs, projection_dim), unit length.
        image_embeds: (pairs, projection_dim), unit length. Row i belongs to row i of `text_embeds`.
        logit_scale: Scalar, natural logarithm of the factor that multiplies the cosines.
        logit_bias: Scalar, SigLIP's bias. Default: CLIP's loss.

    Returns:
        The loss in nats, a float32 scalar.

    Raises:
        ValueError: If the numbers of texts and images differ, or both are 0.
    """
    if len(text_embeds) != len(image_embeds):
        raise ValueError(f"The loss needs as many texts as images, got {len(text_embeds)} and {len(image_embeds)}.")
    if not len(text_embeds):
        raise ValueError("The loss needs at least 1 pair, got 0.")
    logits_per_text = similarity_logits(text_embeds, image_embeds, logit_scale, logit_bias)
    if logit_bias is not None:
        signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
        return -F.logsigmoid(signs * logits_per_text).sum() / len(logits_per_text)
    # The loss of a single pair is 0, because there is no wrong pair.
    targets = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """Average the token states (outputs of the last layer) of each text, without the states of padding tokens.

    Args:
        last_hidden_state: Token states, (texts, tokens, width).
        attention_mask: (texts, tokens), 1 for a token and 0 for padding.

    Returns:
        Mean token state of each text, (texts, width), float32. It is NaN if the mask of the text is all 0.
    """
    mask = attention_mask.unsqueeze(-1).float()  # (texts, tokens, 1)
    return (last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)


def _check_text_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        problem = "neither" if input_ids is None else "both"
        raise ValueError(f"Give either `input_ids` or `inputs_embeds`, got {problem}.")
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"`input_ids` must be (texts, tokens), got shape {tuple(input_ids.shape)}.")
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(f"`inputs_embeds` must be (texts, tokens, width), got shape {tuple(inputs_embeds.shape)}.")


def _check_attention_mask(attention_mask: Tensor, tokens: Tensor) -> None:
    if attention_mask.shape != tokens.shape:
        rule = f"`attention_mask` must have the shape of the tokens, {tuple(tokens.shape)}"
        hint = "Pass both as the processor returns them"
        raise ValueError(f"{rule}, got {tuple(attention_mask.shape)}. {hint}.")
    # Reading values from a GPU would force a synchronization, so the values are checked on the CPU only. On a GPU, the
    # embedding of a text that consists only of padding is NaN.
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if empty := (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist():
        rows = f"rows {empty[:10]} of {len(tokens)} are all padding"
        raise ValueError(f"Every text needs at least one token that the attention mask keeps; {rows}.")


def _with_pooler_output(outputs: ModelOutput, pooled: Tensor) -> BaseModelOutputWithPooling:
    """Return the output of a tower with another `pooler_output`.

    Args:
        outputs: Output of the image tower or the text tower.
        pooled: The new `pooler_output`, (images or texts, width).
    """
    fields = {name: getattr(outputs, name, None) for name in ("last_hidden_state", "hidden_states", "attentions")}
    return BaseModelOutputWithPooling(pooler_output=pooled, **fields)


def _build_tower(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights, and check that it takes pixels (image tower) or token ids (text tower).

    Args:
        name: Field of `CapivaraConfig` that describes the tower: "vision_config" or "text_config".
        config: Configuration of the tower.

    Returns:
        The tower in the default dtype.

    Raises:
        ValueError: If the main input of the tower is not `pixel_values` or `input_ids`, respectively.
    """
    # A text tower is built without its own pooling layer, because mean pooling does not use it. For an unknown type, no
    # option is set. AutoModel then raises a clear error.
    model_class = MODEL_MAPPING.get(type(config), object)
    has_pooler = name == "text_config" and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    # The dtype in `config` is ignored, so that all parts of the model have the same dtype.
    tower = AutoModel.from_config(config, dtype=torch.get_default_dtype(), **options)
    expected, example = TOWER_INPUTS[name]
    if tower.main_input_name != expected:
        problem = f"{config.model_type!r}, which takes `{tower.main_input_name}`. Use a model type such as {example!r}"
        raise ValueError(f"{name} must be of an encoder model that takes `{expected}`, got {problem}.")
    return tower


def _build_text_projection(config: CapivaraConfig) -> nn.Module:
    width = config.text_config.hidden_size
    if config.text_projection_type == "linear":
        return nn.Linear(width, config.projection_dim, bias=False)
    # The width of the hidden layer is the mean of both widths, as in open_clip: 640 for a projection from 768 to 512.
    hidden = (width + config.projection_dim) // 2
    first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, config.projection_dim, bias=False)
    return nn.Sequential(first, nn.GELU(), last)


def _embed_classes(model: PreTrainedModel, processor: ProcessorMixin, prompts: list[list[str]]) -> Tensor:
    """Compute the embedding of each class: the normalized mean of the embeddings of its prompts.

    Args:
        model: A `CapivaraModel`.
        processor: The model's processor.
        prompts: Prompts of each class.

    Returns:
        (classes, projection_dim), unit length, float32.
    """
    texts, was_training = [text for class_prompts in prompts for text in class_prompts], model.training
    model.eval()  # dropout would add noise to the class embeddings
    try:
        batches = [texts[start : start + TEXT_BATCH_SIZE] for start in range(0, len(texts), TEXT_BATCH_SIZE)]
        inputs = (processor(text=batch, return_tensors="pt").to(model.device) for batch in batches)
        embeds = torch.cat([model(**batch).text_embeds for batch in inputs])
    finally:
        model.train(was_training)
    embeds_by_class = embeds.split([len(class_prompts) for class_prompts in prompts])
    return l2_normalize(torch.stack([class_embeds.mean(dim=0) for class_embeds in embeds_by_class]))


def _fill_templates(
    labels: Sequence[str] | Mapping[str, str | Sequence[str]], templates: Sequence[str]
) -> dict[str, list[str]]:
    """Return the prompts of each class: every template, filled with the class name or with the texts of the class.

    Args:
        labels: Class names, or a dictionary from each class name to the text or texts that replace it in the templates.
        templates: Texts in which `{}` is replaced.

    Returns:
        A dictionary {class name: list of prompts}, in the order of `labels`.

    Raises:
        ValueError: If there are fewer than two labels, a label is blank or repeated, there is no template, or a
            template has no `{}`.
    """
    if isinstance(labels, str) or len(labels) < 2:
        raise ValueError(f"`labels` must be a list of at least 2 names, got {labels!r}.")
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise ValueError(f"`templates` must be a list of texts with {{}} in place of the label, got {templates!r}.")
    prompts = {}
    for name in labels:
        texts = labels[name] if isinstance(labels, Mapping) else name
        texts = list(texts) if isinstance(texts, list | tuple) else [texts]
        if name in prompts:
            raise ValueError(f"`labels` must be unique, got {name!r} more than once.")
        if not texts or not all(isinstance(text, str) and text.strip() for text in [name, *texts]):
            rule = "Each of `labels` needs at least one text, and none may be blank"
            raise ValueError(f"{rule}; got {texts} for {name!r}.")
        prompts[name] = [template.replace("{}", text) for text in texts for template in templates]
    return prompts


def l2_normalize(features: Tensor) -> Tensor:
    """Scale each row of a matrix to Euclidean length 1.

    Args:
        features: (rows, width), in any floating-point type.

    Returns:
        (rows, width). The result is float64 if `features` are float64, otherwise float32.
    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_truncate_dim(dim: int | None, width: int, name: str = "truncate_dim") -> None:
    """Check that embeddings can be truncated to their first `dim` dimensions.

    Args:
        dim: Number of leading dimensions to keep. None keeps all.
        width: Number of dimensions of a full embedding.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `dim` is not from 1 to `width`.
    """
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"{name} must be from 1 to the embedding's width, {width}, got {dim}.")


@torch.no_grad()
def _infer_vision_width(config: PreTrainedConfig) -> int:
    """Return the width of the image tower's `pooler_output`.

    The width is `hidden_size` if the configuration has this field. Configurations of convolutional towers do not have
    it. For such a tower, a model on the device "meta", which allocates no memory, is run to get the output's shape.

    Args:
        config: Configuration of the image tower.

    Raises:
        ValueError: If the tower returns no `pooler_output`.
    """
    if getattr(config, "hidden_size", None):
        return config.hidden_size
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        tower = AutoModel.from_config(config).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", None) or 3, height, width)
        return _get_pooler_output(tower(pixel_values=pixels, return_dict=True), config).shape[1]


def _get_pooler_output(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    """Return the image tower's pooled output as (images, width).

    Args:
        outputs: Output of the image tower.
        config: Configuration of the image tower, for the error message.

    Raises:
        ValueError: If the tower returns no `pooler_output`.
    """
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        hint = "Use a tower that does, such as 'clip_vision_model', 'vit' or 'timm_wrapper'"
        raise ValueError(f"The image tower {config.model_type!r} returns no `pooler_output` to project. {hint}.")
    # Some convolutional towers return the shape (images, width, 1, 1).
    return pooled.flatten(1)
