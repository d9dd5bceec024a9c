"""Build one optimizer and schedule per role."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from ..masking import sharding
from ..methods.stage import RoleSettings


class Platon(torch.optim.Optimizer):
    """Set scores to PLATON's upper confidence bound of their importance (arXiv 2206.12562).

    The importance of a weight in a step is `I = |weight * gradient|`, the absolute gradient of its score. With moving
    averages `M` of `I` and `U` of `|I - M|`, the score is `M * U`.

    Args:
        params: scores that are ranked with their sign, which start at zero.
        lr: unused; schedules ask for it.
        betas: factors of the averages of importance and of its uncertainty, in [0, 1).
    """

    def __init__(self, params: Any, lr: float = 1.0, betas: tuple[float, float] = (0.85, 0.975)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Add the importance of this step to the averages."""
        for group in self.param_groups:
            first, second = group["betas"]
            for score in group["params"]:
                if score.grad is None:
                    continue
                state = self.state[score]
                if not state:
                    state |= {"importance": torch.zeros_like(score), "uncertainty": torch.zeros_like(score)}
                now = score.grad.abs()
                importance = state["importance"].lerp_(now, 1 - first)
                uncertainty = state["uncertainty"].lerp_((now - importance).abs(), 1 - second)
                torch.mul(importance, uncertainty, out=score)


NOT_IN_TRAINER: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam}
"""Optimizers that `TrainingArguments.optim` does not know."""
PLATON = "platon"
"""Name of [`Platon`] in the settings of a stage."""


def build_optimizer(
    parameters: list[dict[str, Any]], settings: RoleSettings, args: TrainingArguments, momentum: float
) -> torch.optim.Optimizer:
    """Build the optimizer that Trainer would build under these settings.

    Args:
        parameters: parameter groups.
        args: source of betas, epsilon and `optim_args`.
        momentum: momentum of `"sgd"`, unless `optim_args` has its own.

    Raises:
        ValueError: an unknown optimizer.
    """
    learning_rate = float(settings.learning_rate)
    if settings.optim == PLATON:
        return Platon(parameters, lr=learning_rate)
    if settings.optim in NOT_IN_TRAINER:
        betas = (args.adam_beta1, args.adam_beta2)
        return NOT_IN_TRAINER[settings.optim](parameters, lr=learning_rate, betas=betas, eps=args.adam_epsilon)  # type: ignore[call-arg]
    known = [*NOT_IN_TRAINER, *(name.value for name in OptimizerNames)]
    if settings.optim not in known:
        raise ValueError(f"The optimizer {settings.optim!r} is unknown; expected one of {', '.join(known)}.")
    role_args = copy.copy(args)
    role_args.optim, role_args.learning_rate = OptimizerNames(settings.optim), learning_rate
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(role_args)
    if optimizer_class is torch.optim.SGD:
        kwargs = {"momentum": momentum} | kwargs
    return optimizer_class(parameters, **kwargs)


class OptimizerByRole(torch.optim.Optimizer):
    """Step several optimizers as one; `param_groups` are theirs, in order, each tagged with its `role`.

    Args:
        parts: optimizer of each role.
        turns: roles stepped in turn, one entry per step; none: all of them at every step.

    Attributes:
        skipped_roles: roles that are not stepped while they are named here. A role without gradients is not stepped
            anyway, but DeepSpeed gives it zeros, and then momentum would move it.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer], turns: Sequence[Collection[str]] = ()):
        self.parts = dict(parts)
        self.turns, self.steps = tuple(turns), 0
        self.skipped_roles: Collection[str] = ()
        for role, part in self.parts.items():
            for group in part.param_groups:
                group["role"] = role
        super().__init__([group for part in self.parts.values() for group in part.param_groups], defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every part; parameters without a gradient (the prompt after a plain batch) are left alone."""
        if closure is not None:
            raise ValueError("OptimizerByRole takes no closure: the loss is computed once for all roles.")
        roles = self.turns[self.steps % len(self.turns)] if self.turns else self.parts
        for role, part in self.parts.items():
            if role in roles and role not in self.skipped_roles:
                part.step()
        self.steps += 1

    @torch.no_grad()
    def mask_state(self, masks: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Set momentum and the like to zero wherever a parameter's mask is False."""
        for parameter, mask in masks:
            for part in self.parts.values():
                for value in part.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        sharding.local(value).masked_fill_(~sharding.local(mask), 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part, by role, and the number of steps.

        The state of sharded parameters is gathered; all processes then call this together.
        """
        return {role: _gathered(part.state_dict()) for role, part in self.parts.items()} | {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore every part.

        Raises:
            ValueError: the state belongs to other roles.
        """
        if (saved := set(state_dict) - {"steps"}) != set(self.parts):
            raise ValueError(
                f"The optimizer state is of the roles {sorted(saved)}; this stage trains {sorted(self.parts)}."
            )
        self.steps = state_dict["steps"]
        for role, part in self.parts.items():
            part.load_state_dict(state_dict[role])
            _shard_state(part)
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def _gathered(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        index: {name: sharding.whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Split momentum and the like as their parameters are."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = sharding.split_like(value, parameter)


def weight_groups(
    parameters: Mapping[str, nn.Parameter], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups with and without weight decay, without empty ones."""
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(
    name: str, num_warmup_steps: int, num_training_steps: int, **kwargs: Any
) -> Callable[[int], float]:
    """Return the factor of a learning rate as a function of the optimizer step, for a schedule of transformers.

    Args:
        name: name of a `SchedulerType`, such as `"cosine"`, `"linear"` or `"constant_with_warmup"`.
        kwargs: settings of that schedule.

    Raises:
        ValueError: the schedule is unknown, or not a function of the step alone (`"reduce_lr_on_plateau"`).
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps, num_training_steps, scheduler_specific_kwargs=kwargs)
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"The learning rate schedule {name!r} depends on more than the step; use one such as 'cosine' or 'linear'."
        )
    return scheduler.lr_lambdas[0]
