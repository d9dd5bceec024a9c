"""Freeze masks: zeros in the weights, a bool buffer beside each, masked gradients (frozen state)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import sharding
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
        ValueError: names or shapes differ.
    """
    if unknown := sorted(set(masks) ^ set(prunables)):
        raise ValueError(
            f"Masks must name exactly the {len(prunables)} prunable weights of this model; {len(unknown)} names "
            f"differ, such as {unknown[0]}."
        )
    for name, prunable in prunables.items():
        if masks[name].shape != (shape := stored_weight(prunable).shape):
            raise ValueError(
                f"The mask of {name} has shape {tuple(masks[name].shape)}; the weight has {tuple(shape)}."
            )


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
    """Return the mask buffers by weight name; frozen state only."""
    return {
        name: prunable.module.get_buffer(prunable.tensor_name + MASK_SUFFIX) for name, prunable in prunables.items()
    }


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
        weight, mask = stored_weight(prunable), _GradientMask(prunable)
        trainable = weight.requires_grad
        # torch only takes hooks on tensors that require a gradient; this one may be made trainable later.
        weight.requires_grad_(True)
        if sharding.is_sharded([weight]):
            # FSDP2 writes the gradient of a shard itself and then calls these hooks alone.
            weight.register_post_accumulate_grad_hook(mask.fill)
        else:
            weight.register_hook(mask)
        weight.requires_grad_(trainable)


class _GradientMask:
    def __init__(self, prunable: PrunableWeight):
        self.prunable = prunable

    def __call__(self, grad: Tensor) -> Tensor:
        """Return the gradient with zeros where the mask is False."""
        return masked(grad, self._mask)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Write the zeros into the gradient of a sharded weight."""
        if weight.grad is not None:
            write_zeros(sharding.local(weight.grad), sharding.local(self._mask))

    @property
    def _mask(self) -> Tensor:
        return self.prunable.module.get_buffer(self.prunable.tensor_name + MASK_SUFFIX)
