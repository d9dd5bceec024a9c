"""Callbacks of a stage: masks that move, label mappings, checkpoints at signals and epoch ends, pushes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..methods.mask_schedules import keep_all
from ..model.modeling import PromptedSparseModel
from .counters import Counters
from .interruption import StopSignals, leave
from .label_mapper import LabelMapper
from .plan import StagePlan


class MaskUpdates(TrainerCallback):
    """Update masks around each optimizer step, as the mask schedule of the stage says.

    Args:
        plan: function that returns the plan of the present stage.
        counters: function that returns the counters of the stage, which receive the number of changed mask entries.
    """

    def __init__(self, plan: Callable[[], StagePlan], counters: Callable[[], Counters]):
        self.plan, self.counters = plan, counters
        self._masks: dict[str, Tensor] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        kwargs["model"].shard_masks()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        plan, model = self.plan(), kwargs["model"]
        if plan.stage.masks.needs_dense_gradients(plan.progress(state.global_step + 1, state.max_steps)):
            # Pruned weights are zero, so opening their masks changes no output and lets their gradients through.
            self._masks = {name: mask.clone() for name, mask in model.masks().items()}
            keep_all(model)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if self._masks is None:
            return
        model = kwargs["model"]
        model.apply_masks(self._masks)
        self._masks = None
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.prunable_weights().items()
        }
        self._advance(state, model, kwargs["optimizer"], gradients)
        # The update replaces the optimizer step.
        model.zero_grad(set_to_none=True)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._advance(state, kwargs["model"], kwargs["optimizer"], None)

    def _advance(
        self,
        state: TrainerState,
        model: PromptedSparseModel,
        optimizer: Any,
        gradients: dict[str, Tensor] | None = None,
    ) -> None:
        plan = self.plan()
        masks = plan.stage.masks
        flips = masks.advance(model, plan.progress(state.global_step + 1, state.max_steps), gradients)
        self.counters().flips += flips
        if flips and model.config.state == "frozen":
            weights, kept = model.prunable_weights(), masks.kept_state(model)
            # Momentum of a pruned weight would move it when it comes back.
            optimizer.optimizer.mask_state([(weights[name], mask) for name, mask in kept.items()])


class LabelMappingUpdates(TrainerCallback):
    """Refresh an iterative label mapping at the start of every epoch.

    Args:
        label_mapper: label mapper of the run.
        counters: function that returns the counters of the stage, which receive the cost.
    """

    def __init__(self, label_mapper: LabelMapper, counters: Callable[[], Counters]):
        self.label_mapper, self.counters = label_mapper, counters

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        # An epoch that is resumed half-way has its label mapping in the checkpoint.
        if float(state.epoch or 0).is_integer():
            with self.counters().measuring(kwargs["model"]):
                self.label_mapper.refresh()


class PushCheckpoints(TrainerCallback):
    """Push every checkpoint once it is complete, and finish the pushes before the stage ends.

    Args:
        push: function that pushes a checkpoint folder in the background.
        wait: function that waits until the pushes are done.
    """

    def __init__(self, push: Callable[[Path], None], wait: Callable[[], None]):
        self.push, self.wait = push, wait

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if args.push_to_hub and state.is_world_process_zero:
            self.push(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self.wait()


class CheckpointControl(TrainerCallback):
    """Save and leave at a signal, and save at the end of an epoch after its evaluation. Runs after other callbacks.

    Args:
        signals: signals received by this process.
        accelerator: accelerator of the trainer, which tells the other processes.
    """

    def __init__(self, signals: StopSignals, accelerator: Accelerator):
        self.signals, self.accelerator = signals, accelerator
        self._stops = self._saves_at_epoch_end = False

    def was_asked_to_stop(self) -> bool:
        """Return whether any process received Ctrl-C or SIGTERM; the same on all of them."""
        if self.signals.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def leave(self, where: str) -> None:
        """End the run as the signal would have, once everything is saved.

        Raises:
            KeyboardInterrupt, SystemExit: always one of them.
        """
        received = self.signals.received or signal.SIGTERM
        if self.accelerator.is_main_process:
            print(
                f"Stopped by {received.name} {where}; everything is saved, and `resume_from_checkpoint=True` (in "
                "recipes `--resume_from_checkpoint true`) resumes from there.",
                flush=True,
            )
        leave(received)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._stops = self._saves_at_epoch_end = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._stops = self.was_asked_to_stop()
        if self._stops:
            control.should_save = True
        if state.global_step >= state.max_steps or float(state.epoch or 0).is_integer():
            # Logs and evaluations of the end of the epoch belong into the checkpoint.
            self._saves_at_epoch_end, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        control.should_save = control.should_save or self._saves_at_epoch_end
        self._saves_at_epoch_end = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if self._stops:
            stage = Path(args.output_dir).name.split("-", 1)[1]
            self.leave(f"after step {state.global_step} of the stage {stage}")
