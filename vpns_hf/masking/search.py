"""Parametrize weights by learnable scores and the masks selected from them (search state).

The only module that knows `torch.nn.utils.parametrize`, apart from reading the stored weight in `prunable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import sharding
from .frozen import mask_gradients, overwrite
from .pattern import Pattern
from .patterns import UNSTRUCTURED
from .precision import FixedPrecision
from .prunable import MASK_SUFFIX, PrunableWeight, parametrizations, stored_weight
from .recomputation import can_recompute
from .selection import select, split_like
from .zeros import masked


class _StraightThroughMask(torch.autograd.Function):
    """Compute `weight * mask`, and pass the gradient straight through to the scores (|scores| unless signed).

    So dL/dscores = weight * dL/dmasked * sign(scores), for kept and pruned weights alike (HYDRA, arXiv 2002.10509),
    less the implicit gradient of BiP (arXiv 2210.04092), `implicit * mask * dL/dmasked`, from the weight. The score of
    a group gets the sum over its weights.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, signed: bool, implicit: float, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        ctx.signed, ctx.implicit, ctx.pattern = signed, implicit, pattern
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        weight, scores, mask = ctx.saved_tensors
        kept_grad = masked(grad, mask) if ctx.needs_input_grad[0] or ctx.implicit else None
        score_grad = None
        if ctx.needs_input_grad[1]:
            response = weight if kept_grad is None or not ctx.implicit else weight - ctx.implicit * kept_grad
            if ctx.pattern.spans_rows:
                score_grad = ctx.pattern.sum(grad.to(scores.dtype) * response)
                score_grad = score_grad if ctx.signed else score_grad.mul_(scores.sign())
            else:
                # In place, because fresh memory costs more than the products.
                score_grad = grad.to(scores.dtype, copy=True) if ctx.signed else scores.sign().mul_(grad)
                score_grad.mul_(response)
        return kept_grad if ctx.needs_input_grad[0] else None, score_grad, None, None, None, None


class MaskedWeight(FixedPrecision):
    """Parametrization of one weight by a mask and the scores from which the mask is selected.

    Args:
        scores: float32 tensor, one score for each group of the pattern, so of the weight's shape where every weight is
            a group; becomes a parameter and stays float32 when the model is cast.
        mask: bool tensor of the weight's shape.
        signed: rank the scores themselves, not their absolute values.
        pattern: pattern of the mask.

    Attributes:
        implicit_gradient: BiP's 1 / gamma, the weight of the implicit gradient in the gradient of the scores.
    """

    def __init__(self, scores: Tensor, mask: Tensor, signed: bool, pattern: Pattern):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.mask: Tensor
        self.register_buffer("mask", mask)
        self.signed, self.pattern = signed, pattern
        self.implicit_gradient = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        # FSDP2 gathers parameters for the forward of their block, but no buffers.
        mask = sharding.arranged_like(self.mask, weight)
        result = _StraightThroughMask.apply(
            weight, self.scores, mask, self.signed, self.implicit_gradient, self.pattern
        )
        can_recompute(result, masked, weight, mask)
        return result


def initial_scores(weight: Tensor) -> Tensor:
    """Compute initial scores, `sqrt(6 / fan_in) * weight / max|weight|` in float32 (HYDRA, arXiv 2002.10509).

    Args:
        weight: [out, in, ...]; fan_in is the product of all but the first dimension.
    """
    weight = weight.detach().float()
    fan_in = math.prod(weight.shape[1:])
    return math.sqrt(6 / fan_in) * weight / weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


def attach_scores(
    prunables: Mapping[str, PrunableWeight], signed: bool = False, pattern: Pattern = UNSTRUCTURED
) -> None:
    """Parametrize dense weights with [`MaskedWeight`], all kept until a mask is selected (dense to search).

    Scores start at [`initial_scores`], see [`Pattern.start`]; signed ones at zero (movement pruning, arXiv
    2005.07683). Weights that hold no scores of the pattern stay plain.
    """
    weights = {name: stored_weight(prunable) for name, prunable in prunables.items()}
    for name, prunable in scored(prunables, pattern).items():
        scores = pattern.start(name, lambda other: initial_scores(weights[other]))
        mask = torch.ones_like(weights[name], dtype=torch.bool)
        masked = MaskedWeight(torch.zeros_like(scores) if signed else scores, mask, signed, pattern.of(name))
        parametrize.register_parametrization(prunable.module, prunable.tensor_name, masked, unsafe=True)


def scored(prunables: Mapping[str, PrunableWeight], pattern: Pattern) -> dict[str, PrunableWeight]:
    """Return the prunable weights that hold learned scores in the search state."""
    return {name: prunable for name, prunable in prunables.items() if pattern.learns(name)}


def detach_scores(prunables: Mapping[str, PrunableWeight]) -> None:
    """Remove scores and masks and restore the stored weights (search to dense); of weights that hold scores."""
    # Backwards, so that several weights of one module end in their own order.
    for prunable in reversed(list(prunables.values())):
        _unshare_class(prunable.module)
        parametrize.remove_parametrizations(prunable.module, prunable.tensor_name, leave_parametrized=False)
        _move_to_front(prunable.module._parameters, prunable.tensor_name)


def _unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch defines the weight as a property of a class that it creates for the module. Copies of the module share that
    class, so removing the property from a copy would remove it from the original, too.
    """
    shared = type(module)
    members = {name: member for name, member in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _move_to_front(parameters: dict[str, Any], name: str) -> None:
    """Move a parameter to the front, because torch re-registers it last and optimizers rely on the order."""
    for other in [other for other in parameters if other != name]:
        parameters[other] = parameters.pop(other)


def masked_weights(prunables: Mapping[str, PrunableWeight]) -> dict[str, MaskedWeight]:
    """Return the parametrization of each weight that holds scores by weight name; search state only."""
    return {name: cast(MaskedWeight, parametrizations(prunable)[0]) for name, prunable in prunables.items()}


@torch.no_grad()
def update_masks(
    prunables: Mapping[str, PrunableWeight], sparsity: float, scope: str, pattern: Pattern = UNSTRUCTURED
) -> int:
    """Select new masks of weights that hold scores from these, and return the number of entries that changed."""
    parts = masked_weights(prunables)
    scores = {name: part.scores for name, part in parts.items()}
    masks = {name: part.mask for name, part in parts.items()}
    signed = any(part.signed for part in parts.values())
    kept = select(pattern.merged(scores, magnitude=not signed), sparsity, scope, pattern, magnitude=not signed)
    return overwrite(masks, split_like(pattern.applied(kept, masks), masks))


def shard_masks(prunables: Mapping[str, PrunableWeight], state: str) -> None:
    """Shard masks like their weights; in the frozen state, register gradient hooks on the shards.

    Args:
        prunables: sharded weights that have a mask, by name.
        state: state of the model, `"search"` or `"frozen"`.
    """
    for prunable in prunables.values():
        weight = stored_weight(prunable)
        if state == "search":
            masked_weight = cast(MaskedWeight, parametrizations(prunable)[0])
            masked_weight.mask = sharding.split_like(masked_weight.mask, weight)
        else:
            name = prunable.tensor_name + MASK_SUFFIX
            setattr(prunable.module, name, sharding.split_like(prunable.module.get_buffer(name), weight))
    if state == "frozen":
        mask_gradients(prunables)
