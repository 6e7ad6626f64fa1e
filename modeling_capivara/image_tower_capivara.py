"""The image side of CAPIVARA, which the embedding model and the image classifier share."""

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_capivara import CapivaraConfig


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
        """Image tower and projection.

        Args:
            pixel_values: (images, 3, height, width), as `CapivaraImageProcessor` makes them.
            truncate_dim: keep the first so many numbers of each embedding; all where None. See `matryoshka_dims` of
                the configuration.

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
            raise ValueError(
                f"`pixel_values` must be (images, 3, height, width), got shape {tuple(pixel_values.shape)}; "
                "`CapivaraImageProcessor` makes them so."
            )
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=_pooler_output(outputs, self.config.vision_config),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )


def unit_length(features: Tensor) -> Tensor:
    """`features` (rows, width) scaled to Euclidean length 1 a row, in float32."""
    return nn.functional.normalize(features.float(), dim=-1)


def check_truncate_dim(dim: int | None, width: int, name: str = "truncate_dim") -> None:
    """Raise ValueError, about the argument `name`, unless embeddings of `width` numbers have a first `dim` of them.

    None stands for all.
    """
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"{name} must be from 1 to the embedding's width, {width}, got {dim}.")


def check_main_input(name: str, tower: PreTrainedModel, wanted: str, example: str) -> None:
    """Raise ValueError where the configuration `name` is of a tower that does not take `wanted`."""
    if tower.main_input_name != wanted:
        raise ValueError(
            f"{name} must be a tower that takes `{wanted}`, got {tower.config.model_type!r}, which takes "
            f"`{tower.main_input_name}`; use a model type such as {example!r}."
        )


@torch.no_grad()
def vision_width(config: PreTrainedConfig) -> int:
    """Width of the image tower's `pooler_output`: as the configuration states, else tried on a tower without weights.

    Convolutional towers state it under many names or not at all.
    """
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
        raise ValueError(
            f"The image tower {config.model_type!r} gives no `pooler_output`, which is what gets projected; "
            "use one that does, such as 'clip_vision_model', 'vit' or 'timm_wrapper'."
        )
    return pooled.flatten(1)  # some convolutional towers keep (images, width, 1, 1)
