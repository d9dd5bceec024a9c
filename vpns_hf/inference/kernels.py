"""Table of kernels that can replace a dense layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .csr import CsrConv2d, CsrLinear
from .layers import SparseConv2d, SparseLinear

DENSE = "dense"

KERNELS: dict[str, tuple[type[SparseLinear], type[SparseConv2d]]] = {
    "csr": (CsrLinear, CsrConv2d),
}
"""Linear and convolution layer of each kernel; `fits(layer)` says whether one can stand in for a dense layer."""


def checked_kernels(names: Sequence[str] | None) -> tuple[str, ...]:
    """Check the names of the kernels to choose from; None: all of them.

    Raises:
        ValueError: there is no such kernel.
    """
    if unknown := sorted(set(names or ()) - set(KERNELS)):
        raise ValueError(f"`kernels` names {unknown[0]!r}; expected some of {', '.join(map(repr, KERNELS))}.")
    return tuple(KERNELS) if names is None else tuple(names)


def replacements(layer: nn.Linear | nn.Conv2d, kernels: Sequence[str]) -> dict[str, nn.Module]:
    """Build the sparse layers that can replace a layer, by the name of their kernel; empty where there is none."""
    found: dict[str, nn.Module] = {}
    for name in kernels:
        linear, convolution = KERNELS[name]
        if isinstance(layer, nn.Linear) and linear.fits(layer):
            found[name] = linear(layer)
        elif isinstance(layer, nn.Conv2d) and convolution.fits(layer):
            found[name] = convolution(layer)
    return found
