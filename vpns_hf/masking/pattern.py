"""The base of all patterns, and all that selection, learned scores, schedules, methods and storage know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Sparsities that people write with three digits, such as 0.667 for 1:3, are taken for the exact one.
_ROUNDING = 1e-3


class Pattern:
    """Base of all patterns: every weight is a group of its own, `"unstructured"`."""

    # The sparsity that the pattern fixes, which is also the largest; None: any.
    sparsity: float | None = None
    # Whether a group spans several rows (entries of the first dimension), so that rows cannot be split over processes.
    spans_rows = False
    # Whether masks keep the pattern where rows are dropped or reordered.
    frees_rows = True

    @property
    def name(self) -> str:
        """Return the name that [`get_pattern`] reads."""
        return "unstructured"

    def fits(self, weight: str, shape: torch.Size) -> bool:
        """Return whether a weight of this name and shape can be pruned in the pattern; others stay dense."""
        return True

    def sum(self, values: Tensor) -> Tensor:
        """Sum values of the shape of a weight over each group: the shape of its scores, which follows from that."""
        return values

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Give every weight of a tensor of this shape the value of its group; contiguous where it is no input."""
        return groups

    def initial(self, scores: Tensor) -> Tensor:
        """Return the start of learned scores from initial scores of the shape of a weight.

        That of a group is the sum of absolute values over the size of a whole group, so that scores and their learning
        rates have the size of those of single weights.
        """
        return scores

    def take_rows(self, scores: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
        """Return the learned scores of some rows of a weight of this shape, in their new order.

        A group of rows from several groups gets from each the share that those rows have of it.
        """
        return scores[rows]

    def ranked(self, scores: Tensor) -> Tensor:
        """Return the scores of groups as they are ranked: infinite where the pattern keeps them in any case."""
        return scores

    def follows(self, mask: Tensor) -> bool:
        """Return whether a mask of the shape of a weight has the pattern, or has not reached it yet."""
        return True

    # Of all weights together, by name; overridden where groups reach over several weights.

    def learns(self, weight: str) -> bool:
        """Return whether a prunable weight holds learned scores."""
        return True

    def of(self, weight: str) -> Pattern:
        """Return the pattern of the learned scores of one weight."""
        return self

    def start(self, weight: str, values: Callable[[str], Tensor]) -> Tensor:
        """Return the start of the learned scores of a weight, from a function that gives a value for every weight."""
        return self.initial(values(weight))

    def sums(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sum values of all weights over each group: tensors by the name of a weight or group of weights."""
        return {name: self.sum(value) for name, value in values.items()}

    def merged(self, scores: Mapping[str, Tensor], magnitude: bool) -> Mapping[str, Tensor]:
        """Return learned scores as [`Pattern.sums`] names them; with `magnitude`, absolute values will be ranked."""
        return scores

    def expanded(self, groups: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give every weight the values of its groups, for tensors of the shapes of the weights."""
        return {name: self.expand(groups[name], weight.shape) for name, weight in weights.items()}

    def applied(self, groups: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks that are applied to the weights with learned scores, while these are learned."""
        return self.expanded(groups, weights)

    def completed(self, applied: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks of all weights from those of [`Pattern.applied`]."""
        return dict(applied)

    def broken(self, masks: Mapping[str, Tensor]) -> str | None:
        """Return the first weight of a mask that lacks the pattern, if any."""
        return next((name for name, mask in masks.items() if not self.follows(mask)), None)

    def final_sparsity(self, sparsity: float | None) -> float:
        """Return the sparsity to prune to, 0.9 where neither the caller nor the pattern gives one.

        Raises:
            ValueError: the pattern fixes another one; 0 is always taken.
        """
        if self.sparsity is None or sparsity == 0:
            return 0.9 if sparsity is None else sparsity
        # NaN compares with nothing.
        if sparsity is not None and not abs(sparsity - self.sparsity) <= _ROUNDING:
            raise ValueError(
                f"`sparsity` is {sparsity}, but `pattern={self.name!r}` fixes it at {self.sparsity:.4g}; pass that "
                "or none, or choose another pattern."
            )
        return self.sparsity

    def check(self, sparsity: float, scope: str) -> None:
        """Refuse a sparsity or scope that masks of the pattern cannot have.

        Raises:
            ValueError: there is a largest sparsity, and this is larger; or scope `"erk"`, where every layer has the
                same sparsity.
        """
        if self.sparsity is None:
            return
        if sparsity > self.sparsity + 1e-12:
            raise ValueError(
                f"`sparsity` is {sparsity}, and `pattern={self.name!r}` removes at most {self.sparsity:.4g}; lower "
                "it, or choose another pattern."
            )
        if scope == "erk":
            raise ValueError(
                f"`scope='erk'` gives layers different sparsities, and `pattern={self.name!r}` gives all the same; "
                "use 'global'."
            )
