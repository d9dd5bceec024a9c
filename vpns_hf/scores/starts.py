"""Start scores that are learned, and find the learning rate at which they can change a mask.

A new start is one function and one entry in [`SCORE_STARTS`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking.search import initial_scores
from ..masking.topk import kept_count, kth_smallest
from ..model.modeling import PromptedSparseModel
from .table import score_weights

AUTO = "auto"
HYDRA = "hydra"
# Size of the largest scores of HYDRA's start, and the percentile that stands for them.
_LARGE_SCORE = 0.2
_LARGE_SHARE = 0.999

Batches = Sequence[Mapping[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScoreSettings:
    """Start and learning rate of the scores of a stage, unless the arguments of the run say otherwise.

    Args:
        start: a key of [`SCORE_STARTS`].
        learning_rate: a number, or `"auto"` for [`reaching_rate`].
        travel: distance that a score can move under `"auto"`, in multiples of the threshold that it has to cross. The
            default did best on validation in searches of 100 steps; the paper's setting comes to about 12: rate 1e-4,
            11,700 steps, a threshold near 0.05.
    """

    start: str = HYDRA
    learning_rate: float | str = 1e-4
    travel: float = 4.0


@dataclass(frozen=True)
class StartInputs:
    """Inputs of a start.

    Args:
        model: model in any state, whose weights are read.
        calibration: function that returns batches of `pixel_values` and `labels`.
        loss: loss of logits and labels that gradients follow; None: the model's own.
    """

    model: PromptedSparseModel
    calibration: Callable[[], Batches]
    loss: Loss | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return the prunable weights in float32, without gradients."""
        return {name: weight.detach().float() for name, weight in self.model.prunable_weights().items()}


ScoreStart = Callable[[StartInputs], dict[str, Tensor]]


def hydra(inputs: StartInputs) -> dict[str, Tensor]:
    """Start as the paper and HYDRA (arXiv 2002.10509) do, see [`masking.search.initial_scores`]."""
    return {name: initial_scores(weight) for name, weight in inputs.weights().items()}


def magnitude(inputs: StartInputs) -> dict[str, Tensor]:
    """Start at the weights, each layer scaled by itself, so that layers start at similar sparsity."""
    return {name: _scaled({name: weight})[name] for name, weight in inputs.weights().items()}


def lamp(inputs: StartInputs) -> dict[str, Tensor]:
    """Start at the root of the LAMP score (arXiv 2010.07611) with the sign of the weight."""
    return _signed_roots(inputs.weights(), score_weights("lamp", inputs.model, []))


def snip(inputs: StartInputs) -> dict[str, Tensor]:
    """Start at `sqrt(|weight * gradient|)` (SNIP, arXiv 1810.02340) with the sign of the weight, scaled."""
    scores = score_weights("snip", inputs.model, inputs.calibration(), loss=inputs.loss)
    return _scaled(_signed_roots(inputs.weights(), scores))


def _signed_roots(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.sqrt().float().copysign(weights[name]) for name, score in scores.items()}


def _scaled(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply all scores by one factor, which puts the 99.9th percentile of their absolute values at 0.2."""
    large = _ranked(scores.values(), _LARGE_SHARE).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: score * (_LARGE_SCORE / large) for name, score in scores.items()}


SCORE_STARTS: dict[str, ScoreStart] = {HYDRA: hydra, "lamp": lamp, "snip": snip, "magnitude": magnitude}
"""Starts of scores by name. A start returns a float32 tensor for each of `model.prunable_weights()`, whose absolute
values are ranked and whose signs are those of the weights, as the gradient of the scores expects."""


def score_threshold(scores: Mapping[str, Tensor], sparsity: float) -> float:
    """Return the smallest |score| that is kept at a sparsity when all layers are ranked together."""
    return float(_ranked(scores.values(), sparsity))


def _ranked(scores: Iterable[Tensor], share: float) -> Tensor:
    """Return the smallest absolute value above a share of all of them."""
    values = torch.cat([score.detach().abs().flatten() for score in scores])
    return kth_smallest(values, min(values.numel() - kept_count(values.numel(), share), values.numel() - 1))


def reaching_rate(threshold: float, travel: float, steps: float) -> float:
    """Compute the learning rate at which a score moves `travel` thresholds if all its steps point the same way.

    Adam moves a parameter by about the learning rate in every step, whatever the size of its gradient.

    Args:
        threshold: smallest |score| that is kept at the final sparsity, as the scores start.
        travel: multiple of the threshold.
        steps: sum of the factors of the learning rate schedule over the steps in which the mask can change.

    Raises:
        ValueError: threshold or steps are zero, so that no rate follows from them.
    """
    if threshold <= 0 or steps <= 0:
        raise ValueError(
            f"`score_learning_rate='auto'` follows from the threshold of the scores, which is {threshold:g}, and the "
            f"steps of their schedule, which amount to {steps:g}; both must be above zero, so choose another "
            "`score_start`, more steps, or a number."
        )
    return travel * threshold / steps
