"""Freeze masks: zeros in the weights, a bool buffer beside each, masked gradients (frozen state)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import sharding
from .patterns import Pattern
from .prunable import MASK_SUFFIX, PrunableWeight, stored_weight
from .topk import overwrite_masks
from .zeros import masked, write_zeros


def overwrite(masks: Mapping[str, Tensor], selected: Mapping[str, Tensor]) -> int:
    """Overwrite masks in place and return the number of entries that changed."""
    if not sharding.is_sharded(masks.values()):
        return overwrite_masks(masks, selected)
    flips = sharding.count_true(mask ^ selected[name] for name, mask in masks.items())
    for name, mask in masks.items():
        mask.copy_(selected[name])
    return flips


def check_masks(masks: Mapping[str, Tensor], prunables: Mapping[str, PrunableWeight]) -> None:
    """Refuse masks that do not belong to these weights.

    Raises:
        ValueError: names or shapes differ, or a mask is no bool tensor.
    """
    if unknown := sorted(set(masks) ^ set(prunables)):
        raise ValueError(
            f"Masks must name exactly the {len(prunables)} prunable weights of this model; {len(unknown)} names "
            f"differ, such as {unknown[0]}."
        )
    for name, prunable in prunables.items():
        if masks[name].dtype != torch.bool:
            raise ValueError(
                f"The mask of {name} is of type {masks[name].dtype}; convert it to bool, True where a weight is kept."
            )
        if masks[name].shape != (shape := stored_weight(prunable).shape):
            raise ValueError(
                f"The mask of {name} has shape {tuple(masks[name].shape)}; the weight has {tuple(shape)}."
            )


def check_pattern(masks: Mapping[str, Tensor], pattern: Pattern, remedy: str) -> None:
    """Refuse masks that do not have the pattern; all processes call this together.

    Args:
        masks: bool tensors by weight name.
        pattern: pattern that they should have.
        remedy: advice that ends the message.

    Raises:
        ValueError: names the first of them.
    """
    for name, mask in masks.items():
        if not mask.is_meta and not pattern.follows(sharding.whole(mask)):
            raise ValueError(f"The mask of {name} does not have the pattern {pattern.name!r}; {remedy}.")


def freeze(prunables: Mapping[str, PrunableWeight], masks: Mapping[str, Tensor]) -> None:
    """Write the zeros into dense weights and register each mask as buffer `<name>_mask` (dense to frozen)."""
    for name, prunable in prunables.items():
        weight = stored_weight(prunable)
        prunable.module.register_buffer(prunable.tensor_name + MASK_SUFFIX, masks[name].to(weight.device))
    zero_masked_weights(prunables)


def change_frozen_masks(prunables: Mapping[str, PrunableWeight], masks: Mapping[str, Tensor]) -> int:
    """Replace frozen masks in place, write the zeros, and return how many entries changed.

    A weight that comes back starts at zero, unless its zero was not written yet.
    """
    flips = overwrite(frozen_masks(prunables), masks)
    zero_masked_weights(prunables)
    return flips


def unfreeze(prunables: Mapping[str, PrunableWeight]) -> None:
    """Remove the masks and the gradient hooks (frozen to dense); the zeros stay in the weights."""
    for prunable in prunables.values():
        delattr(prunable.module, prunable.tensor_name + MASK_SUFFIX)
        stored_weight(prunable)._backward_hooks = None


def frozen_masks(prunables: Mapping[str, PrunableWeight]) -> dict[str, Tensor]:
    """Return the mask buffers by weight name; frozen state only.

    Raises:
        ValueError: a prunable weight has no mask, because its layer was added after the masks were frozen.
    """
    for name, prunable in prunables.items():
        if prunable.tensor_name + MASK_SUFFIX not in prunable.module._buffers:
            raise ValueError(
                f"{name} has no mask, so its layer was added or replaced after the masks were frozen; merge or unload "
                "adapters first."
            )
    return {
        name: prunable.module.get_buffer(prunable.tensor_name + MASK_SUFFIX) for name, prunable in prunables.items()
    }


@torch.no_grad()
def nonzero_or_kept(prunables: Mapping[str, PrunableWeight]) -> dict[str, Tensor]:
    """Mark the weights that are kept or, against their frozen mask, not zero; equals the masks where zeros hold."""
    return {name: mask | (stored_weight(prunables[name]) != 0) for name, mask in frozen_masks(prunables).items()}


@torch.no_grad()
def check_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse weights that are not zero where a mask is False.

    Args:
        weights: weights by name; those on the meta device and those of another shape than their mask are left out.
        masks: bool tensors by the same names.
        remedy: advice that ends the message.

    Raises:
        ValueError: a pruned weight is not zero.
    """
    for name, mask in masks.items():
        weight, mask = sharding.local(weights[name]), sharding.local(mask).to(weights[name].device)
        if weight.is_meta or weight.shape != mask.shape:
            continue
        if wrong := int(((weight != 0) & ~mask).count_nonzero()):
            raise ValueError(f"{wrong} weights of {name} are not zero although the mask prunes them; {remedy}.")


@torch.no_grad()
def zero_masked_weights(prunables: Mapping[str, PrunableWeight]) -> None:
    """Write exact zeros wherever a frozen mask is False."""
    for name, mask in frozen_masks(prunables).items():
        write_zeros(sharding.local(stored_weight(prunables[name])), sharding.local(mask))


def mask_gradients(prunables: Mapping[str, PrunableWeight]) -> None:
    """Register gradient hooks on the weights, which zero the gradients of pruned entries.

    An optimizer that is created afterwards holds no momentum or second moment for them and weight decay keeps 0 at 0,
    so they stay exactly zero in any training loop.
    """
    for prunable in prunables.values():
        weight = stored_weight(prunable)
        if _is_hooked(weight):
            continue
        trainable = weight.requires_grad
        # torch only takes hooks on tensors that require a gradient; this one may be made trainable later.
        weight.requires_grad_(True)
        if sharding.is_sharded([weight]):
            # FSDP2 writes the gradient of a shard itself and then calls these hooks alone.
            weight.register_post_accumulate_grad_hook(_ShardGradientMask(prunable))
        else:
            weight.register_hook(_GradientMask(prunable))
        weight.requires_grad_(trainable)


def _is_hooked(weight: Tensor) -> bool:
    hooks = (*(weight._backward_hooks or {}).values(), *(weight._post_accumulate_grad_hooks or {}).values())
    return any(isinstance(hook, (_GradientMask, _ShardGradientMask)) for hook in hooks)


class _FrozenMask:
    """Return the mask buffer of a weight, as it is when a hook runs."""

    def __init__(self, prunable: PrunableWeight):
        self.prunable = prunable

    @property
    def mask(self) -> Tensor:
        return self.prunable.module.get_buffer(self.prunable.tensor_name + MASK_SUFFIX)


class _GradientMask(_FrozenMask):
    def __call__(self, grad: Tensor) -> Tensor:
        """Return the gradient with zeros where the mask is False."""
        return masked(grad, self.mask)


class _ShardGradientMask(_FrozenMask):
    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        """Write the zeros into the gradient of a sharded weight."""
        if weight.grad is not None:
            write_zeros(sharding.local(weight.grad), sharding.local(self.mask))
