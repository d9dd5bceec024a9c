"""Run linear layers pruned to 2:4 on the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..model.modeling import PromptedSparseModel

PATTERN = "2:4"
_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16)
# torch's kernels compress weights of these multiples; other layers stay dense.
_ROWS, _COLUMNS = 32, 64


def semi_structured_layers(model: PromptedSparseModel) -> dict[str, nn.Linear]:
    """Return the linear layers of a model pruned to 2:4 whose weights torch's kernels can compress, by name.

    Convolutions, which torch has no such kernels for, layers inside `nn.MultiheadAttention`, and weights that are no
    multiple of 32 x 64 are left out.

    Raises:
        ValueError: masks are not frozen, or not in the pattern 2:4.
    """
    if model.config.state != "frozen" or model.config.pattern != PATTERN or not model.sparsity:
        raise ValueError(
            f"Sparse tensor cores compute with frozen masks of the pattern {PATTERN!r}, and this model is in the "
            f"{model.config.state!r} state with the pattern {model.config.pattern!r}; prune one that was built by "
            f"`from_backbone(..., pattern={PATTERN!r})`."
        )
    modules = ((name, prunable.module) for name, prunable in model.prunables().items())
    return {
        name.removesuffix(".weight"): module
        for name, module in modules
        # A subclass with a forward of its own may read the weight in another way.
        if type(module) is nn.Linear and _fits(module.weight.shape)
    }


def _fits(shape: torch.Size) -> bool:
    rows, columns = shape
    return rows % _ROWS == 0 and columns % _COLUMNS == 0


@torch.no_grad()
def to_semi_structured(model: PromptedSparseModel) -> PromptedSparseModel:
    """Copy a model pruned to 2:4, with the weights of its linear layers as `torch.sparse.to_sparse_semi_structured`.

    The copy takes 9/16 of the memory for these weights and computes the same logits up to rounding. Do not expect
    twice the speed: published factors of whole vision transformers are about 1.1, because attention, norms and small
    batches do not gain; measure it with the batch that you serve. It can neither be trained nor saved: keep the model
    that it was made of.

    Args:
        model: frozen model in float16 or bfloat16 on a GPU of compute capability 8.0 or newer.

    Returns:
        A model in the dense state, in evaluation mode.

    Raises:
        ValueError: masks, precision, device or layers do not fit.
    """
    layers = semi_structured_layers(model)
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < _CAPABILITY:
        raise ValueError(
            f"Sparse tensor cores are on NVIDIA GPUs of compute capability 8.0 or newer, and this model is on "
            f"{model.device}; move it there with `model.cuda()`, or use `model.for_inference` on a CPU."
        )
    if model.dtype not in _DTYPES:
        raise ValueError(
            f"Sparse tensor cores compute 2:4 in float16 or bfloat16, and this model is {model.dtype}; call "
            "`model.to(torch.bfloat16)` first."
        )
    if not layers:
        raise ValueError(
            f"No linear layer of this {type(model.backbone).__name__} has a weight of a multiple of {_ROWS} x "
            f"{_COLUMNS}, which torch's sparse kernels need."
        )
    converted = copy.deepcopy(model)
    converted.merge_and_unload()
    converted.config.state = "dense"
    for name in layers:
        layer = converted.backbone.get_submodule(name)
        sparse = torch.sparse.to_sparse_semi_structured(layer.get_parameter("weight").detach().contiguous())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return converted.requires_grad_(False).eval()
