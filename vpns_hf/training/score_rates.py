"""Find the learning rate of the scores when a stage begins, or warn of one that is too low."""

from __future__ import annotations

import logging

from ..model.modeling import PromptedSparseModel
from ..scores.starts import AUTO, reaching_rate, score_threshold
from .plan import StagePlan

logger = logging.getLogger(__name__)


def settle_score_rate(model: PromptedSparseModel, plan: StagePlan) -> float:
    """Find the learning rate of the scores under `"auto"`; warn of a number at which few can cross the threshold.

    Args:
        model: model in the search state, with the scores that the stage starts from.
        plan: plan of the stage.

    Returns:
        The rate; 0 where the arguments or the method give a number.

    Raises:
        ValueError: no rate follows from the scores and the steps.
    """
    settings = plan.args.role_settings("scores", plan.stage)
    threshold, steps = score_threshold(model.scores(), plan.sparsity), score_steps(plan)
    if settings.learning_rate == AUTO:
        return reaching_rate(threshold, plan.args.score_settings(plan.stage).travel, steps)
    distance = float(settings.learning_rate) * steps
    if "adam" in settings.optim and distance < threshold:
        logger.warning(
            "Scores can move by %.2g in the stage %s, and the threshold of the mask is %.2g, so that few of them can "
            "cross it; set `score_learning_rate='auto'`, or train for more steps.",
            distance,
            plan.name,
            threshold,
        )
    return 0.0


def score_steps(plan: StagePlan) -> float:
    """Sum the factors of the scores' learning rate over the steps that can change the mask."""
    factor, turns, masks = plan.learning_rate_factor("scores", plan.steps), plan.stage.turns, plan.stage.masks
    return sum(
        factor(step)
        for step in range(plan.steps)
        if not masks.is_settled(plan.progress(step + 1, plan.steps))
        and (not turns or "scores" in turns[step % len(turns)])
    )
