"""`StageTrainer`: one stage as a run of transformers' Trainer.

The only module that overrides or reads private members of Trainer.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..data.batches import RoleCollator, RoleDataset, with_labels
from ..masking import sharding
from ..model.modeling import PromptedSparseModel
from ..saved_folder import writing
from .arguments import VPNsTrainingArguments
from .checkpoints import UNFINISHED_CHECKPOINT, is_at_the_end, publish_checkpoint
from .counters import Counters
from .interruption import protect_workers
from .losses import mix_images, smoothed_loss
from .optimizers import OptimizerByRole, build_optimizer, weight_groups
from .plan import StagePlan
from .reporting import loggable
from .run_callbacks import RunCallbackHandler
from .teacher import Teacher

logger = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """Train one stage on batches that are prompted or plain, resume it bit for bit, and evaluate with both.

    Attributes:
        plan: plan of the present stage.
        evaluates_prompt: whether the method evaluates with the prompt, too.
        teacher: teacher of the present stage; None: it learns from the labels alone.
        prompted_train_dataset: the rows of `train_dataset` as prompted batches show them.
    """

    # The loss is the mean over its own batch, so Trainer must divide by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: VPNsTrainingArguments
    model: PromptedSparseModel
    optimizer: Any
    lr_scheduler: Any
    label_smoother: Any
    model_wrapped: Any
    state: TrainerState
    plan: StagePlan
    teacher: Teacher | None = None
    evaluates_prompt: bool
    prompted_train_dataset: Any
    _evaluates_prompted = False

    def __init__(self, callbacks: list[TrainerCallback], **kwargs: Any):
        super().__init__(callbacks=[_RestoredLosses(self), Counters(), *callbacks], **kwargs)
        self.callback_handler: RunCallbackHandler = RunCallbackHandler(self.callback_handler, self.args)
        if type(self)._get_train_sampler is not Trainer._get_train_sampler:
            raise ValueError(
                "`_get_train_sampler` is overridden, but VPNsTrainer draws batches of one role by its own sampler; "
                "select or repeat rows of the data set instead, as `dataset.select(indices)` does."
            )
        self._forward_arguments = set(inspect.signature(type(self.model).forward).parameters)
        if self.compute_loss_func is not None:
            # It divides by the items of all accumulated batches.
            self.loss_is_scaled_for_ga = True
        if self.label_smoother is not None:
            self.label_smoother = smoothed_loss(self.args.label_smoothing_factor)

    @property
    def counters(self) -> Counters:
        """Counters of the present stage. Trainer replaces the callback when it resumes."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Counters))

    def train_stage(self, checkpoint: Path | None = None, **kwargs: Any) -> TrainOutput:
        """Train the present stage, from a checkpoint of it if one is given.

        Args:
            checkpoint: folder of a complete checkpoint.
            kwargs: passed to [`~transformers.Trainer.train`].
        """
        callbacks = [make(self.plan) for make in self.plan.stage.callbacks]
        for callback in callbacks:
            self.add_callback(callback)
        try:
            if checkpoint is not None and is_at_the_end(checkpoint):
                return self._restore_end(checkpoint)
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            for callback in callbacks:
                self.remove_callback(callback)

    def _restore_end(self, checkpoint: Path) -> TrainOutput:
        """Restore a stage whose last step is in the checkpoint. Trainer would train one more step."""
        logger.warning("No step of the stage %s is left after %s, so none is trained.", self.plan.name, checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.counters.restore(self.state.stateful_callbacks[Counters.__name__]["args"])
        self._load_weights(str(checkpoint))
        self._total_loss_scalar = self.counters.logged_loss + self.counters.loss
        metrics = {"train_runtime": 0.0, "total_flos": self.state.total_flos, "train_loss": 0.0}
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    @contextmanager
    def using(self, args: VPNsTrainingArguments) -> Iterator[None]:
        """Use other arguments inside a `with` block; those of the run stay as they are."""
        run_args, self.args = self.args, args
        try:
            yield
        finally:
            self.args = run_args

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of one role each, as the stage and `args.prompt_mixing` say."""
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`.")
        sampler = self.plan.sampler(len(self.train_dataset))
        augments = self.plan.batches == "prompted_augmented"
        prompted = self.train_dataset if augments else self.prompted_train_dataset
        dataset = RoleDataset(self.train_dataset, prompted, sampler)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=RoleCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            # Its own, so that the number of workers does not move the global random state.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        loader = self.accelerator.prepare(loader)
        protect_workers(loader)
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create one optimizer for each role of the stage, stepped as one."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            parts = {}
            for role, parameters in self.model.parameters_by_role().items():
                if role not in self.plan.stage.roles or not parameters:
                    continue
                # Scores and prompt are single tensors without norms or biases: all of them decay.
                in_decay = decayed if role in ("weights", "head") else set(parameters)
                groups = weight_groups(parameters, in_decay, self.args.weight_decay)
                settings = self.plan.role_settings(role, self.counters.score_learning_rate)
                parts[role] = build_optimizer(groups, settings, self.args, self.args.momentum)
            self._optimizer_by_role = self.optimizer = OptimizerByRole(parts, self.plan.stage.turns)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create one schedule per role, all functions of the optimizer step."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            roles = [group["role"] for group in optimizer.param_groups]
            factors = [self.plan.learning_rate_factor(role, num_training_steps) for role in roles]
            self.lr_scheduler = LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch forward and backward."""
        if not self.plan.batches.startswith("prompted"):
            inputs = {**inputs, "use_prompt": False}
        elif "use_prompt" not in inputs:
            raise ValueError(
                "A training batch does not say whether it is prompted: expected `use_prompt` in the batches of "
                "`get_train_dataloader`; leave that method as it is, or take its batches from a RoleBatchSampler."
            )
        self._optimizer_by_role.skipped_roles = () if inputs.get("use_prompt", True) else ("prompt",)
        self.counters.count_batch(len(inputs["pixel_values"]) * self.args.world_size)
        try:
            loss = super().training_step(model, self._mixed(inputs), *args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise ValueError(
                    "BatchNorm cannot train on a batch of one image whose features are 1 x 1 pixels, and there is one "
                    f"in {len(self.train_dataset)} images in batches of {self.args.train_batch_size}; choose another "
                    "`per_device_train_batch_size`, of at least 2."
                ) from error
            raise
        if not loss.isfinite():
            raise self._diverged(self.state.global_step + 1, f"the loss is {loss.item()}")
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch: `compute_loss_func`, smoothed or the model's own, with the teacher's."""
        known = {name: value for name, value in inputs.items() if name in self._forward_arguments}
        loss, outputs = super().compute_loss(model, known, True, num_items_in_batch)
        if self.teacher is not None and model.training:
            self.counters.teacher_images += len(known["pixel_values"]) * self.args.world_size
            with self.accelerator.autocast():
                loss = self.teacher.mixed_loss(loss, outputs.logits, known["pixel_values"])
        return (loss, outputs) if return_outputs else loss

    def _mixed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # A function of the images seen, so that a resumed run mixes the same ones.
        key = [self.args.seed, self.plan.index, self.counters.images, self.args.process_index]
        return mix_images(inputs, self.args.mixup_alpha, self.args.cutmix_alpha, self.model.config.num_labels, key)

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        rate = "score_learning_rate" if "scores" in self.plan.stage.roles else "learning_rate"
        return FloatingPointError(
            f"Training diverged at step {step} of the stage {self.plan.stage.name}: {what}. Try a lower `{rate}`, "
            "`max_grad_norm=1.0`, or bf16 instead of fp16; checkpoints of earlier steps are good."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add the sparsity, the mask entries changed since the last log and the prompt's largest value."""
        if "train_loss" in logs:
            # Trainer's own is that of the steps since the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs:
            logs["sparsity"] = self.model.sparsity
            if self.counters.score_learning_rate:
                logs["score_learning_rate"] = self.counters.score_learning_rate
            if self.plan.stage.masks.moves:
                logs["mask_flips"] = self.counters.take_flips()
            if self.model.prompt is not None and "prompt" in self.plan.stage.roles:
                logs["prompt_max"] = max(
                    float(sharding.whole(p.detach()).abs().max()) for p in self.model.prompt.parameters()
                )
        logs.update(loggable(logs))  # in place, because callers read it
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate without and with the prompt, as `args.eval_prompt` says; prompted metrics end in `_prompted`.

        Predictions are those of the first pass: without the prompt, unless `args.eval_prompt` is `"with"`.
        """
        if self.is_fsdp_enabled and not self.accelerator._models:
            # accelerate shards a model along with its optimizer only, so one that was not trained is evaluated whole.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        protect_workers(dataloader)
        outputs, metrics = [], dict[str, float]()
        for use_prompt in self._evaluated_roles():
            self._evaluates_prompted = use_prompt
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            # Depends on what was trained before in this process, and resumed runs must not.
            output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
            if self.args.world_size > 1:
                self._correct_loss(output, metric_key_prefix)
            outputs.append(output)
            metrics |= {name + "_prompted" * use_prompt: value for name, value in output.metrics.items()}
        return outputs[0]._replace(metrics=metrics)

    def _correct_loss(self, output: EvalLoopOutput, prefix: str) -> None:
        """Compute the loss from the predictions of each image, as one process does.

        On several processes the last batches are filled with images shown before, which Trainer's mean loss counts.
        """
        has_own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        has_own_predictions = self.preprocess_logits_for_metrics is not None
        if output.predictions is None or output.label_ids is None or has_own_loss or has_own_predictions:
            return
        logits, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
        output.metrics[f"{prefix}_loss"] = float(self.model.loss(logits, labels))

    def _evaluated_roles(self) -> list[bool]:
        if not self.evaluates_prompt and self.args.eval_prompt != "with":
            return [False]
        return {"without": [False], "with": [True], "both": [False, True]}[self.args.eval_prompt]

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Evaluate one batch, with or without the prompt."""
        inputs = with_labels(inputs) | {"use_prompt": self._evaluates_prompted}
        if "labels" not in inputs:
            inputs = {name: value for name, value in inputs.items() if name in self._forward_arguments}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        folder, step = Path(self.args.output_dir), self.state.global_step
        self._save_losses()
        written = folder / UNFINISHED_CHECKPOINT / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        advice = "; earlier ones are as they were, so make room and pass `resume_from_checkpoint=True`"
        with writing(f"The checkpoint of step {step} in {folder}", written.parent, advice):
            args = copy.copy(self.args)
            # Checkpoints are pushed once they are complete, by the callback `PushCheckpoints`.
            args.output_dir, args.push_to_hub = str(written.parent), False
            with self.using(args):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                publish_checkpoint(written, folder / written.name)
                shutil.rmtree(written.parent)
        if self.args.should_save:
            # By step: a clock that was set back must not make the newest the oldest.
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        """Raise before a model that is not finite replaces a good checkpoint."""
        for name, parameter in self.model.named_parameters():
            local = sharding.local(parameter)
            if parameter.requires_grad and not local.isfinite().all():
                raise self._diverged(self.state.global_step, f"{name} is not finite")

    def _save_losses(self) -> None:
        """Save the losses that are not logged yet, so that a resumed run logs the same values."""
        counters = self.counters
        counters.logged_step, counters.logged_loss = self._globalstep_last_logged, self._total_loss_scalar
        counters.loss = self.accelerator.gather(self._tr_loss).mean().item()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # As Trainer does it, but checkpoints are not packed and no pickle of the arguments is left beside the weights.
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        packed = False if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else None
        model.save_pretrained(folder, packed=packed, state_dict=state_dict)
        if self.processing_class not in (None, model.image_processor):
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
        progress = self.plan.progress(self.state.global_step, self.state.max_steps)
        if not self.plan.stage.masks.is_final(progress):
            return False
        return super()._determine_best_metric(metrics, trial)

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


class _RestoredLosses(TrainerCallback):
    """Resume the sums of the losses where the checkpoint stopped; Trainer starts them at zero."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, counters = self.trainer, self.trainer.counters
        trainer._globalstep_last_logged, trainer._total_loss_scalar = counters.logged_step, counters.logged_loss
        trainer._tr_loss += counters.loss
