"""Describe a pruning method as a list of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import TrainerCallback

from ..scores.starts import AUTO
from .mask_schedules import MaskSchedule
from .preparations import Preparation, Reconstruct, Select


@dataclass(frozen=True)
class Stage:
    """Training run of a method.

    Args:
        name: name in logs and in the folder of the checkpoints.
        roles: trained roles, any of `scores`, `prompt`, `head` (a new head) and `weights`; none: only `before` runs.
        length: epochs and steps of the arguments that apply: `"warm_up"`, `"search"` or `"tune"`; `"teacher"` as
            `"tune"`, but apart from the steps that the stages share. A warm-up trains a new head and is skipped for a
            pretrained one.
        before: preparations, run in order before the stage trains.
        masks: schedule of the mask; the state of the model (dense, search, frozen) follows from it.
        turns: roles stepped in turn, one entry per optimizer step; none: all roles at every step.
        batches: `"prompted"`: unaugmented prompted batches are mixed with augmented plain ones, as `prompt_mixing`
            says. `"prompted_augmented"`: the same with augmented prompted batches. `"mixed"`: the same without the
            prompt. `"augmented"`: all are augmented and plain. `"default"`: `"mixed"` if `mix_unaugmented` asks for
            it, else `"augmented"`; also where the model has no prompt.
        eval_backbone: whether the backbone stays in evaluation mode: no dropout, fixed BatchNorm statistics.
        sparsity: sparsity in place of the one asked for; 0 keeps every weight.
        settings: optimizer settings of a role in place of those of the arguments.
        callbacks: callbacks of this stage alone, each made from the `StagePlan` of the stage.
    """

    name: str
    roles: frozenset[str]
    length: Literal["warm_up", "search", "tune", "teacher"]
    before: tuple[Preparation, ...] = ()
    masks: MaskSchedule = MaskSchedule()  # noqa: RUF009  # it has no state
    turns: tuple[frozenset[str], ...] = ()
    batches: Literal["prompted", "prompted_augmented", "mixed", "augmented", "default"] = "default"
    eval_backbone: bool = False
    sparsity: float | None = None
    settings: Mapping[str, RoleSettings] = field(default_factory=dict)
    callbacks: tuple[Callable[[Any], TrainerCallback], ...] = ()


@dataclass(frozen=True)
class Rounds:
    """Repeat a stage on fewer weights each round, as in iterative magnitude pruning.

    Args:
        stage: repeated stage; its sparsity is set for each round, 0 in the first.
        keep: smallest share of weights that survives a round. The rounds before the next stage are
            `ceil(log(density) / log(keep))`, of equal factors, so that the next stage's sparsity is met exactly.
    """

    stage: Stage
    keep: float = 0.8

    def expand(self, sparsity: float) -> Iterator[Stage]:
        """Return the rounds that lead to a sparsity."""
        density = 1 - sparsity
        # Logarithms of exact powers may round upwards.
        count = math.ceil(math.log(density) / math.log(self.keep) - 1e-9)
        for index in range(count):
            yield replace(self.stage, name=f"{self.stage.name}_{index + 1}", sparsity=1 - density ** (index / count))


@dataclass(frozen=True)
class Method:
    """Pruning method: stages run one after the other on the same model.

    Args:
        description: one sentence.
        stages: in order.
        uses_prompt: whether the model must have a prompt and is evaluated with it, too.
        backbone: arguments of [`PromptedSparseModel.from_backbone`] that the method needs.
        needs_pruned: whether the model must be pruned already.
        teacher: teacher that it learns from, unless the arguments name another.
        is_control: whether it isolates a part of another method rather than being one that people use.
    """

    description: str
    stages: tuple[Stage | Rounds, ...]
    uses_prompt: bool = False
    backbone: Mapping[str, Any] = field(default_factory=dict)
    needs_pruned: bool = False
    teacher: str | None = None
    is_control: bool = False

    @property
    def _unrolled(self) -> list[Stage]:
        """Return the stages, a repeated one once."""
        return [entry.stage if isinstance(entry, Rounds) else entry for entry in self.stages]

    @property
    def picks_single_weights(self) -> bool:
        """Return whether it chooses weights one by one, so that it works with `pattern="unstructured"` alone."""
        return any(
            stage.masks.picks_single_weights or any(isinstance(step, Reconstruct) for step in stage.before)
            for stage in self._unrolled
        )

    @property
    def revives_weights(self) -> bool:
        """Return whether pruned weights start again at zero in a stage."""
        return any(stage.masks.revives_weights for stage in self._unrolled)

    @property
    def scopes(self) -> set[str]:
        """Return the scopes that its stages set themselves."""
        before = [step for stage in self._unrolled for step in stage.before]
        scopes = [step.scope for step in before if isinstance(step, Select)]
        return {scope for scope in (*scopes, *(stage.masks.scope for stage in self._unrolled)) if scope is not None}

    @property
    def finds_score_rate(self) -> bool:
        """Return whether the learning rate of the scores follows from the run, unless the arguments give a number."""
        return any("scores" in stage.roles and stage.masks.scores.learning_rate == AUTO for stage in self._unrolled)

    @property
    def needs_data(self) -> bool:
        """Return whether any stage needs images, apart from the warm-up of a new head."""
        stages = [stage for stage in self._unrolled if stage.length != "warm_up"]
        before = [step for stage in stages for step in stage.before]
        return any(stage.roles for stage in stages) or any(
            not isinstance(step, Select) or step.needs_data for step in before
        )

    def stages_for(self, new_head: bool, sparsity: float) -> tuple[Stage, ...]:
        """Return the stages that run on a model with or without a new head, for a sparsity."""
        expanded = [
            stage
            for entry in self.stages
            for stage in (entry.expand(sparsity) if isinstance(entry, Rounds) else [entry])
        ]
        return tuple(stage for stage in expanded if new_head or stage.length != "warm_up")


@dataclass(frozen=True)
class RoleSettings:
    """Optimizer settings of one role.

    Args:
        optim: name of an optimizer of `TrainingArguments.optim`, or `"adam"` (weight decay added to the gradient, as
            in the released code; `"adamw_torch"` decouples it).
        learning_rate: initial learning rate; `"auto"`, for scores alone: found when the stage begins.
        lr_scheduler_type: name of its schedule.
    """

    optim: str
    learning_rate: float | str
    lr_scheduler_type: str
