"""`ResumableTrainer`: a stage that can be interrupted at any step and goes on as if it had not been."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..masking import sharding
from .checkpoints import UNFINISHED_CHECKPOINT, publish_checkpoint, writing
from .interruption import StopSignals, leave
from .stage_trainer import StageTrainer


class ResumableTrainer(StageTrainer):
    """Writes a checkpoint whole or not at all, restores all of it, and at a signal saves and leaves after the step.

    Attributes:
        stopping: whether a signal came, so that the run ends with the checkpoint of this step.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.stopping = self._has_saved = False
        self._signals = StopSignals(announces=self.args.process_index == 0)

    @contextmanager
    def _with_arguments(self, **changes: Any) -> Iterator[None]:
        """Other arguments for a while, those of the run untouched."""
        run_args, self.args = self.args, copy.copy(self.args)
        for name, value in changes.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            self.args = run_args

    # Interruption ----------------------------------------------------------------------------------------------------

    def was_asked_to_stop(self) -> bool:
        """Whether Ctrl-C or SIGTERM came to any process; the same on all of them."""
        if self._signals.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _leave(self, where: str) -> NoReturn:
        received = self._signals.received or signal.SIGTERM
        if self.is_world_process_zero():
            print(
                f"Stopped by {received.name} {where}; everything is saved, and `resume_from_checkpoint=True` (in "
                "recipes `--resume_from_checkpoint true`) goes on from there.",
                flush=True,
            )
        leave(received)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer makes a step before it sees that none is left.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._has_saved = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stopping and self._has_saved:
            self._leave(f"after step {self.state.global_step} of the stage {self.stage.name}")

    # Saving ----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        folder, step = Path(self.args.output_dir), self.state.global_step
        self._keep_losses()
        written = folder / UNFINISHED_CHECKPOINT / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        advice = "; earlier ones are as they were, so make room and pass `resume_from_checkpoint=True`"
        with writing(f"The checkpoint of step {step} in {folder}", written.parent, advice):
            with self._with_arguments(output_dir=str(written.parent)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                publish_checkpoint(written, folder / written.name)
                shutil.rmtree(written.parent)
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        self._has_saved = True

    def _check_finite(self) -> None:
        """Raise before a model that is ruined takes the place of a good one."""
        for name, parameter in self.model.named_parameters():
            local = sharding.local(parameter)
            if parameter.requires_grad and not local.isfinite().all():
                raise self._diverged(self.state.global_step, f"{name} is not finite")

    def _keep_losses(self) -> None:
        """Put what was not logged yet into the checkpoint, so that a resumed run logs what this one would."""
        counters = self.counters
        counters.logged_step, counters.logged_loss = self._globalstep_last_logged, self._total_loss_scalar
        counters.loss = self.accelerator.gather(self._tr_loss).mean().item()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # As Trainer does it, but checkpoints are not packed and no pickle of the arguments is left beside the weights.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        packed = False if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else None
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, packed=packed, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The files of a run that is not sharded: accelerate's knows no optimizer of several parts.
        state = self.optimizer.state_dict()
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A method that prunes gradually is better before it has pruned.
        if not self.stage.masks.is_final(self.progress(self.state.global_step)):
            return False
        return super()._determine_best_metric(metrics, trial)

    # Loading ---------------------------------------------------------------------------------------------------------

    def restore_losses(self) -> None:
        """Go on summing the losses where the checkpoint stopped; Trainer calls this through the stage's callback."""
        counters = self.counters
        self._globalstep_last_logged, self._total_loss_scalar = counters.logged_step, counters.logged_loss
        self._tr_loss += counters.loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        # Trainer matches keys by name, which skips every tensor that transformers renames when it saves.
        loaded = type(self.model).from_pretrained(folder)
        sharding.load_full_state(self.model, loaded.state_dict())
        for name in ("sparsity", "mapped_labels", "label_mapping_state"):
            setattr(self.model.config, name, getattr(loaded.config, name))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        for name, part in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, self.lr_scheduler)):
            part.load_state_dict(torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True))
