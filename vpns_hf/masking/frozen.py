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


def check_masks(masks: Mapping[str, Tensor], slots: Mapping[str, PrunableWeight]) -> None:
    """Refuse masks that do not belong to these weights.

    Raises:
        ValueError: names or shapes differ.
    """
    if unknown := sorted(set(masks) ^ set(slots)):
        raise ValueError(
            f"Masks must name exactly the {len(slots)} prunable weights of this model; {len(unknown)} names differ, "
            f"such as {unknown[0]}."
        )
    for name, slot in slots.items():
        if masks[name].shape != (shape := stored_weight(slot).shape):
            raise ValueError(
                f"The mask of {name} has shape {tuple(masks[name].shape)}; the weight has {tuple(shape)}."
            )


def freeze(slots: Mapping[str, PrunableWeight], masks: Mapping[str, Tensor]) -> None:
    """Dense to frozen: write the zeros into the weights and keep each mask as buffer `<name>_mask`."""
    for name, slot in slots.items():
        weight = stored_weight(slot)
        slot.module.register_buffer(slot.tensor_name + MASK_SUFFIX, masks[name].to(weight.device))
    zero_masked_weights(slots)


def change_frozen_masks(slots: Mapping[str, PrunableWeight], masks: Mapping[str, Tensor]) -> int:
    """Replace frozen masks in place, write the zeros, and return how many entries changed.

    A weight that comes back starts at zero, unless its zero was not written yet.
    """
    flips = overwrite(frozen_masks(slots), masks)
    zero_masked_weights(slots)
    return flips


def unfreeze(slots: Mapping[str, PrunableWeight]) -> None:
    """Frozen to dense: drop the masks, of gradients as well; the zeros stay in the weights."""
    for slot in slots.values():
        delattr(slot.module, slot.tensor_name + MASK_SUFFIX)
        stored_weight(slot)._backward_hooks = None


def frozen_masks(slots: Mapping[str, PrunableWeight]) -> dict[str, Tensor]:
    """The mask buffers by weight name; frozen state only."""
    return {name: slot.module.get_buffer(slot.tensor_name + MASK_SUFFIX) for name, slot in slots.items()}


@torch.no_grad()
def zero_masked_weights(slots: Mapping[str, PrunableWeight]) -> None:
    """Write exact zeros wherever a frozen mask is False."""
    for name, mask in frozen_masks(slots).items():
        write_zeros(sharding.local(stored_weight(slots[name])), sharding.local(mask))


def mask_gradients(slots: Mapping[str, PrunableWeight]) -> None:
    """Hook the weights so that pruned entries get no gradient.

    An optimizer made afterwards then holds no momentum or second moment for them and weight decay keeps 0 at 0, so
    they stay exactly zero in any training loop.
    """
    for slot in slots.values():
        weight, mask = stored_weight(slot), _GradientMask(slot)
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
    def __init__(self, slot: PrunableWeight):
        self.slot = slot

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient with zeros where the mask is False."""
        return masked(grad, self._mask)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Write the zeros into the gradient of a sharded weight."""
        if weight.grad is not None:
            write_zeros(sharding.local(weight.grad), sharding.local(self._mask))

    @property
    def _mask(self) -> Tensor:
        return self.slot.module.get_buffer(self.slot.tensor_name + MASK_SUFFIX)
