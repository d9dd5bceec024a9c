"""Write zeros into tensors where a mask is False."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sharding

# On a CPU the bits of a number are multiplied by those of its mask, which is 0 or 1: `torch.where` and `masked_fill_`
# give the same but are not vectorized and take several times as long.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor with zeros where the mask of its shape is False, also in place of infinities and NaN."""
    if not _has_plain_bits(tensor) or sharding.is_sharded([mask]):
        return torch.where(mask, tensor, 0)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    return torch.empty_like(bits).copy_(mask.view(torch.uint8)).mul_(bits).view(tensor.dtype)


def _has_plain_bits(tensor: Tensor) -> bool:
    """Return whether the tensor is on a CPU and no tracer or autograd records operations on it."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # Second derivatives need a gradient, which integers do not have.
        and not (tensor.requires_grad and torch.is_grad_enabled())
        # Tensors of vmap, which vectorized Jacobians use, have no storage.
        and torch._C._has_storage(tensor)
    )


def write_zeros(tensor: Tensor, mask: Tensor) -> None:
    """Write zeros into a tensor where the bool tensor of its shape is False."""
    if tensor.device.type != "cpu":
        tensor.masked_fill_(~mask, 0)
    else:
        tensor.view(_INTEGERS[tensor.element_size()]).mul_(mask.view(torch.uint8))
