"""Report the stages of a run as one run to TensorBoard, Weights & Biases and the like."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

_REPORTS = tuple(INTEGRATION_TO_CALLBACK.values())


class RunCallbackHandler(CallbackHandler):
    """Show reporting callbacks the steps and the folder of the whole run, and all others those of the stage.

    Args:
        handler: handler of the trainer, whose callbacks are taken over.
        run_args: arguments of the run.

    Attributes:
        finished_steps: optimizer steps of the stages before the present one.
    """

    def __init__(self, handler: CallbackHandler, run_args: TrainingArguments):
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.run_args, self.finished_steps = run_args, 0

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call an event of every callback."""
        for callback in self.callbacks:
            alone = copy.copy(self)
            alone.callbacks = [callback]
            seen = self._run_view(event, args, state) if isinstance(callback, _REPORTS) else (args, state)
            control = super(RunCallbackHandler, alone).call_event(event, *seen, control, **kwargs)
        return control

    def _run_view(
        self, event: str, args: TrainingArguments, state: TrainerState
    ) -> tuple[TrainingArguments, TrainerState]:
        """Return arguments and state of the run where folder or step are reported; saving needs those of the stage."""
        if event == "on_train_begin":
            args = self.run_args
        if event == "on_log":
            state = copy.copy(state)
            state.global_step += self.finished_steps
        return args, state
