"""`StageTrainer`: one stage as a run of transformers' Trainer, its batches, optimizers and metrics by role."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from ..data.batches import RoleBatchSampler, RoleDataset
from ..masking import sharding
from ..methods.mask_schedules import MaskSchedule, StageProgress
from ..methods.stage import Method, Stage
from ..model.modeling import PromptedSparseModel
from .arguments import VPNsTrainingArguments
from .counters import Counters
from .label_mapper import LabelMapper
from .optimizers import OptimizerByRole, build_optimizer, learning_rate_factor, weight_groups


class StageTrainer(Trainer):
    """Trains what the present stage says on batches that are prompted or plain, and evaluates both ways.

    Attributes:
        method: the method that the stage is of.
        stage: the present stage.
        stage_index: its place in the run.
        prompted_train_dataset: the rows of `train_dataset` as prompted batches show them.
        label_mapper: keeps the model's label mapping.
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
    method: Method
    stage: Stage
    stage_index: int
    prompted_train_dataset: Any
    label_mapper: LabelMapper
    _sparsity: float
    _evaluates_prompted = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.label_smoother is not None:
            # Trainer's own does not take class probabilities, as MixUp gives.
            self.label_smoother = self._smoothed_loss

    @property
    def stage_sparsity(self) -> float:
        """The sparsity that the present stage ends with."""
        return self._sparsity if self.stage.sparsity is None else self.stage.sparsity

    @property
    def counters(self) -> Counters:
        """What is counted over the present stage."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Counters))

    def progress(self, step: int) -> StageProgress:
        """Where the present stage stands after this many steps."""
        return StageProgress(step, self.state.max_steps, self.stage_sparsity)

    # What is trained -------------------------------------------------------------------------------------------------

    @property
    def _batches(self) -> str:
        """What the batches of the stage are, where it leaves that to the arguments or the model has no prompt."""
        batches = self.stage.batches
        if batches == "default" or (batches == "prompted" and self.model.prompt is None):
            return "mixed" if self.args.mix_unaugmented else "augmented"
        return batches

    def _sampler(self) -> RoleBatchSampler:
        mixing: Any = "never" if self._batches == "augmented" else self.args.prompt_mixing
        if self.stage.roles == {"prompt"}:
            # A plain batch would teach nothing.
            mixing = "always"
        return RoleBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            mixing,
            window=self.args.gradient_accumulation_steps * self.args.world_size,
            seed=(self.args.seed if self.args.data_seed is None else self.args.data_seed) + self.stage_index,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one role each, as the stage and `args.prompt_mixing` say."""
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`.")
        sampler = self._sampler()
        prompted = self.train_dataset if self.stage.augment_prompted else self.prompted_train_dataset
        dataset = RoleDataset(self.train_dataset, prompted, sampler)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Its own, so that the number of workers does not move the global random state.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimizer for each role of the stage, stepped as one."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            parts = {}
            for role, parameters in self.model.parameters_by_role().items():
                if role not in self.stage.roles or not parameters:
                    continue
                # Scores and prompt are single tensors without norms or biases: all of them decay.
                in_decay = decayed if role in ("weights", "head") else set(parameters)
                groups = weight_groups(parameters, in_decay, self.args.weight_decay)
                parts[role] = build_optimizer(
                    groups, self.args.role_settings(role, self.stage), self.args, self.args.momentum
                )
            self._optimizer_by_role = self.optimizer = OptimizerByRole(parts, self.stage.turns)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """One schedule a role, all functions of the optimizer step."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            factors = [
                learning_rate_factor(
                    self.args.role_settings(group["role"], self.stage).lr_scheduler_type,
                    self.args.get_warmup_steps(num_training_steps),
                    num_training_steps,
                    **(self.args.lr_scheduler_kwargs or {}),
                )
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward."""
        if self._batches != "prompted":
            inputs = {**inputs, "use_prompt": False}
        self._optimizer_by_role.skipped_roles = () if inputs.get("use_prompt", True) else ("prompt",)
        self.counters.count_batch(len(inputs["pixel_values"]) * self.args.world_size)
        try:
            loss = super().training_step(model, self._mixed(inputs), *args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise ValueError(
                    "BatchNorm cannot train on a batch of one image whose features are 1 x 1 pixels, and there is one "
                    f"in {len(self.train_dataset)} images in batches of {self._train_batch_size}; choose another "
                    "`per_device_train_batch_size`, of at least 2."
                ) from error
            raise
        if not loss.isfinite():
            raise self._diverged(self.state.global_step + 1, f"the loss is {loss.item()}")
        return loss

    def _mixed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch after MixUp or CutMix, one of them by chance where both are asked for."""
        asked = [(v2.MixUp, self.args.mixup_alpha), (v2.CutMix, self.args.cutmix_alpha)]
        mixers = [kind(alpha=alpha, num_classes=self.model.config.num_labels) for kind, alpha in asked if alpha > 0]
        if not mixers:
            return inputs
        # A function of the images seen, so that a resumed run mixes the same ones.
        key = [self.args.seed, self.stage_index, self.counters.images, self.args.process_index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
            images, labels = v2.RandomChoice(mixers)(inputs["pixel_values"], inputs["labels"])
        return {**inputs, "pixel_values": images, "labels": labels}

    def _smoothed_loss(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits.float(), labels, label_smoothing=self.args.label_smoothing_factor)

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        rate = "score_learning_rate" if "scores" in self.stage.roles else "learning_rate"
        return FloatingPointError(
            f"Training diverged at step {step} of the stage {self.stage.name}: {what}. Try a lower `{rate}`, "
            "`max_grad_norm=1.0`, or bf16 instead of fp16; checkpoints of earlier steps are good."
        )

    # What is logged and measured -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the sparsity, the mask entries that changed since the last log and the prompt's largest value."""
        if "train_loss" in logs:
            # Trainer's own is that of the steps since the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs:
            logs["sparsity"] = self.model.sparsity
            if type(self.stage.masks) is not MaskSchedule:
                logs["mask_flips"] = self.counters.take_flips()
            if self.model.prompt is not None and "prompt" in self.stage.roles:
                logs["prompt_max"] = max(
                    float(sharding.whole(p.detach()).abs().max()) for p in self.model.prompt.parameters()
                )
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
        outputs, metrics = [], dict[str, float]()
        for use_prompt in self._evaluated_roles():
            self._evaluates_prompted = use_prompt
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self.args.world_size > 1:
                self._correct_loss(output, metric_key_prefix)
            suffix = "_prompted" if use_prompt else ""
            outputs.append(output)
            metrics |= {f"{name}{suffix}": value for name, value in output.metrics.items()}
        return outputs[0]._replace(metrics=metrics)

    def _correct_loss(self, output: EvalLoopOutput, prefix: str) -> None:
        """Compute the loss from the predictions of each image, as one process has it.

        On several processes the last batches are filled with images shown before, which Trainer's mean loss counts.
        """
        has_own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        if output.predictions is None or output.label_ids is None or has_own_loss:
            return
        logits, labels = torch.as_tensor(output.predictions).float(), torch.as_tensor(output.label_ids)
        output.metrics[f"{prefix}_loss"] = float(F.cross_entropy(logits, labels))

    def _evaluated_roles(self) -> list[bool]:
        if not self.method.uses_prompt and self.args.eval_prompt != "with":
            return [False]
        return {"without": [False], "with": [True], "both": [False, True]}[self.args.eval_prompt]

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """One evaluation batch, with or without the prompt."""
        return super().prediction_step(model, {**inputs, "use_prompt": self._evaluates_prompted}, *args, **kwargs)
