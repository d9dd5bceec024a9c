"""Describe a pruning method as a list of stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .mask_schedules import MaskSchedule
from .preparations import Preparation, Select


@dataclass(frozen=True)
class Stage:
    """One training run of a method.

    Args:
        name: shown in logs and in the folder of its checkpoints.
        roles: what trains: any of `scores`, `prompt`, `head` (a new head) and `weights`; none: only `before` runs.
        state: `"search"`: weights are masked by the mask that `masks` selects from scores. `"frozen"`: the zeros are
            written into the weights. `"dense"`: nothing is masked.
        length: whose epochs and steps of the arguments apply: `"warm_up"`, `"search"` or `"tune"`.
        before: what runs before it, in order.
        masks: what the mask does during the stage.
        turns: the roles that are stepped, in turn by optimizer step; none: all roles at every step.
        batches: `"prompted"`: unaugmented prompted batches are mixed with augmented plain ones, as `prompt_mixing`
            says. `"mixed"`: the same without the prompt. `"augmented"`: all are augmented and plain. `"default"`:
            `"mixed"` if `mix_unaugmented` asks for it, else `"augmented"`; also where the model has no prompt.
        prompt_noise: fill the prompt with noise before every step (a control).
        augment_prompted: show prompted batches augmented, like plain ones (a control).
        eval_backbone: leave the backbone in evaluation mode: no dropout, BatchNorm statistics stay.
        signed_scores: rank the scores themselves and start them at zero, instead of their absolute values.
        implicit_gradient: BiP's 1 / gamma.
        scope: replaces the model's in selecting masks; None: the model's.
        sparsity: replaces the sparsity asked for; 0 keeps every weight.
        settings: replaces what the arguments say on the optimizer of a role.
        only_new_head: skipped when the head is the pretrained one.
    """

    name: str
    roles: frozenset[str]
    state: Literal["search", "frozen", "dense"]
    length: Literal["warm_up", "search", "tune"]
    before: tuple[Preparation, ...] = ()
    masks: MaskSchedule = MaskSchedule()  # noqa: RUF009  # it has no state
    turns: tuple[frozenset[str], ...] = ()
    batches: Literal["prompted", "mixed", "augmented", "default"] = "default"
    prompt_noise: bool = False
    augment_prompted: bool = False
    eval_backbone: bool = False
    signed_scores: bool = False
    implicit_gradient: float = 0.0
    scope: str | None = None
    sparsity: float | None = None
    settings: Mapping[str, RoleSettings] = field(default_factory=dict)
    only_new_head: bool = False


@dataclass(frozen=True)
class Rounds:
    """A stage run again and again on fewer weights, as in iterative magnitude pruning.

    Args:
        stage: the stage; its sparsity is set for each round, 0 in the first.
        keep: the share of weights that at least survives a round. The rounds before the next stage are
            `ceil(log(density) / log(keep))`, of equal factors, so that the next stage's sparsity is met exactly.
    """

    stage: Stage
    keep: float = 0.8

    def expand(self, sparsity: float) -> Iterator[Stage]:
        """The rounds that lead to a sparsity."""
        density = 1 - sparsity
        # Logarithms of exact powers may round upwards.
        count = math.ceil(math.log(density) / math.log(self.keep) - 1e-9)
        for index in range(count):
            yield replace(self.stage, name=f"{self.stage.name}_{index + 1}", sparsity=1 - density ** (index / count))


@dataclass(frozen=True)
class Method:
    """Stages run one after the other on the same model.

    Args:
        description: one sentence.
        stages: in order.
        uses_prompt: whether the model must have a prompt and is evaluated with it, too.
        backbone: arguments of [`PromptedSparseModel.from_backbone`] that the method needs.
        needs_pruned: whether the model must be pruned already.
        is_control: whether it isolates a part of another method rather than being one that people use.
    """

    description: str
    stages: tuple[Stage | Rounds, ...]
    uses_prompt: bool = False
    backbone: Mapping[str, Any] = field(default_factory=dict)
    needs_pruned: bool = False
    is_control: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether any of its stages needs images, apart from the warm-up of a new head."""
        stages = [entry.stage if isinstance(entry, Rounds) else entry for entry in self.stages]
        stages = [stage for stage in stages if stage.length != "warm_up"]
        before = [step for stage in stages for step in stage.before]
        return any(stage.roles for stage in stages) or any(
            not isinstance(step, Select) or step.needs_data for step in before
        )

    def stages_for(self, new_head: bool, sparsity: float) -> tuple[Stage, ...]:
        """The stages that run on a model with or without a new head, for a sparsity."""
        expanded = [
            stage
            for entry in self.stages
            for stage in (entry.expand(sparsity) if isinstance(entry, Rounds) else [entry])
        ]
        return tuple(stage for stage in expanded if new_head or not stage.only_new_head)


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
