"""`PromptedSparseConfig`: everything needed to rebuild a `PromptedSparseModel`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ..masking.channels import CHANNELS
from .backbone_config import check_backbone, rebuild_config
from .configuration_checks import FIELDS, check_fields, check_labels, check_together, shortened


class ImageGeometry(NamedTuple):
    """Geometry of a model's images: (height, width) in pixels, and mean and std of each channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PromptedSparseConfig(PreTrainedConfig):
    """Configuration of a [`PromptedSparseModel`], with the backbone's own configuration nested in it.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Configuration of the image classifier that is pruned.
        state (`str`, defaults to `"dense"`):
            `"dense"`: plain weights. `"search"`: every prunable weight carries learnable scores and a mask.
            `"frozen"`: the masks are fixed and the zeros are written into the weights.
        sparsity (`float`, defaults to `0.9`):
            Fraction of the prunable weights that are zero, in [0, 1).
        scope (`str`, defaults to `"global"`):
            What is ranked together: `"global"`, `"layer"` or `"erk"` (see [`masking.select_masks`]).
        pattern (`str`, defaults to `"unstructured"`):
            What is kept or pruned together (see [`masking.patterns`]): `"unstructured"`, `"n:m"` such as `"2:4"`, or
            `"block:side"` such as `"block:32"`, or `"channels"`.
        channel_groups (`list`, *optional*):
            With `"channels"`, the groups of channels: for each their number, and rows [tensor, dimension, first index,
            indices a channel] of weights and of other tensors (see [`masking.channels.ChannelSlices`]).
        weight_positions (`dict[str, int]`, *optional*):
            With `"channels"`, how often one image is multiplied by each weight of a linear or convolution layer.
        channel_budget (`str`, defaults to `"channels"`):
            Unit of the sparsity of `"channels"`: `"channels"`, `"parameters"` or `"macs"`.
        channel_multiple (`int`, defaults to `1`):
            Number that widths are multiples of where channels are pruned.
        signed_scores (`bool`, defaults to `False`):
            In the search state: whether masks rank the scores themselves instead of their absolute values.
        ignore_modules (`list[str]`):
            Names of backbone modules that are never pruned.
        head_parameters (`list[str]`):
            Names of the backbone parameters whose shape follows the number of labels.
        new_head (`bool`, defaults to `False`):
            Whether the head was created for this task. A new head is never pruned.
        prompt (`str`, *optional*):
            Name of the visual prompt, a key of [`prompts.PROMPTS`], or None.
        prompt_size (`int`, defaults to `16`):
            Size of the prompt in pixels of the model's input: the width of `"pad"` and `"expand"`, the side of
            `"fixed"` and `"random"`, the width of the frame that `"stripe"` has the area of; for `"lowrank"` the rank.
        prompt_inner_size (`list[int]`, *optional*):
            (height, width) to which a prompted image is shrunk and centred on black before the prompt is added.
            None: the prompt overlays the full-size image, as in the released code at its default size; `"expand"`
            then shrinks the image by `prompt_size` on each side.
        image_size (`list[int]`, *optional*): (height, width) of the model's input, in pixels.
        image_mean, image_std (`list[float]`, *optional*): normalisation of the model's input, one value a channel.
        use_prompt (`bool`, defaults to `False`): whether `forward` adds the prompt when the call does not say.
        label_mapping (`str`, *optional*): how source classes were mapped to target classes, or None.
        label_mapping_state (`str`, defaults to `"unset"`):
            `"unset"`: the head's own logits come out. `"open"`: they are mapped, and the mapping may still be
            replaced. `"final"`: they are mapped, and a one-to-one mapping has cut the head down to the mapped classes
            unless `keep_source_head`.
        mapped_labels (`list[int]`, *optional*): source class of each target class, once a one-to-one mapping is set.
        keep_source_head (`bool`, defaults to `False`):
            Keep all source classes in the head and read the mapped ones. A `"bayesian"` mapping always keeps them.
        kwargs: fields of `PreTrainedConfig` (`id2label`, `num_labels`, ...).

    Raises:
        ValueError: a field has a value of the wrong kind, or fields contradict each other; one sentence for the first.
    """

    model_type = "prompted_sparse"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    backbone_config: Any = None
    state: str = "dense"
    sparsity: float = 0.9
    scope: str = "global"
    pattern: str = "unstructured"
    channel_groups: list[Any] | None = None
    weight_positions: dict[str, int] | None = None
    channel_budget: str = CHANNELS
    channel_multiple: int = 1
    signed_scores: bool = False
    ignore_modules: list[str] | tuple[str, ...] = ()
    head_parameters: list[str] | tuple[str, ...] = ()
    new_head: bool = False
    prompt: str | None = None
    prompt_size: int = 16
    prompt_inner_size: list[int] | tuple[int, ...] | None = None
    image_size: list[int] | tuple[int, ...] | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    use_prompt: bool = False
    label_mapping: str | None = None
    label_mapping_state: str = "unset"
    mapped_labels: list[int] | None = None
    keep_source_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        check_labels(self.id2label, kwargs.get("num_labels"))
        if not isinstance(self.dtype or torch.float32, torch.dtype) and not isinstance(
            getattr(torch, str(self.dtype), None), torch.dtype
        ):
            raise ValueError(f"`dtype` is {shortened(self.dtype)}; expected the name of a torch dtype.")
        backbone = self.backbone_config
        nested = isinstance(backbone, dict) and backbone.get("model_type") == self.model_type
        if nested or isinstance(backbone, PromptedSparseConfig):
            raise ValueError(f"`backbone_config` is of model type {self.model_type!r} again; a backbone is plain.")
        if isinstance(backbone, dict):
            self.backbone_config = rebuild_config(backbone)
        if self.backbone_config is not None:
            check_backbone(self.backbone_config)
        super().__post_init__(**kwargs)
        check_together(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the values in a file; arguments as for any configuration of transformers.

        Raises:
            ValueError: a value is of the wrong kind; one sentence for the first.
        """
        # transformers sets these once the configuration is built, where nothing would check them.
        own = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        try:
            return super().from_dict(config_dict | own, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError) as error:
            raise ValueError(f"No configuration can have these values: {' '.join(str(error).split())}") from error

    @property
    def geometry(self) -> ImageGeometry:
        """Size and normalisation of the model's input.

        Raises:
            ValueError: they are not known.
        """
        for name, value in (("size", self.image_size), ("mean", self.image_mean), ("std", self.image_std)):
            if value is None:
                raise ValueError(
                    f"The image {name} is needed, but neither the image processor nor the backbone's configuration "
                    f"gives it; pass `image_{name}=...` or `image_processor=...`."
                )
        height, width = self.image_size or ()
        return ImageGeometry((height, width), tuple(self.image_mean or ()), tuple(self.image_std or ()))
