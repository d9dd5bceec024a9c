"""Update masks while weights train, by the weights themselves: gradual pruning, AC/DC and RigL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking import sharding
from ..masking.selection import select_masks
from ..masking.topk import top_k_mask
from ..model.modeling import PromptedSparseModel
from ..scores.table import lamp_of
from .mask_schedules import GradualSparsity, MaskSchedule, StageProgress, keep_all

Ranking = Callable[[Tensor], Tensor]


def by_magnitude(weight: Tensor) -> Tensor:
    """Rank by `|weight|`."""
    return weight.abs()


def by_lamp(weight: Tensor) -> Tensor:
    """Rank by the LAMP score (arXiv 2010.07611), also where the weight is split over processes."""
    return sharding.split_like(lamp_of(sharding.whole(weight)), weight)


def select_weights(model: PromptedSparseModel, sparsity: float, ranking: Ranking = by_magnitude) -> dict[str, Tensor]:
    """Select the masks that keep the weights ranked highest in the model's scope."""
    ranks = {name: ranking(weight.detach()) for name, weight in model.prunable_weights().items()}
    return select_masks(ranks, sparsity, model.config.scope, model.pattern)


@dataclass(frozen=True)
class GradualMagnitude(MaskSchedule):
    """Gradual pruning (arXiv 1710.01878): the lowest-ranked weights go, more and more of them.

    Pruned weights are zero and get no gradient, so that they never come back.

    Args:
        gradual: how the sparsity rises.
        ranking: function of a weight tensor that returns what its entries are ranked by.
        scope: scope in which masks are selected; None: the model's.
    """

    gradual: GradualSparsity = GradualSparsity()  # noqa: RUF009  # it is frozen
    ranking: Ranking = by_magnitude
    scope: str | None = None

    moves = True
    changes_frozen_masks = True

    def begin(self, model: PromptedSparseModel, sparsity: float) -> None:
        """Keep every weight."""
        keep_all(model)

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the last update is done."""
        return self.gradual.is_final(progress)

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Prune where an update is due."""
        model.zero_masked_weights()
        if self.gradual.level(progress) == self.gradual.level(progress.before()):
            return 0
        return model.apply_masks(select_weights(model, self.gradual.sparsity(progress), self.ranking))


@dataclass(frozen=True)
class AlternatingCompression(MaskSchedule):
    """AC/DC (arXiv 2106.12379): dense and compressed phases in turn; compressing keeps the largest weights.

    Weights that were pruned start at zero in the next dense phase, and all weights without momentum. The authors' 100
    epochs have 10 of dense warm-up, phases of 5, and at the end 10 dense and 15 compressed ones, which are the
    defaults here as shares of the stage.

    Args:
        warm_up: share of the stage that is dense at the start.
        phase: share of every phase after it; compressed first.
        last_dense: share of the last dense phase.
        final: share of the last phase, which is compressed.
    """

    warm_up: float = 0.1
    phase: float = 0.05
    last_dense: float = 0.1
    final: float = 0.15

    revives_weights = True
    moves = True
    changes_frozen_masks = True

    def begin(self, model: PromptedSparseModel, sparsity: float) -> None:
        """Keep every weight."""
        keep_all(model)

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the last compressed phase has begun."""
        return progress.fraction >= 1 - self.final

    def kept_state(self, model: PromptedSparseModel) -> Mapping[str, Tensor]:
        """Keep nothing where a dense phase begins, and the state of kept weights where a compressed one does."""
        masks = model.masks()
        return {name: torch.zeros_like(mask) for name, mask in masks.items()} if model.sparsity == 0 else masks

    def compressed(self, progress: StageProgress) -> bool:
        """Return whether the next step is in a compressed phase."""
        if self.is_final(progress):
            return True
        if progress.fraction < self.warm_up or progress.fraction >= 1 - self.final - self.last_dense - 1e-9:
            return False
        return math.floor((progress.fraction - self.warm_up) / self.phase + 1e-9) % 2 == 0

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Compress or open the mask where a phase begins."""
        model.zero_masked_weights()
        was, is_now = self.compressed(progress.before()), self.compressed(progress)
        if was == is_now:
            return 0
        return model.apply_masks(select_weights(model, progress.sparsity)) if is_now else keep_all(model)


@dataclass(frozen=True)
class RigL(MaskSchedule):
    """RigL (arXiv 1911.11134): in every layer the smallest weights are dropped, those of the largest gradient grown.

    An update takes the place of an optimizer step. Grown weights start at zero; the number kept in each layer never
    changes.

    Args:
        fraction: of the kept weights that are dropped at the start; falls to zero along a cosine.
        end: share of the stage after which the mask stays.
        updates: how many times the mask changes.
    """

    fraction: float = 0.3
    end: float = 0.75
    updates: int = 15

    picks_single_weights = True
    uses_dense_gradients = True
    moves = True
    changes_frozen_masks = True

    def needs_dense_gradients(self, progress: StageProgress) -> bool:
        """Return whether an update is due."""
        return self._level(progress) != self._level(progress.before()) and self._level(progress) <= self.updates

    def _level(self, progress: StageProgress) -> int:
        return math.floor(progress.fraction / self.end * (self.updates + 1) + 1e-9)

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Drop and grow."""
        if gradients is None:
            return super().advance(model, progress)
        fraction = self.fraction / 2 * (1 + math.cos(math.pi * progress.fraction / self.end))
        weights, masks = model.prunable_weights(), model.masks()
        return model.apply_masks(
            {name: drop_and_grow(weights[name], mask, gradients[name], fraction) for name, mask in masks.items()}
        )


@torch.no_grad()
def drop_and_grow(weight: Tensor, mask: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """Drop and grow the weights of one mask (RigL).

    Args:
        weight, mask, gradient: of one shape; the gradient covers pruned weights.
        fraction: of the kept weights that are dropped, the smallest first, and grown elsewhere, the largest gradient
            first. A weight just dropped may be grown at once.

    Returns:
        A mask that keeps as many weights; ties go to the lower index.
    """
    kept = int(mask.sum())
    dropped = int(fraction * kept)
    (survivors,) = top_k_mask([weight.abs().masked_fill(~mask, -math.inf)], kept - dropped)
    (grown,) = top_k_mask([gradient.abs().masked_fill(survivors, -math.inf)], dropped)
    return survivors | grown
