"""Freeze masks: zeros in the weights, a bool buffer beside each, masked gradients (frozen state)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import sharding
from .pattern import Pattern
from .prunable import MASK_SUFFIX, PrunableWeight, stored_weight
from .topk import overwrite_masks
from .zeros import masked, write_zeros

ZEROS_LOST = "call `zero_masked_weights()` to write the zeros, which changes the logits"
"""Advice where weights of a model itself are not zero."""
_DENSE_STATE = "multiply the weights of the state by the masks, or load it into a model in the dense state"


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
    if not isinstance(masks, Mapping):
        raise ValueError(f"The masks are a {type(masks).__name__}; expected a dictionary of tensors by weight name.")
    if unknown := sorted(set(masks) ^ set(prunables)):
        raise ValueError(
            f"Masks must name exactly the {len(prunables)} prunable weights of this model; {len(unknown)} names "
            f"differ, such as {unknown[0]}."
        )
    for name, prunable in prunables.items():
        if not isinstance(masks[name], Tensor):
            raise ValueError(f"The mask of {name} is a {type(masks[name]).__name__}; expected a tensor of bool.")
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
    if any(mask.is_meta for mask in masks.values()):
        return
    if (name := pattern.broken({name: sharding.whole(mask) for name, mask in masks.items()})) is not None:
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
        weight, mask = sharding.local(weights[name]), sharding.local(mask)
        if weight.is_meta or mask.is_meta or weight.shape != mask.shape:
            continue
        if wrong := int(((weight != 0) & ~mask.to(weight.device)).count_nonzero()):
            raise ValueError(f"{wrong} weights of {name} are not zero although the mask prunes them; {remedy}.")


def check_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a state dictionary that brings other values than zero into pruned weights.

    Args:
        module: module that the state is loaded into; its own frozen masks count where the state has none.
        state: tensors by their names in the module.

    Raises:
        ValueError: a weight of the state is not zero where its mask is False.
    """
    weights, masks = {}, {}
    for path, part in module.named_modules():
        for name, mask in _own_masks(part).items():
            key = f"{path}.{name}" if path else name
            weights[key] = state.get(key, part._parameters[name])
            masks[key] = state.get(key + MASK_SUFFIX, mask)
    check_zeros(weights, masks, _DENSE_STATE)


def guard_states(module: nn.Module) -> None:
    """Refuse dense weights also where they are loaded into a part of a model, and mask its gradients afterwards.

    Args:
        module: backbone in any state; its parts are guarded while they hold frozen masks.
    """
    for part in module.modules():
        part.register_load_state_dict_pre_hook(_check_loaded)
        part.register_load_state_dict_post_hook(_mask_loaded)


def _check_loaded(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    # With a prefix, the module that the state was handed to has checked all of it.
    if not prefix:
        check_state(module, state)


def _mask_loaded(module: nn.Module, _: Any) -> None:
    # `assign=True` replaces the parameters, and their hooks with them.
    mask_gradients({name: PrunableWeight(module, name) for name in _own_masks(module)})


def _own_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen masks of the parameters of a module itself, by the name of the parameter."""
    buffers = {name.removesuffix(MASK_SUFFIX): mask for name, mask in module._buffers.items() if mask is not None}
    return {name: mask for name, mask in buffers.items() if module._parameters.get(name) is not None}


@torch.no_grad()
def zero_masked_weights(prunables: Mapping[str, PrunableWeight]) -> None:
    """Write exact zeros wherever a frozen mask is False."""
    for name, mask in frozen_masks(prunables).items():
        write_zeros(sharding.local(stored_weight(prunables[name])), sharding.local(mask))


def mask_gradients(prunables: Mapping[str, PrunableWeight]) -> None:
    """Register gradient hooks on the weights, which zero the gradients of pruned entries.

    An optimizer that is created afterwards holds no momentum or second moment for them and weight decay keeps 0 at 0.
    Where an optimizer moves them all the same, as Muon does, the zeros are written again after its step. So they stay
    exactly zero in any training loop that calls `backward` or steps a `torch.optim.Optimizer`.
    """
    _watch_optimizers()
    for prunable in prunables.values():
        weight = stored_weight(prunable)
        if _hook(weight) is not None:
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


def _hook(weight: Tensor) -> _FrozenMask | None:
    """Return the hook of [`mask_gradients`] on a weight; None without one."""
    hooks = (*(weight._backward_hooks or {}).values(), *(weight._post_accumulate_grad_hooks or {}).values())
    return next((hook for hook in hooks if isinstance(hook, _FrozenMask)), None)


@cache
def _watch_optimizers() -> None:
    """Register [`_zero_after_step`], once a process."""
    register_optimizer_step_post_hook(_zero_after_step)


@torch.no_grad()
def _zero_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Write the zeros into the weights that an optimizer has stepped."""
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        if (hook := _hook(weight)) is not None:
            write_zeros(sharding.local(weight), sharding.local(hook.mask))


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
