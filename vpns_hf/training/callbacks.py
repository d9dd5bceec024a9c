"""`StageCallback`: what a stage does around every optimizer step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..masking import sharding
from ..methods.mask_schedules import keep_all
from .resumable_trainer import ResumableTrainer


class StageCallback(TrainerCallback):
    """What a stage does around every optimizer step: prompts of noise, masks that move, zeros that stay.

    Args:
        trainer: whose stage it is.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self._masks: dict[str, Tensor] | None = None
        self._started = 0.0
        self._saves_at_epoch_end = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._saves_at_epoch_end = False
        self.trainer.restore_losses()
        self.trainer.model.shard_masks()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        # An epoch that is resumed half-way has its label mapping in the checkpoint.
        if float(state.epoch or 0).is_integer():
            with self.trainer.counters.measuring(self.trainer.model):
                self.trainer.label_mapper.refresh()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._started = time.perf_counter()
        model, stage = self.trainer.model, self.trainer.stage
        if stage.prompt_noise:
            self._fill_prompt_with_noise(state.global_step)
        if stage.masks.needs_dense_gradients(self.trainer.progress(state.global_step + 1)):
            # Pruned weights are zero, so opening their masks changes no output and lets their gradients through.
            self._masks = {name: mask.clone() for name, mask in model.masks().items()}
            keep_all(model)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if self._masks is None:
            return
        model = self.trainer.model
        model.apply_masks(self._masks)
        self._masks = None
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.prunable_weights().items()
        }
        progress = self.trainer.progress(state.global_step + 1)
        self._changed(self.trainer.stage.masks.advance(model, progress, gradients))
        # The update takes the place of the optimizer step.
        model.zero_grad(set_to_none=True)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        progress = self.trainer.progress(state.global_step + 1)
        self._changed(self.trainer.stage.masks.advance(self.trainer.model, progress))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self.trainer.counters.seconds += time.perf_counter() - self._started
        self.trainer.stopping = self.trainer.was_asked_to_stop()
        if self.trainer.stopping:
            control.should_save = True
        if state.global_step >= state.max_steps or float(state.epoch).is_integer():
            # What the end of the epoch logs and evaluates belongs into the checkpoint.
            self._saves_at_epoch_end, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        control.should_save = control.should_save or self._saves_at_epoch_end
        self._saves_at_epoch_end = False

    def _changed(self, flips: int) -> None:
        self.trainer.counters.flips += flips
        model = self.trainer.model
        if flips and model.config.state == "frozen":
            weights, kept = model.prunable_weights(), self.trainer.stage.masks.kept_state(model)
            # Momentum of a pruned weight would move it when it comes back.
            self.trainer.optimizer.optimizer.mask_state([(weights[name], mask) for name, mask in kept.items()])

    @torch.no_grad()
    def _fill_prompt_with_noise(self, step: int) -> None:
        """Draw every parameter of the prompt from N(0, `args.prompt_noise` ** 2), by seed, stage and step alone."""
        args, model = self.trainer.args, self.trainer.model
        (seed,) = np.random.SeedSequence([args.seed, self.trainer.stage_index, step]).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        for parameter in model.parameters_by_role()["prompt"].values():
            noise = args.prompt_noise * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(sharding.split_like(noise, parameter))
