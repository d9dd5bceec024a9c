"""Cut pruned channels out of a model, whose configuration then builds the smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .. import masking
from ..masking.channels import ChannelGroup, Channels, as_rows, take_kept
from ..masking.prunable import MASK_SUFFIX
from .backbones import position_kwargs
from .checks import evaluating, image_channels
from .tensor_shapes import build_backbone, resize

if TYPE_CHECKING:
    from .sparse_model import SparseModel

# Largest difference of logits, as a share of the largest, between a masked model and one with the channels cut out.
_TOLERANCE = 1e-4


def prove_removal(backbone: PreTrainedModel, pattern: Channels, image_size: Iterable[int] | None) -> None:
    """Check on a random image that masking half of the channels of each group equals cutting them out.

    Args:
        backbone: dense backbone; not modified.
        pattern: its groups of channels.
        image_size: (height, width) of the image; None: 224 pixels each.

    Raises:
        ValueError: the logits differ, or the cut model fails.
    """
    generator = torch.Generator().manual_seed(0)
    kept = {
        group.name: torch.rand(group.size, generator=generator).argsort() < (group.size + 1) // 2
        for group in pattern.groups
    }
    masked, cut = copy.deepcopy(backbone).float(), copy.deepcopy(backbone).float()
    weights = {name: masked.get_parameter(name) for group in pattern.groups for name in _weight_names(group)}
    with torch.no_grad():
        for name, mask in pattern.expanded(kept, weights).items():
            weights[name].mul_(mask)
    state = take_kept(pattern.groups, kept, cut.state_dict())
    resize(cut, {name: list(state[name].shape) for name in _changed(cut.state_dict(), state)})
    cut.load_state_dict(state)
    _require_equal(masked, cut, image_size)


def _weight_names(group: ChannelGroup) -> list[str]:
    return [part.tensor for part in group.weights]


def remove_channels(model: SparseModel) -> None:
    """Cut the pruned channels out of a frozen model; see [`PromptedSparseModel.remove_channels`].

    Raises:
        ValueError: the pattern is not `"channels"`, a layer keeps no channel, a pruned weight is not zero, or the cut
            model gives other logits.
    """
    pattern = model.pattern
    if not isinstance(pattern, Channels):
        raise ValueError(
            f"Only whole channels can be removed, and this model has the pattern {pattern.name!r}; build it with "
            "`from_backbone(..., pattern='channels')`."
        )
    model.gather_shards()
    masking.check_zeros(model.prunable_weights(), model.masks(), masking.ZEROS_LOST)
    kept = pattern.kept(model.masks())
    if empty := [name for name, channels in kept.items() if not channels.any()]:
        raise ValueError(f"No channel of {empty[0]} is kept, and a layer without channels cannot be built.")
    own = model.backbone_state()
    cut = take_kept(pattern.groups, kept, own)
    config = copy.deepcopy(model.config)
    changed = {name: list(cut[name].shape) for name in _changed(own, cut)}
    config.backbone_config = _cut_config(config.backbone_config, changed, cut)
    config.channel_groups, config.sparsity = as_rows(pattern.cut(kept)), 0.0
    with torch.random.fork_rng(devices=[]):
        smaller = model.rebuilt(config)
    masks = {f"{name}{MASK_SUFFIX}": torch.ones_like(cut[name], dtype=torch.bool) for name in model.masks()}
    state = model.state_dict() | {f"backbone.{name}": tensor for name, tensor in (cut | masks).items()}
    smaller.load_state_dict({name: state[name] for name in smaller.state_dict()}, assign=True)
    _require_equal(model.backbone, smaller.backbone, model.config.image_size)
    model.replace_with(smaller)


def _changed(tensors: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.shape != cut[name].shape]


def _cut_config(
    config: PreTrainedConfig, changed: Mapping[str, list[int]], cut: Mapping[str, Tensor]
) -> PreTrainedConfig:
    """Return a configuration that builds the cut tensors, of the stock model where all of its MLPs have one width."""
    fields = config.to_dict()
    shapes = (fields.get("tensor_shapes") or {}) | dict(changed)
    rows, columns = next((shape for shape in shapes.values() if len(shape) == 2), (1, 1))
    ratio = rows / columns if isinstance(fields.get("mlp_ratio"), float) else rows // columns
    for name, value in {"intermediate_size": rows, "mlp_ratio": ratio}.items():
        if name in fields and value:
            stock = copy.deepcopy(config)
            stock.update({name: value, "tensor_shapes": None})
            with torch.device("meta"):
                built = build_backbone(stock).state_dict()
            if all(tensor.shape == cut[key].shape for key, tensor in built.items()):
                del stock.tensor_shapes
                return stock
    cut_config = copy.deepcopy(config)
    cut_config.update({"tensor_shapes": shapes})
    return cut_config


@torch.no_grad()
def _require_equal(masked: PreTrainedModel, cut: PreTrainedModel, image_size: Iterable[int] | None) -> None:
    """Refuse a cut model that gives other logits than the masked one for a random image."""
    size = list(image_size or (224, 224))
    kwargs = position_kwargs(masked, size)
    image = torch.randn(1, image_channels(masked), *size, generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (masked, cut):
        exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        try:
            with evaluating(exact):
                logits.append(exact(pixel_values=image.to(exact.device), **kwargs).logits)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _unproven(model, f"the smaller model fails: {' '.join(str(error).split())[:200]}") from error
    expected, found = logits
    difference = float((found - expected).abs().max())
    # Not `>`: NaN compares with nothing. Relative, because logits of untrained models are close to zero.
    if not difference <= _TOLERANCE * float(expected.abs().max()):
        raise _unproven(cut, f"logits differ by {difference:.2g}")


def _unproven(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"Channels of this {type(model).__name__} cannot be removed, because a model without them does not equal one "
        f"with their weights at zero ({reason}); leave the layers out with `ignore_modules`, such as ['attention'] "
        "for heads, or choose another pattern."
    )
