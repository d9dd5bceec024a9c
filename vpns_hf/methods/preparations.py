"""Prepare a stage: score and select, rewind, recalibrate BatchNorm. Each is a small callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ..masking.selection import select_masks
from ..model.modeling import PromptedSparseModel
from ..scores.sparsegpt import sparsegpt
from ..scores.starts import SCORE_STARTS, StartInputs
from ..scores.table import score_weights
from .mask_schedules import keep_all

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class StageStart:
    """Inputs of a preparation.

    Args:
        model: model as the stage before left it.
        sparsity: sparsity of the stage, a fraction.
        seed: seed of the run.
        calibration: function that returns batches of `pixel_values` and `labels`, balanced over the classes, not
            augmented.
        first_state: function that returns the backbone's parameters and buffers as they were before the first stage
            after the warm-up (see [`PromptedSparseModel.backbone_state`]).
        loss: loss of logits and labels that scores follow; None: the model's own.
    """

    model: PromptedSparseModel
    sparsity: float
    seed: int
    calibration: Callable[[], Batches]
    first_state: Callable[[], Mapping[str, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None


Preparation = Callable[[StageStart], None]


@dataclass(frozen=True)
class Select:
    """Score the weights and keep the largest scores; weights pruned before stay pruned.

    Args:
        score: name of a score of `vpns_hf.scores.SCORES`.
        scope: as in [`masking.select_masks`]; None: the model's.
        rounds: number of times to score and select, with densities `d ** (t / rounds)`.
        needs_data: whether the score needs calibration batches.
        seeded: whether the score takes the seed of the run.
        options: options of the score.
    """

    score: str
    scope: str | None = None
    rounds: int = 1
    needs_data: bool = True
    seeded: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, start: StageStart) -> None:
        """Freeze the model with the selected masks."""
        model = start.model
        if model.config.state != "frozen":
            keep_all(model)
        batches = start.calibration() if self.needs_data else []
        options = dict(self.options) | ({"seed": start.seed} if self.seeded else {})
        for turn in range(1, self.rounds + 1):
            sparsity = 1 - (1 - start.sparsity) ** (turn / self.rounds) if turn < self.rounds else start.sparsity
            masks = model.masks()
            scores = score_weights(self.score, model, batches, masks=masks, loss=start.loss, **options)
            selected = select_masks(scores, sparsity, self.scope or model.config.scope, model.pattern, within=masks)
            if any((mask & ~masks[name]).any() for name, mask in selected.items()):
                raise ValueError(
                    f"The model is pruned to {model.sparsity:.2%} already, so that a mask of {sparsity:.2%} sparsity "
                    "would bring weights back as zeros; ask for a higher sparsity or start from an unpruned model."
                )
            model.apply_masks(selected)


@dataclass(frozen=True)
class StartScores:
    """Set the scores that will be learned to their start.

    Args:
        start: name of a start of `vpns_hf.scores.SCORE_STARTS`.
    """

    start: str

    @torch.no_grad()
    def __call__(self, start: StageStart) -> None:
        """Overwrite the scores, attached first where there are none; masks follow when the stage begins."""
        model = start.model
        values = SCORE_STARTS[self.start](StartInputs(model, start.calibration, start.loss))
        if model.config.state == "dense":
            model.attach_scores()
        for name, score in model.scores().items():
            score.copy_(model.pattern.start(name, values.__getitem__))


@dataclass(frozen=True)
class Rewind:
    """Set weights, head and BatchNorm buffers back to where the first stage began; masks stay."""

    def __call__(self, start: StageStart) -> None:
        """Rewind the model."""
        start.model.rewind(start.first_state())


@dataclass(frozen=True)
class RecalibrateBatchNorm:
    """Recompute the running statistics of BatchNorm on the calibration images, without a prompt."""

    def __call__(self, start: StageStart) -> None:
        """Replace the statistics; models without BatchNorm are left as they are."""
        model = start.model
        images = (batch["pixel_values"].to(model.device) for batch in start.calibration())
        update_bn(images, model)


@dataclass(frozen=True)
class Reconstruct:
    """SparseGPT (arXiv 2301.00774): prune layer by layer and correct the weights that are kept."""

    def __call__(self, start: StageStart) -> None:
        """Freeze the model with the masks and write the corrected weights."""
        masks, weights = sparsegpt(start.model, start.calibration(), start.sparsity)
        start.model.apply_masks(masks)
        with torch.no_grad():
            for name, parameter in start.model.prunable_weights().items():
                parameter.copy_(weights[name])
