"""Sparse layers on the kernels of stock torch: `W_csr @ columns`, in pieces that stay in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import SparseConv2d, SparseLayer, SparseLinear

# Measured: more columns at once take longer for each of them, fewer pay more for the call.
_PIECE = 256


def _multiply(layer: SparseLayer, columns: Tensor) -> Tensor:
    """Multiply the matrix by dense columns [in, positions] and add the bias: [out, positions]."""
    weight, bias = layer.weight, layer.bias
    pieces = columns.tensor_split(max(1, math.ceil(columns.shape[1] / _PIECE)), dim=1)
    if bias is None:
        return torch.cat([weight @ piece for piece in pieces], dim=1)
    return torch.cat([torch.addmm(bias[:, None].expand(-1, piece.shape[1]), weight, piece) for piece in pieces], dim=1)


class CsrLinear(SparseLinear):
    """A linear layer on torch's CSR product, which torch takes from MKL."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this is a plain linear layer with enough zeros, and torch was built with MKL."""
        return super().fits(layer) and torch.backends.mkl.is_available()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        product = _multiply(self, x.reshape(-1, self.in_features).t())
        return product.t().contiguous().view(*x.shape[:-1], self.out_features)


class CsrConv2d(SparseConv2d):
    """A convolution on torch's CSR product, of the unfolded input where the kernel is larger than one pixel."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this is a plain convolution with enough zeros, and torch was built with MKL."""
        return super().fits(layer) and torch.backends.mkl.is_available()

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, height, width] to [n, out, height, width]."""
        x = self.padded(x)
        height, width = self.output_size(x)
        if self.kernel_size == (1, 1):
            columns = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, stride=self.stride)
        product = _multiply(self, columns.transpose(0, 1).flatten(1))
        return product.view(self.out_channels, len(x), height, width).transpose(0, 1).contiguous()
