"""Patterns: the entries of a mask that are ranked together, and kept or pruned together.

The rest of the library knows a pattern only by the methods of [`Pattern`]. The score of a group is the sum of its
weights' scores: to first order, removing a group costs what removing its weights costs, and every group takes one
entry of the budget, whatever its size.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .channels import CHANNELS, Channels
from .pattern import Pattern

_LARGEST_GROUP, _LARGEST_SIDE = 64, 1024


@dataclass(frozen=True)
class KeptOfEvery(Pattern):
    """n:m, such as `"2:4"`: exactly `kept` of every `group` neighbours along the input dimension.

    The weights of a convolution, [out, in, height, width], are read input channel fastest, [out, height, width, in],
    as sparse tensor cores read them, so that a group is `group` input channels at one position of the kernel. Weights
    whose input dimension is no multiple of `group` stay dense (the first convolution of an RGB image, depthwise
    convolutions), as in NVIDIA's ASP.

    Weights are ranked one by one: the `kept` largest of every group stay in any case, and of the others the lowest go
    first, at a rising sparsity in the model's scope. At the final sparsity, `1 - kept / group`, all of them are gone.

    Args:
        kept: n, at least 1.
        group: m, more than n.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group <= _LARGEST_GROUP:
            raise ValueError(
                f"`pattern` is {self.name!r}; expected n:m with n from 1 to m - 1 and m up to {_LARGEST_GROUP}, such "
                "as '2:4'."
            )

    @property
    def name(self) -> str:
        """Return `"n:m"`."""
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        """Return the sparsity of a mask in which every group keeps exactly n."""
        return 1 - self.kept / self.group

    def fits(self, weight: str, shape: torch.Size) -> bool:
        """Return whether the input dimension is a multiple of m."""
        return shape[1] % self.group == 0

    def _groups(self, tensor: Tensor) -> Tensor:
        """Arrange a tensor as [m, groups]."""
        return tensor.movedim(1, -1).reshape(-1, self.group).t()

    def ranked(self, scores: Tensor) -> Tensor:
        """Return the scores with infinity for the n largest of every group; ties go to the lower input."""
        groups = self._groups(scores).contiguous()
        beaten = torch.zeros_like(groups, dtype=torch.uint8)
        # Comparing pairs takes a third of the time of sorting groups of four.
        for first in range(self.group):
            for second in range(first + 1, self.group):
                wins = groups[first] >= groups[second]
                beaten[second] += wins
                beaten[first] += ~wins
        # NaN stays, so that it is refused. Not in place: the groups may share the memory of the scores.
        groups = groups.masked_fill((beaten < self.kept) & ~groups.isnan(), math.inf)
        rows, columns, *kernel = scores.shape
        return groups.t().reshape(rows, *kernel, columns).movedim(-1, 1).contiguous()

    def follows(self, mask: Tensor) -> bool:
        """Return whether every group keeps n or more."""
        return bool((self._groups(mask).sum(0) >= self.kept).all())


@dataclass(frozen=True)
class Blocks(Pattern):
    """`"block:32"`: squares of the weight as a matrix [out, in x height x width], all but its rows flattened.

    Sparsity counts blocks. Where a dimension of the matrix is no multiple of `side`, the last blocks are smaller. They
    sum fewer scores, so they tend to go first, and the share of pruned weights may differ from that of pruned blocks.

    Args:
        side: side of a square, at least 2.
    """

    side: int

    spans_rows = True
    frees_rows = False

    def __post_init__(self) -> None:
        if not 2 <= self.side <= _LARGEST_SIDE:
            raise ValueError(
                f"`pattern` is {self.name!r}; expected a side from 2 to {_LARGEST_SIDE}, such as 'block:32'."
            )

    @property
    def name(self) -> str:
        """Return `"block:side"`."""
        return f"block:{self.side}"

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over each block: [rows of blocks, columns of blocks], float32 or wider."""
        matrix = values.flatten(1)
        rows, columns = matrix.shape
        padded = F.pad(matrix, (0, -columns % self.side, 0, -rows % self.side))
        blocks = padded.view(padded.shape[0] // self.side, self.side, padded.shape[1] // self.side, self.side)
        return blocks.sum((1, 3), dtype=torch.promote_types(values.dtype, torch.float32))

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Repeat the value of each block over its weights."""
        rows, columns = shape[0], math.prod(shape[1:])
        tall = groups.repeat_interleave(self.side, 0)[:rows]
        return tall.repeat_interleave(self.side, 1)[:, :columns].contiguous().view(shape)

    def initial(self, scores: Tensor) -> Tensor:
        """Sum absolute values over each block, and divide by the number of weights of a whole one."""
        return self.sum(scores.abs()) / self.side**2

    def take_rows(self, scores: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
        """Share the score of each block out over its weights, and sum over the new blocks."""
        sizes = self.sum(torch.ones(shape, device=scores.device))
        return self.sum(self.expand(scores / sizes, shape)[rows])

    def follows(self, mask: Tensor) -> bool:
        """Return whether every block is kept whole or pruned whole."""
        return torch.equal(self.expand(self.sum(mask) > 0, mask.shape), mask)


_PATTERNS: dict[str, Callable[..., Pattern]] = {
    "unstructured": Pattern,
    r"(\d{1,4}):(\d{1,4})": KeptOfEvery,
    r"block:(\d{1,5})": Blocks,
    CHANNELS: Channels,
}


@functools.cache
def get_pattern(name: str) -> Pattern:
    """Look up a pattern by its name: `"unstructured"`, `"n:m"` such as `"2:4"`, `"block:side"`, or `"channels"`.

    Raises:
        ValueError: there is none of that name, or its numbers are out of range.
    """
    for expression, pattern in _PATTERNS.items():
        if match := re.fullmatch(expression, name, flags=re.ASCII):
            return pattern(*map(int, match.groups()))
    raise ValueError(
        f"`pattern` is {name[:40]!r}; expected 'unstructured', n:m such as '2:4', 'block:32', or 'channels'."
    )


UNSTRUCTURED = get_pattern("unstructured")
