"""Plan the stages of a run as values, before any of them trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.batches import RoleBatchSampler
from ..methods.mask_schedules import StageProgress
from ..methods.preparations import Preparation, StartScores
from ..methods.stage import RoleSettings, Stage
from ..scores.starts import AUTO, HYDRA
from .arguments import VPNsTrainingArguments
from .optimizers import learning_rate_factor
from .run_record import FinishedStage, stage_folder


@dataclass(frozen=True)
class StageSettings:
    """Length and optimizers of a stage, as the model card and the dry run report them.

    Args:
        name: name of the stage.
        steps: optimizer steps.
        roles: optimizer and learning rate of each trained role; `"auto"` where it is found when the stage begins.
    """

    name: str
    steps: int
    roles: dict[str, tuple[str, float | str]]

    def row(self) -> tuple[str, str, str]:
        """Return the stage as a row of a table: name, trained roles, steps."""
        trained = ", ".join(
            f"{role}: {optim} at {rate if isinstance(rate, str) else format(rate, 'g')}"
            for role, (optim, rate) in sorted(self.roles.items())
        )
        return self.name.replace("_", " "), trained or "nothing", f"{self.steps:,}"

    def as_finished(self, stage: FinishedStage) -> StageSettings:
        """Return the settings with the steps and the learning rate of the scores that the stage ended with."""
        roles = dict(self.roles)
        if stage.score_learning_rate:
            roles["scores"] = (roles["scores"][0], stage.score_learning_rate)
        return replace(self, steps=stage.steps, roles=roles)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Args:
        stage: the stage of the method.
        index: position in the run, from 0.
        count: number of stages of the run.
        sparsity: sparsity at the end of the stage, a fraction.
        scope: scope in which masks are selected.
        batches: kind of the batches, as in [`Stage`], with `"default"` resolved.
        args: the run's arguments with the folder and the length of this stage; the others are the run's own.
        steps: optimizer steps; 0 for a stage that trains nothing.
    """

    stage: Stage
    index: int
    count: int
    sparsity: float
    scope: str
    batches: str
    args: VPNsTrainingArguments
    steps: int

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage.name

    @property
    def place(self) -> str:
        """Name of the stage and its position in the run, for people."""
        return f"[stage {self.index + 1} of {self.count}] {self.name}"

    @property
    def folder(self) -> Path:
        """Folder of the stage's checkpoints and model."""
        return Path(self.args.output_dir)

    def progress(self, step: int, total: int) -> StageProgress:
        """Return how far the stage is after `step` of `total` optimizer steps."""
        return StageProgress(step, total, self.sparsity)

    def sampler(self, rows: int) -> RoleBatchSampler:
        """Return the sampler of the training batches for a data set of that many rows."""
        return _sampler(self.stage, self.index, self.batches, self.args, rows)

    @property
    def preparations(self) -> tuple[Preparation, ...]:
        """Preparations of the stage, with the start of its scores unless a wrapped model has it."""
        start = self.args.score_settings(self.stage).start
        if "scores" not in self.stage.roles or start == HYDRA:
            return self.stage.before
        return *self.stage.before, StartScores(start)

    def role_settings(self, role: str, score_rate: float) -> RoleSettings:
        """Return the optimizer settings of a role, with `score_rate` in place of `"auto"`."""
        settings = self.args.role_settings(role, self.stage)
        return replace(settings, learning_rate=score_rate) if settings.learning_rate == AUTO else settings

    def learning_rate_factor(self, role: str, steps: int) -> Callable[[int], float]:
        """Return the factor of a role's learning rate as a function of the optimizer step, out of `steps`."""
        return learning_rate_factor(
            self.args.role_settings(role, self.stage).lr_scheduler_type,
            self.args.get_warmup_steps(steps),
            steps,
            **(self.args.lr_scheduler_kwargs or {}),
        )

    def settings(self, present: Collection[str]) -> StageSettings:
        """Return length and optimizers for a model that has parameters of the roles `present`."""
        chosen = {role: self.args.role_settings(role, self.stage) for role in sorted(self.stage.roles & set(present))}
        roles = {role: (settings.optim, settings.learning_rate) for role, settings in chosen.items()}
        return StageSettings(self.name, self.steps, roles)


def plan_stages(
    stages: Sequence[Stage], args: VPNsTrainingArguments, *, sparsity: float, scope: str, has_prompt: bool, rows: int
) -> list[StagePlan]:
    """Plan the stages of a run.

    Args:
        stages: the stages of the method, in order.
        args: arguments of the run.
        sparsity: sparsity asked for, a fraction.
        scope: the model's scope.
        has_prompt: whether the model has a prompt.
        rows: number of training images; 0 if nothing will be trained.
    """
    return [_plan(index, stages, args, sparsity, scope, has_prompt, rows) for index in range(len(stages))]


def _plan(
    index: int,
    stages: Sequence[Stage],
    args: VPNsTrainingArguments,
    sparsity: float,
    scope: str,
    has_prompt: bool,
    rows: int,
) -> StagePlan:
    stage = stages[index]
    batches = _resolved_batches(stage, args, has_prompt)
    epochs, max_steps = args.stage_length(stage, stages)
    epoch_steps = _steps(_sampler(stage, index, batches, args, rows), args, epochs) if rows else 0
    if stage.length == "warm_up" and args.max_steps > 0:
        max_steps = min(args.max_steps, epoch_steps)
    stage_args = copy.copy(args)
    stage_args.output_dir = str(stage_folder(Path(args.output_dir), index, stage.name))
    stage_args.num_train_epochs, stage_args.max_steps = epochs, max_steps
    stage_args.load_best_model_at_end = args.load_best_model_at_end and index == len(stages) - 1
    return StagePlan(
        stage=stage,
        index=index,
        count=len(stages),
        sparsity=sparsity if stage.sparsity is None else stage.sparsity,
        scope=stage.masks.scope or scope,
        batches=batches,
        args=stage_args,
        steps=(max_steps if max_steps > 0 else epoch_steps) if stage.roles else 0,
    )


def _resolved_batches(stage: Stage, args: VPNsTrainingArguments, has_prompt: bool) -> str:
    if stage.batches == "default" or (stage.batches.startswith("prompted") and not has_prompt):
        return "mixed" if args.mix_unaugmented else "augmented"
    return stage.batches


def _sampler(stage: Stage, index: int, batches: str, args: VPNsTrainingArguments, rows: int) -> RoleBatchSampler:
    mixing: Any = "never" if batches == "augmented" else args.prompt_mixing
    if stage.roles == {"prompt"}:
        # A plain batch would give the prompt no gradient.
        mixing = "always"
    return RoleBatchSampler(
        rows,
        args.train_batch_size,
        mixing,
        window=args.gradient_accumulation_steps * args.world_size,
        seed=(args.seed if args.data_seed is None else args.data_seed) + index,
        shuffle=args.train_sampling_strategy == "random",
        drop_last=args.dataloader_drop_last,
    )


def _steps(sampler: RoleBatchSampler, args: VPNsTrainingArguments, epochs: float) -> int:
    batches_a_step = args.gradient_accumulation_steps * args.world_size
    return math.ceil(epochs * math.ceil(len(sampler) / batches_a_step))
