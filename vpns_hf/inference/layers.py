"""Sparse layers: a linear or convolution layer that stores the kept values of its weight and their indices."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# With half of the weights kept, indices take the memory that zeros took.
_LARGEST_DENSITY = 0.5


def density(weight: Tensor) -> float:
    """Fraction of the entries that are not zero."""
    return weight.count_nonzero().item() / max(1, weight.numel())


class SparseLayer(nn.Module):
    """Base of all sparse layers: a weight matrix [out, in] in compressed rows (CSR), with int32 indices.

    Args:
        weight: dense weight [out, in / groups, ...], float32.
        bias: [out], or None.
        groups: of output rows, each with inputs of its own: blocks on the diagonal of the matrix.

    Attributes:
        row_starts: [out + 1], where each row starts in `columns` and `values`.
        columns, values: input and value of each kept weight.
    """

    row_starts: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int = 1):
        super().__init__()
        with warnings.catch_warnings():
            # torch calls its CSR tensors a beta feature, once in a process.
            warnings.simplefilter("ignore", UserWarning)
            matrix = weight.detach().flatten(1).to_sparse_csr()
        rows, inputs = matrix.shape
        group_of_row = torch.arange(rows) // (rows // groups)
        first_input = inputs * group_of_row.repeat_interleave(matrix.crow_indices().diff())
        self.shape = (rows, inputs * groups)
        self.register_buffer("row_starts", matrix.crow_indices().int())
        self.register_buffer("columns", (matrix.col_indices() + first_input).int())
        # Models without any parameter have no dtype and device for transformers.
        self.values = nn.Parameter(matrix.values(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether the kernel can compute what this dense layer computes, and is worth measuring."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Return the matrix as a tensor of layout `torch.sparse_csr`; models read its dtype and device."""
        return torch.sparse_csr_tensor(self.row_starts, self.columns, self.values, self.shape, check_invariants=False)

    def extra_repr(self) -> str:
        """Shape and number of kept weights."""
        return f"{' x '.join(map(str, self.shape))}, kept={self.values.numel()}"


class SparseLinear(SparseLayer):
    """Base of sparse linear layers.

    Args:
        layer: the dense layer, in float32.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.weight, layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this is a plain linear layer with enough zeros."""
        # A subclass with a forward of its own computes something else.
        return type(layer).forward is nn.Linear.forward and density(layer.get_parameter("weight")) <= _LARGEST_DENSITY


class SparseConv2d(SparseLayer):
    """Base of sparse convolution layers; the matrix has one column for each of [in channels, height, width].

    Args:
        layer: the dense layer, in float32.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.weight, layer.bias, layer.groups)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = _padding(layer), layer.padding_mode, layer.groups

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this is a plain convolution with enough zeros."""
        if not isinstance(layer, nn.Conv2d) or density(layer.weight) > _LARGEST_DENSITY:
            return False
        return type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward

    def padded(self, x: Tensor) -> Tensor:
        """Pad the input [n, channels, height, width].

        Raises:
            ValueError: the input has another number of dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"Expected images [n, channels, height, width], not an input of shape {tuple(x.shape)}.")
        if not any(self.padding):
            return x
        return F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output of an input [n, channels, height, width] that is padded."""
        height, width = (
            (side - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return height, width


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Left, right, top and bottom padding, as `F.pad` takes it."""
    sides: list[int] = []
    for dim in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if isinstance(layer.padding, str) else [int(layer.padding[dim])] * 2
    return tuple(sides)
