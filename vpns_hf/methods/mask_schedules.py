"""Update masks while a stage trains: fixed, selected from learned scores, or on a schedule.

Schedules are pure functions of the optimizer step, so that resuming needs no state of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking.prunable import all_kept
from ..masking.selection import select_masks
from ..masking.topk import top_k_mask
from ..model.modeling import PromptedSparseModel


@dataclass(frozen=True)
class StageProgress:
    """Progress of a stage.

    Args:
        step: optimizer steps done, the present one included.
        total: optimizer steps of the stage.
        sparsity: sparsity at the end of the stage.
    """

    step: int
    total: int
    sparsity: float

    @property
    def fraction(self) -> float:
        """Return the share of the stage that is done, in [0, 1]."""
        return self.step / self.total

    def before(self) -> StageProgress:
        """Return the progress one step earlier."""
        return StageProgress(self.step - 1, self.total, self.sparsity)


class MaskSchedule:
    """Base: the mask is frozen when the stage begins and stays as it is."""

    # State of the model during the stage: "dense", "search" or "frozen".
    state = "frozen"
    # Scope in which masks are selected; None: the model's.
    scope: str | None = None
    # Whether the mask changes during the stage.
    moves = False
    # Whether the mask changes by gradients of pruned weights.
    uses_dense_gradients = False
    # Whether the mask changes while weights train, so that optimizer state must be dropped with it.
    changes_frozen_masks = False
    # Whether the gradient of the scores has a term that is quadratic in the loss (BiP).
    has_implicit_gradient = False

    def begin(self, model: PromptedSparseModel, sparsity: float) -> None:
        """Bring the model into the state of the stage, with the mask that the stage starts with.

        Args:
            model: an unpruned model, or for the frozen state also a pruned one.
            sparsity: sparsity at the end of the stage.
        """
        if model.config.state == "search":
            model.freeze_masks()
        elif model.config.state == "dense":
            keep_all(model)

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the final sparsity is reached, so that a model may be chosen as the best."""
        return True

    def kept_state(self, model: PromptedSparseModel) -> Mapping[str, Tensor]:
        """Return masks of the optimizer state that is kept after the mask has changed, True = kept."""
        return model.masks()

    def needs_dense_gradients(self, progress: StageProgress) -> bool:
        """Return whether this step changes the mask by gradients of pruned weights instead of training."""
        return False

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Change the mask after an optimizer step and return how many entries changed.

        Args:
            gradients: gradients of the prunable weights, pruned ones included, where `needs_dense_gradients`.
        """
        if model.config.state == "frozen":
            model.zero_masked_weights()
        return 0


@dataclass(frozen=True)
class GradualSparsity:
    """Sparsity that rises from 0 along a cubic curve (Zhu and Gupta, arXiv 1710.01878).

    Args:
        start, end: shares of the stage between which it rises.
        updates: number of equal steps in time.
    """

    start: float = 0.0
    end: float = 0.75
    updates: int = 30

    def level(self, progress: StageProgress) -> int:
        """Return the number of updates that are due."""
        share = (progress.fraction - self.start) / (self.end - self.start)
        # A step that lies on the border of an update must not miss it by a rounding error.
        return math.floor(min(max(share, 0.0), 1.0) * self.updates + 1e-9)

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the last update is done."""
        return self.level(progress) == self.updates

    def sparsity(self, progress: StageProgress) -> float:
        """Return the sparsity after this step."""
        return cubic_sparsity(self.level(progress) / self.updates, 0.0, progress.sparsity)


class Unmasked(MaskSchedule):
    """All weights are kept and nothing is masked (dense state)."""

    state = "dense"

    def begin(self, model: PromptedSparseModel, sparsity: float) -> None:
        """Drop scores and masks."""
        if model.config.state == "search":
            model.detach_scores()


@dataclass(frozen=True)
class ScoredMasks(MaskSchedule):
    """Keep the largest scores, selected once when the stage begins (search state).

    Args:
        scope: scope in which masks are selected; None: the model's.
        signed: rank the scores themselves and start them at zero, instead of their absolute values.
        implicit_gradient: BiP's 1 / gamma, see [`PromptedSparseModel.set_implicit_gradient`].
    """

    scope: str | None = None
    signed: bool = False
    implicit_gradient: float = 0.0

    state = "search"

    @property
    def has_implicit_gradient(self) -> bool:  # type: ignore[override]
        """Whether the gradient of the scores has BiP's implicit term."""
        return self.implicit_gradient != 0

    def begin(self, model: PromptedSparseModel, sparsity: float) -> None:
        """Attach scores and select the first mask."""
        if model.config.state == "search" and model.config.signed_scores != self.signed:
            model.detach_scores()
        if model.config.state == "dense":
            model.attach_scores(signed=self.signed)
        model.set_implicit_gradient(self.implicit_gradient)
        model.set_sparsity(self.first_sparsity(sparsity))

    def first_sparsity(self, sparsity: float) -> float:
        """Return the sparsity that the stage starts with, for the one that it ends with."""
        return sparsity


@dataclass(frozen=True)
class LearnedMasks(ScoredMasks):
    """Keep the largest scores, selected again after every optimizer step (search state).

    Args:
        gradual: rise of the sparsity (movement pruning); None: the final sparsity from the start.
    """

    gradual: GradualSparsity | None = None

    moves = True

    def first_sparsity(self, sparsity: float) -> float:
        """Return 0 where the sparsity rises."""
        return sparsity if self.gradual is None else 0.0

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the sparsity has stopped rising."""
        return self.gradual is None or self.gradual.is_final(progress)

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Select the mask from the scores."""
        if self.gradual is not None:
            model.config.sparsity = self.gradual.sparsity(progress)
        return model.update_masks()


@dataclass(frozen=True)
class GradualMagnitude(MaskSchedule):
    """Gradual magnitude pruning (arXiv 1710.01878): the smallest weights go, more and more of them.

    Pruned weights are zero and get no gradient, so that they never come back.

    Args:
        gradual: how the sparsity rises.
    """

    gradual: GradualSparsity = GradualSparsity()

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
        return model.apply_masks(largest_weights(model, self.gradual.sparsity(progress)))


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
        return model.apply_masks(largest_weights(model, progress.sparsity)) if is_now else keep_all(model)


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


def keep_all(model: PromptedSparseModel) -> int:
    """Freeze the model with nothing pruned, and return the number of changed mask entries."""
    return model.apply_masks(all_kept(model.prunables()))


def largest_weights(model: PromptedSparseModel, sparsity: float) -> dict[str, Tensor]:
    """Select the masks that keep the largest |weights| in the model's scope."""
    magnitudes = {name: weight.detach().abs() for name, weight in model.prunable_weights().items()}
    return select_masks(magnitudes, sparsity, model.config.scope)


def cubic_sparsity(progress: float, initial: float, final: float) -> float:
    """Compute the sparsity after a share of gradual pruning (arXiv 1710.01878).

    `final + (initial - final) * (1 - progress) ** 3`.

    Args:
        progress: in [0, 1].
    """
    return final + (initial - final) * (1 - progress) ** 3
