"""Keep parameters in their own precision when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FixedPrecision(nn.Module):
    """Base of modules whose own floating-point tensors keep their dtype when the model is cast.

    Scores and prompts learn by small updates, which vanish in half precision: next to 1, bfloat16 has no value closer
    than 0.004.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype == tensor.dtype or not tensor.is_floating_point():
                return applied
            return tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)
