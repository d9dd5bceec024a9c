"""Fill the prompt with noise before every step, as a control of the learned prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..masking import sharding


class PromptNoise(TrainerCallback):
    """Draw every parameter of the prompt from a normal distribution, by seed, stage and step alone.

    Args:
        plan: plan of the stage.
        std: standard deviation: pixel values in [0, 1], for the prompt `pad`. The default is near the root mean
            square of prompts that were learned on the demo.
    """

    def __init__(self, plan: Any, std: float = 0.01):
        self.plan, self.std = plan, std

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        key = [args.seed, self.plan.index, state.global_step]
        (seed,) = np.random.SeedSequence(key).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        for parameter in kwargs["model"].parameters_by_role()["prompt"].values():
            noise = self.std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(sharding.split_like(noise, parameter))
