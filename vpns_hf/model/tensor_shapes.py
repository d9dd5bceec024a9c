"""Give a backbone layers of other sizes than its configuration builds, as structured pruning leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..masking.channel_graph import is_timm_attention
from .loading import count_entries, counting_later


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an image classifier with newly initialised weights from its configuration.

    Args:
        config: configuration; its field `tensor_shapes`, if any, holds the shapes of the parameters and buffers
            by name that differ from those that the class builds.

    Raises:
        ValueError: `tensor_shapes` names a tensor that the backbone does not have.
    """
    shapes = config.to_dict().get("tensor_shapes")
    with counting_later() if shapes else nullcontext():
        backbone = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        if shapes:
            resize(backbone, shapes)
    if shapes:
        count_entries(backbone)
    return backbone


def resize(backbone: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace parameters and buffers by zeros of other shapes, and set the sizes that their layers state.

    Args:
        backbone: image classifier.
        shapes: shapes by name.

    Raises:
        ValueError: the backbone has no tensor of that name.
    """
    own = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    if unknown := sorted(set(shapes) - set(own)):
        raise ValueError(
            f"`tensor_shapes` of the backbone names {unknown[0]!r}, which {type(backbone).__name__} does not have; "
            "the configuration is damaged."
        )
    for name, shape in shapes.items():
        owner, _, tensor_name = name.rpartition(".")
        module, tensor = backbone.get_submodule(owner), own[name]
        resized = torch.zeros(tuple(shape), dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            setattr(module, tensor_name, nn.Parameter(resized, tensor.requires_grad))
        else:
            setattr(module, tensor_name, resized)
        _set_sizes(module)
    for module in backbone.modules():
        if is_timm_attention(module):
            # transformers reads the number of heads from the shapes of tensors.
            module.attn_dim = module.qkv.out_features // 3
            module.num_heads = module.attn_dim // module.head_dim


def _set_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer states to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.out_channels:
            module.groups = module.weight.shape[0]
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(module.weight)
