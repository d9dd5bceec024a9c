"""One optimizer per role (scores, prompt, head, weights) behind the interface of a single one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

NOT_IN_TRAINER: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam}
"""Optimizers that `TrainingArguments.optim` does not know."""


@dataclass(frozen=True)
class RoleSettings:
    """How the parameters of one role are trained.

    Args:
        optim: name of an optimizer of `TrainingArguments.optim`, or `"adam"` (weight decay added to the gradient, as
            in the released code; `"adamw_torch"` decouples it).
        learning_rate: initial learning rate.
        lr_scheduler_type: name of its schedule.
    """

    optim: str
    learning_rate: float
    lr_scheduler_type: str


def build_optimizer(
    parameters: list[dict[str, Any]], settings: RoleSettings, args: TrainingArguments, momentum: float
) -> torch.optim.Optimizer:
    """The optimizer that Trainer would build under these settings.

    Args:
        parameters: parameter groups.
        args: the betas, epsilon and `optim_args` are taken from here.
        momentum: for `"sgd"`, unless `optim_args` has its own.

    Raises:
        ValueError: an unknown optimizer.
    """
    if settings.optim in NOT_IN_TRAINER:
        betas = (args.adam_beta1, args.adam_beta2)
        return NOT_IN_TRAINER[settings.optim](
            parameters, lr=settings.learning_rate, betas=betas, eps=args.adam_epsilon
        )  # type: ignore[call-arg]
    known = [*NOT_IN_TRAINER, *(name.value for name in OptimizerNames)]
    if settings.optim not in known:
        raise ValueError(f"The optimizer {settings.optim!r} is unknown; expected one of {', '.join(known)}.")
    role_args = copy.copy(args)
    role_args.optim, role_args.learning_rate = OptimizerNames(settings.optim), settings.learning_rate
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(role_args)
    if optimizer_class is torch.optim.SGD:
        kwargs = {"momentum": momentum} | kwargs
    return optimizer_class(parameters, **kwargs)


class OptimizerByRole(torch.optim.Optimizer):
    """Several optimizers stepped as one; `param_groups` are theirs, in order, each tagged with its `role`.

    Args:
        parts: optimizer of each role.
        turns: the roles that are stepped, in turn by step; none: all of them at every step.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer], turns: Sequence[Collection[str]] = ()):
        self.parts = dict(parts)
        self.turns, self.steps = tuple(turns), 0
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
            if role in roles:
                part.step()
        self.steps += 1

    @torch.no_grad()
    def mask_state(self, masks: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Set momentum and the like to zero wherever a parameter's mask is False."""
        for parameter, mask in masks:
            for part in self.parts.values():
                for value in part.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.masked_fill_(~mask, 0)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, by role, and how many steps were made."""
        return {role: part.state_dict() for role, part in self.parts.items()} | {"steps": self.steps}

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
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def weight_groups(
    parameters: Mapping[str, nn.Parameter], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; empty ones are left out."""
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
