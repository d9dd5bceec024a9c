"""Groups of removable channels of a model: found for a backbone, kept in its configuration, and checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import masking
from ..masking.channels import CHANNELS, ChannelGroup, Channels, ChannelSlices, TensorCost, as_rows
from ..masking.pattern import Pattern
from .backbones import position_kwargs
from .channel_removal import prove_removal
from .checks import image_channels
from .configuration import PromptedSparseConfig
from .sparsity import count_positions

_DEFAULT_SIZE = (224, 224)


def find_groups(
    backbone: PreTrainedModel,
    ignore_modules: Iterable[str],
    head: Collection[str],
    new_head: bool,
    geometry: Mapping[str, Any],
) -> dict[str, Any]:
    """Find the groups of channels of a dense backbone.

    Args:
        backbone: image classifier; not modified.
        ignore_modules: modules that are never pruned.
        head: parameters of the head.
        new_head: whether it is new, so that it is never pruned.
        geometry: `image_size`, (height, width) of the images in pixels; None: 224 each.

    Returns:
        The fields of the configuration that hold them.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: no channels can be removed, or removing them is not proven to equal masking them.
    """
    from ..masking.channel_graph import find_channel_groups

    size, kwargs = geometry["image_size"] or _DEFAULT_SIZE, position_kwargs(backbone, geometry["image_size"])
    groups = find_channel_groups(
        backbone,
        torch.zeros(1, image_channels(backbone), *size, device=backbone.device, dtype=backbone.dtype),
        lambda model, images: model(pixel_values=images, **kwargs).logits,
        masking.find_prunable_weights(backbone, ignore_modules, head if new_head else ()),
        {name.rpartition(".")[0] for name in head},
    )
    if not groups:
        raise ValueError(
            f"No channels of this {type(backbone).__name__} can be removed: none outside `ignore_modules` and a new "
            "head are free of norms over channels; choose another pattern."
        )
    prove_removal(backbone, Channels(groups), size)
    positions = count_positions(backbone, masking.find_prunable_weights(backbone), size, kwargs)
    return {"channel_groups": as_rows(groups), "weight_positions": positions}


def build_pattern(config: PromptedSparseConfig, backbone: nn.Module) -> Pattern:
    """Build the pattern of the masks of a dense backbone.

    Raises:
        ValueError: the groups of channels in the configuration do not fit the backbone.
    """
    if config.pattern != CHANNELS or config.channel_groups is None:
        return masking.get_pattern(config.pattern)
    groups = tuple(
        ChannelGroup(size, *(tuple(ChannelSlices(*row) for row in rows) for rows in parts))
        for size, *parts in config.channel_groups
    )
    parameters = {name: tuple(tensor.shape) for name, tensor in backbone.named_parameters()}
    _check_groups(groups, parameters | {name: tuple(tensor.shape) for name, tensor in backbone.named_buffers()})
    positions = config.weight_positions or {}
    costs = {name: TensorCost(shape, positions.get(name, 0)) for name, shape in parameters.items()}
    return Channels(groups, config.channel_budget, config.channel_multiple, costs)


def _check_groups(groups: tuple[ChannelGroup, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse groups that name other tensors or indices than there are, or one twice."""
    taken: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for group in groups:
        for part in group.members:
            shape, end = shapes.get(part.tensor, ()), part.offset + group.size * part.width
            if part.dim >= len(shape) or end > shape[part.dim]:
                raise _damaged(part.tensor)
            taken[part.tensor, part.dim].append((part.offset, end))
        for part in group.weights:
            if part.dim == 1 and (part.offset or group.size * part.width != shapes[part.tensor][1]):
                raise _damaged(part.tensor)
        if not group.readers or group.weights[0].dim:
            raise _damaged(group.name)
    for (name, _), ranges in taken.items():
        ranges.sort()
        if any(first[1] > second[0] for first, second in pairwise(ranges)):
            raise _damaged(name)
    if len({group.name for group in groups}) != len(groups):
        raise _damaged(groups[0].name)


def _damaged(name: str) -> ValueError:
    return ValueError(
        f"`channel_groups` does not fit {name} of the backbone; the configuration is damaged, or belongs to another "
        "backbone."
    )
