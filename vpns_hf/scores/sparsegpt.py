"""Prune in one shot and correct the kept weights so that the output of every layer stays close (SparseGPT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import masking
from ..masking.topk import top_k_mask
from ..model.modeling import PromptedSparseModel
from .layer_inputs import input_columns, observe_inputs
from .table import Batches, dense_copy

# Unfolded inputs of a convolution are several times as large as its inputs.
_IMAGES_AT_ONCE = 16


@torch.no_grad()
def sparsegpt(
    model: PromptedSparseModel,
    batches: Sequence[Mapping[str, Tensor]],
    sparsity: float,
    *,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prune every layer in order of execution and correct its kept weights (SparseGPT, arXiv 2301.00774).

    The inputs of each layer are the outputs of the layers before it after pruning. Masks are selected in blocks of
    columns, jointly over all rows, and errors are propagated to later columns. Convolutions are unfolded, with one
    Hessian for each group. A copy of the model with dense weights and without prompt is pruned; forward passes run in
    float32, the rest in float64.

    Args:
        model: model in any state; not modified. Its masks are ignored, but a frozen model keeps the zeros that they
            wrote.
        batches: dictionaries of `pixel_values` [n, channels, height, width], normalised; other keys are ignored.
        sparsity: fraction of the weights of each layer to remove, in [0, 1]; `round((1 - sparsity) * n)` are kept.
        block_size: number of columns whose mask is selected at once.
        damping: fraction of the mean of the Hessian's diagonal that is added to it.

    Returns:
        The bool masks and the corrected weights, zero where the mask is False and in the model's dtype; both keyed and
        ordered as `model.masks()`, on the model's device.

    Raises:
        ValueError: sparsity outside [0, 1], no batches, a layer whose inputs cannot be observed or whose Hessian
            cannot be inverted.
    """
    masking.kept_count(0, sparsity)
    dense = dense_copy(model)
    inputs, prunables, masks = Batches("sparsegpt", dense, batches), dense.prunables(), dict[str, Tensor]()
    weights = dense.prunable_weights()
    with torch.autocast(model.device.type, enabled=False):
        for name in _execution_order(dense, inputs, prunables):
            hessian = _hessian(dense, inputs, name, prunables[name])
            groups, columns = hessian.shape[:2]
            matrix = weights[name].double().reshape(groups, -1, columns)
            try:
                mask, pruned = prune_matrix(matrix, hessian, sparsity, block_size, damping)
            except torch.linalg.LinAlgError as error:
                raise ValueError(
                    f"The Hessian of the inputs of {name} cannot be inverted; give more images or raise `damping`."
                ) from error
            masks[name] = mask.view(weights[name].shape)
            weights[name].copy_(pruned.view(weights[name].shape))
    own = model.prunable_weights()
    return {name: masks[name] for name in own}, {name: weights[name].detach().to(own[name].dtype) for name in own}


def _execution_order(
    model: PromptedSparseModel,
    batches: Sequence[Mapping[str, Tensor]],
    prunables: Mapping[str, masking.PrunableWeight],
) -> list[str]:
    order = dict[str, None]()
    with observe_inputs(prunables, lambda name, inputs, outputs: order.setdefault(name)):
        model(batches[0]["pixel_values"], use_prompt=False)
    return list(order)


def _hessian(
    model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]], name: str, prunable: masking.PrunableWeight
) -> Tensor:
    """Compute `2 / n * sum(x x^T)` over the n inputs x of a layer, [groups, columns, columns]."""
    sums, counts = list[Tensor](), list[int]()

    def add(name: str, inputs: Tensor, outputs: Tensor) -> None:
        for part in inputs.split(_IMAGES_AT_ONCE):
            columns = input_columns(name, prunable.module, part, outputs).double()
            counts.append(columns.shape[1])
            sums[:] = [sum(sums, columns.mT @ columns)]

    with observe_inputs({name: prunable}, add):
        for batch in batches:
            model(batch["pixel_values"], use_prompt=False)
    return sums[0].mul_(2 / sum(counts))


def prune_matrix(
    weight: Tensor, hessian: Tensor, sparsity: float, block_size: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Prune one weight column by column, and compensate each error in the following columns.

    Args:
        weight: [groups, rows, columns], float64.
        hessian: Hessian of the inputs of each group, [groups, columns, columns], float64.
        sparsity: fraction to remove; the number kept is exact, and spread evenly over the blocks.
        block_size: number of columns whose mask is selected at once.
        damping: fraction of the mean of the diagonal that is added to it.

    Returns:
        The bool mask and the corrected weight.

    Raises:
        torch.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    weight = weight.masked_fill(dead.unsqueeze(1), 0)
    factor = _inverse_factor(hessian, dead, damping)
    scale = factor.diagonal(dim1=1, dim2=2)
    mask = torch.empty_like(weight, dtype=torch.bool)
    columns, kept = weight.shape[2], masking.kept_count(weight.numel(), sparsity)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        saliency = (weight[:, :, start:end] / scale[:, None, start:end]).square()
        mask[:, :, start:end] = top_k_mask([saliency], kept * end // columns - kept * start // columns)[0]
        errors = torch.empty_like(saliency)
        for column in range(start, end):
            removed = weight[:, :, column].masked_fill(mask[:, :, column], 0)
            errors[:, :, column - start] = error = removed / scale[:, column, None]
            weight[:, :, column:end] -= error[:, :, None] * factor[:, None, column, column:end]
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return mask, weight.masked_fill_(~mask, 0)


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Factorise the inverse of the damped Hessian (upper Cholesky), with ones for inputs that are always zero."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal.masked_fill_(dead, 1)
    diagonal += damping * diagonal.mean(1, keepdim=True)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
