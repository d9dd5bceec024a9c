"""Update masks while a stage trains: fixed, or selected from learned scores.

Those that rank the weights themselves are in `magnitude_schedules`. Schedules are pure functions of the optimizer
step, so that resuming needs no state of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..masking.prunable import all_kept
from ..model.modeling import PromptedSparseModel
from ..scores.starts import ScoreSettings


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
    # Whether scores are ranked with their sign and start at zero.
    signed = False
    # Whether the mask changes during the stage.
    moves = False
    # Whether weights are chosen one by one, not in the groups of a pattern.
    picks_single_weights = False
    # Whether pruned weights start again at zero, which needs neighbours that are not.
    revives_weights = False
    # Whether the mask changes by gradients of pruned weights.
    uses_dense_gradients = False
    # Whether the mask changes while weights train, so that optimizer state must be dropped with it.
    changes_frozen_masks = False
    # How scores are learned, where they are; arguments of the run win.
    scores = ScoreSettings()
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

    def is_settled(self, progress: StageProgress) -> bool:
        """Return whether scores can no longer change the mask at this step and later ones."""
        return False

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
        scores: start and learning rate of the scores, unless arguments of the run say otherwise.
    """

    scope: str | None = None
    signed: bool = False
    implicit_gradient: float = 0.0
    scores: ScoreSettings = ScoreSettings()  # noqa: RUF009  # it is frozen

    state = "search"

    @property
    def has_implicit_gradient(self) -> bool:  # type: ignore[override]
        """Return whether the gradient of the scores has BiP's implicit term."""
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
        gradual: rise of the sparsity; None: the final sparsity from the start.
        until: share of the stage after which the mask stays as it is.

    Raises:
        ValueError: the mask would stop moving before the sparsity has risen.
    """

    gradual: GradualSparsity | None = None
    until: float = 1.0

    moves = True

    def __post_init__(self) -> None:
        risen = 0.0 if self.gradual is None else self.gradual.end
        if not risen <= self.until <= 1:
            raise ValueError(
                f"`until` is {self.until}; expected a share of the stage from {risen}, where the sparsity has risen, "
                "to 1."
            )

    def first_sparsity(self, sparsity: float) -> float:
        """Return 0 where the sparsity rises."""
        return sparsity if self.gradual is None else 0.0

    def is_final(self, progress: StageProgress) -> bool:
        """Return whether the sparsity has stopped rising."""
        return self.gradual is None or self.gradual.is_final(progress)

    def is_settled(self, progress: StageProgress) -> bool:
        """Return whether `until` has passed."""
        return progress.fraction > self.until + 1e-9

    def advance(
        self, model: PromptedSparseModel, progress: StageProgress, gradients: Mapping[str, Tensor] | None = None
    ) -> int:
        """Select the mask from the scores."""
        if self.is_settled(progress):
            return 0
        if self.gradual is not None:
            model.config.sparsity = self.gradual.sparsity(progress)
        return model.update_masks()


def keep_all(model: PromptedSparseModel) -> int:
    """Freeze the model with nothing pruned, and return the number of changed mask entries."""
    return model.apply_masks(all_kept(model.prunables()))


def cubic_sparsity(progress: float, initial: float, final: float) -> float:
    """Compute the sparsity after a share of gradual pruning (arXiv 1710.01878).

    `final + (initial - final) * (1 - progress) ** 3`.

    Args:
        progress: in [0, 1].
    """
    return final + (initial - final) * (1 - progress) ** 3
