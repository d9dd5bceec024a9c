"""`VPNsTrainer`: runs the stages of a pruning method, each as one run of transformers' Trainer."""

from __future__ import annotations

import collections
import copy
import functools
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2
from transformers import (
    BaseImageProcessor,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    TrainOutput,
    rotate_checkpoints,
)
from transformers.utils.hub import PushInProgress

from . import sharding
from .batches import RoleBatchSampler, RoleDataset, collate_images
from .consistency import ConsistencyCheck
from .hub import BEGIN, CARD_NAME, clear_errors, merge_cards, published_files, push_folder
from .interruption import StopSignals, leave
from .label_mapping import count_predictions, map_labels
from .mask_schedules import MaskSchedule, Moment, keep_all
from .methods import Method, Stage, get_method
from .metrics import compute_metrics
from .model_card import StageSettings
from .modeling import PromptedSparseModel
from .optimizers import OptimizerByRole, build_optimizer, weight_groups
from .preparations import Rewind, StageStart
from .run_record import (
    FIRST_STATE_NAME,
    MODEL_FOLDER,
    UNFINISHED_CHECKPOINT,
    Cost,
    Counters,
    FinishedStage,
    RunRecord,
    damage,
    last_complete_checkpoint,
    publish_checkpoint,
    publish_folder,
    writing,
)
from .schedules import learning_rate_factor
from .training_args import VPNsTrainingArguments

logger = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """What a stage does around every optimizer step: prompts of noise, masks that move, zeros that stay.

    Args:
        trainer: whose stage it is.
    """

    def __init__(self, trainer: VPNsTrainer):
        self.trainer = trainer
        self._masks: dict[str, Tensor] | None = None
        self._started = 0.0
        self._saves_at_epoch_end = False

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saves_at_epoch_end = False
        self.trainer.restore_losses()
        self.trainer.model.shard_masks()

    def on_epoch_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An epoch that is resumed half-way has its label mapping in the checkpoint.
        if float(state.epoch or 0).is_integer():
            with self.trainer.counters.measuring(self.trainer.model):
                self.trainer.refresh_label_mapping()

    def on_step_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        model, stage = self.trainer.model, self.trainer.stage
        if stage.prompt_noise:
            self.trainer.fill_prompt_with_noise(state.global_step)
        if stage.masks.needs_dense_gradients(self.trainer.moment(state.global_step + 1)):
            # Pruned weights are zero, so opening their masks changes no output and lets their gradients through.
            self._masks = {name: mask.clone() for name, mask in model.masks().items()}
            keep_all(model)

    def on_pre_optimizer_step(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._masks is None:
            return
        model = self.trainer.model
        model.apply_masks(self._masks)
        self._masks = None
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.prunable_weights().items()
        }
        moment = self.trainer.moment(state.global_step + 1)
        self._changed(self.trainer.stage.masks.advance(model, moment, gradients))
        # The update takes the place of the optimizer step.
        model.zero_grad(set_to_none=True)

    def on_optimizer_step(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        moment = self.trainer.moment(state.global_step + 1)
        self._changed(self.trainer.stage.masks.advance(self.trainer.model, moment))

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.counters.seconds += time.perf_counter() - self._started
        self.trainer.stopping = self.trainer.was_asked_to_stop()
        if self.trainer.stopping:
            control.should_save = True
        if state.global_step >= state.max_steps or float(state.epoch).is_integer():
            # What the end of the epoch logs and evaluates belongs into the checkpoint.
            self._saves_at_epoch_end, control.should_save = control.should_save, False

    def on_epoch_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_save or self._saves_at_epoch_end
        self._saves_at_epoch_end = False

    def _changed(self, flips: int) -> None:
        self.trainer.counters.flips += flips
        model = self.trainer.model
        if flips and model.config.state == "frozen":
            weights, kept = model.prunable_weights(), self.trainer.stage.masks.kept_state(model)
            # Momentum of a pruned weight would move it when it comes back.
            self.trainer.optimizer.optimizer.mask_state([(weights[name], mask) for name, mask in kept.items()])


def _check_model(name: str, method: Method, model: PromptedSparseModel) -> None:
    """Raise unless the model was built as the method needs it."""
    config = model.config.to_dict()
    if method.needs_pruned and model.config.state != "frozen":
        raise ValueError(f"`method={name!r}` needs a model that is pruned already; load one, or prune it first.")
    if wrong := {key: value for key, value in method.backbone.items() if config[key] != value}:
        arguments = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(f"`method={name!r}` needs a model that was built by `from_backbone(..., {arguments})`.")


@contextmanager
def _training_goes_on() -> Iterator[None]:
    """Warn of what goes wrong with a push of a checkpoint instead of ending the training by it."""
    try:
        yield
    except Exception as error:
        logger.warning("%s Training goes on, and the next save is pushed again.", error)


def _memory_format(model: PromptedSparseModel) -> torch.memory_format:
    """channels_last where the model is in it; else the one that each tensor has."""
    is_last = any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in model.prunable_weights().values()
    )
    return torch.channels_last if is_last else torch.preserve_format


class VPNsTrainer(Trainer):
    """Prune a [`PromptedSparseModel`] by the method that `args.method` names.

    `train()` runs the stages of the method one after the other on the same model. Checkpoints go to
    `output_dir/<index>-<stage>/checkpoint-N`; `train(resume_from_checkpoint=True)` goes on in whichever stage was
    running. Evaluation reports `eval_accuracy` and, for methods with a prompt, `eval_accuracy_prompted`, as
    `args.eval_prompt` says.

    Args:
        model: the model, in the search state, as `from_backbone` gives it.
        args: see [`VPNsTrainingArguments`].
        train_dataset: map-style, of dictionaries with `pixel_values` [3, height, width] and `labels`; usually
            augmented.
        prompted_train_dataset: the same rows as prompted batches show them, usually without augmentation (as in the
            released code); None: `train_dataset`.
        eval_dataset: the validation data.
        processing_class: the image processor, saved with the model.
        kwargs: the other arguments of [`~transformers.Trainer`]. Without `compute_metrics` those of
            `args.metrics` are computed.

    Raises:
        ValueError: the model does not fit the method, or the data cannot be drawn by index.
    """

    # The loss is the mean over its own batch, so Trainer must divide by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: VPNsTrainingArguments
    model: PromptedSparseModel
    optimizer: Any
    lr_scheduler: Any
    push_in_progress: PushInProgress | None
    label_smoother: Any
    state: TrainerState

    def __init__(
        self,
        model: PromptedSparseModel,
        args: VPNsTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        prompted_train_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, PromptedSparseModel):
            raise ValueError(
                f"VPNsTrainer trains a PromptedSparseModel, not a {type(model).__name__}; wrap it with "
                "`PromptedSparseModel.from_backbone(model)`."
            )
        if "model_init" in kwargs:
            raise ValueError(
                "VPNsTrainer takes a `model`, not `model_init`: every stage goes on with the model of the one before."
            )
        if isinstance(processing_class, BaseImageProcessor):
            model.image_processor = processing_class
        self._hub = HfApi()
        self.method = get_method(args.method)
        if model.prompt is None and (self.method.uses_prompt or args.eval_prompt == "with"):
            raise ValueError(
                f"`method={args.method!r}` with `eval_prompt={args.eval_prompt!r}` needs a prompt; build the model "
                "with `prompt='pad'`, or use `method='hydra'`."
            )
        for dataset in (train_dataset, prompted_train_dataset):
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    "VPNsTrainer draws images by index; got a streaming data set. Load it with "
                    "`load_transfer_dataset(..., stream_images=n)`, or keep what you need of it with "
                    "`Dataset.from_generator`."
                )
        self.prompted_train_dataset = train_dataset if prompted_train_dataset is None else prompted_train_dataset
        self._sparsity = model.config.sparsity if args.sparsity is None else args.sparsity
        self._scope = model.config.scope
        _check_model(args.method, self.method, model)
        self.stages = self.method.stages_for(model.config.new_head, self._sparsity)
        if args.fp16 and any(stage.implicit_gradient or stage.masks.uses_dense_gradients for stage in self.stages):
            # The loss scale would enter the implicit gradient squared, and a step without gradients cannot be scaled.
            raise ValueError(f"`method={args.method!r}` does not work with fp16; use bf16 or float32.")
        if args.fp16 and args.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, and this run is on the CPU; use bf16 or float32.")
        self.stage, self.stage_index = self.stages[0], 0
        self._evaluates_prompted = False
        self.stopping = self._has_saved = False
        self._signals = StopSignals(announces=args.process_index == 0)
        if 0 < args.total_max_steps < len(self._budgeted):
            raise ValueError(
                f"`total_max_steps` is {args.total_max_steps}, but `method={args.method!r}` has {len(self._budgeted)} "
                "stages that train at this sparsity; give it at least one step for each."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", collate_images),
            compute_metrics=kwargs.pop("compute_metrics", partial(compute_metrics, names=args.reported_metrics)),
            callbacks=[StageCallback(self), Counters(), *(callbacks or [])],
            **kwargs,
        )
        self._check_distributed()
        if args.world_size > 1 and args.consistency_check_steps:
            self.add_callback(ConsistencyCheck(self.accelerator, args.consistency_check_steps))

    def _check_distributed(self) -> None:
        """Raise if this method cannot run as the model is spread over the processes."""
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if not self.accelerator.is_fsdp2 or "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                raise ValueError(
                    "Under FSDP, VPNsTrainer needs `fsdp_version: 2` (version 1 flattens the weights, so that they "
                    "cannot be masked) and `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
                    "`recipes/accelerate_configs/fsdp2.yaml`."
                )
            # Every stage starts from the whole model, which may score or map labels before it is sharded.
            self.model.to(self.args.device)
        schedules = [stage.masks for stage in self.stages]
        if self.is_fsdp_enabled and any(schedule.uses_dense_gradients for schedule in schedules):
            raise ValueError(
                f"`method={self.args.method!r}` needs whole gradients of pruned weights, which FSDP does not keep; "
                "run it with DDP."
            )
        if self.is_deepspeed_enabled and any(schedule.changes_frozen_masks for schedule in schedules):
            raise ValueError(
                f"`method={self.args.method!r}` changes masks and momentum while weights train, and DeepSpeed keeps "
                "momentum where it cannot be reached; run it with DDP."
            )
        if self.label_smoother is not None:
            # Trainer's own does not take class probabilities, as MixUp gives.
            self.label_smoother = self._smoothed_loss

    # Stages ----------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Run every stage.

        Args:
            resume_from_checkpoint: True: go on where the run in `args.output_dir` stopped (from the start if it never
                began). A path `<output_dir>/<index>-<stage>/checkpoint-N`: go on from there.
            kwargs: passed to [`~transformers.Trainer.train`] for every stage.

        Returns:
            Steps of all stages together, the last stage's training loss, and every stage's metrics as
            `<stage>_<name>`.

        Raises:
            ValueError: `output_dir` holds another run, or the checkpoint is none of it.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
            FloatingPointError: the loss is no finite number.
            OSError: something could not be written, as on a full disk.
        """
        stages = self.stages
        record = RunRecord.load(Path(self.args.output_dir), self._settings)
        checkpoint = self._find_checkpoint(record, stages, resume_from_checkpoint)
        if len(record.finished) == len(stages):
            logger.warning("Every stage of the run in %s has ended, so nothing is trained.", record.folder)
        if record.finished:
            self._become(record.stage_folder(len(record.finished) - 1, record.finished[-1].name) / MODEL_FOLDER)
        if self.args.should_save:
            record.save()
            record.remove_leftovers()
        loss, metrics = math.nan, dict[str, float]()
        for index, stage in enumerate(stages):
            if index < len(record.finished):
                continue
            output = self._train_stage(index, stage, stages, record, checkpoint, **kwargs)
            checkpoint, loss = None, output.metrics.get("train_loss", math.nan)
            metrics |= {f"{stage.name}_{name}": value for name, value in output.metrics.items()}
        return TrainOutput(sum(stage.steps for stage in record.finished), loss, metrics)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"method": self.args.method, "sparsity": self._sparsity, "seed": self.args.seed}

    def _find_checkpoint(
        self, record: RunRecord, stages: tuple[Stage, ...], resume_from_checkpoint: str | bool | None
    ) -> Path | None:
        """Where to resume; drops from the record what comes after that checkpoint."""
        if str(resume_from_checkpoint).lower() in ("true", "false"):
            # Flags and YAML files give strings.
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if not resume_from_checkpoint:
            if record.finished or any(record.folder.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")):
                raise ValueError(
                    f"{record.folder} holds an earlier run; pass `resume_from_checkpoint=True` to go on with it, or "
                    "choose another `output_dir`."
                )
            return None
        if resume_from_checkpoint is True:
            index = len(record.finished)
            return (
                last_complete_checkpoint(record.stage_folder(index, stages[index].name))
                if index < len(stages)
                else None
            )
        checkpoint = Path(resume_from_checkpoint).resolve()
        folders = [record.stage_folder(index, stage.name).resolve() for index, stage in enumerate(stages)]
        if checkpoint.parent not in folders[: len(record.finished) + 1] or not checkpoint.is_dir():
            raise ValueError(
                f"{checkpoint} is no checkpoint of the run in {record.folder}; expected {folders[0]}/checkpoint-N, "
                "or `True` for the last one."
            )
        if wrong := damage(checkpoint):
            raise ValueError(f"{checkpoint} is half-written: {wrong}; pass `True` for the last complete checkpoint.")
        record.finished = record.finished[: folders.index(checkpoint.parent)]
        return checkpoint

    def _train_stage(
        self,
        index: int,
        stage: Stage,
        stages: tuple[Stage, ...],
        record: RunRecord,
        checkpoint: Path | None,
        **kwargs: Any,
    ) -> TrainOutput:
        folder = record.stage_folder(index, stage.name)
        if checkpoint is None and self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        # What a stage draws must not depend on whether the run was interrupted before it.
        set_seed(self.args.seed + index)
        self.stage, self.stage_index = stage, index
        self.optimizer, self.lr_scheduler = None, None
        self._enter(stage, record, checkpoint)
        self.model_wrapped = self.model
        # Masks follow from the scores on every process, so DDP need not send them before every forward.
        masks = {id(mask) for mask in self.model.masks().values()}
        self.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in self.model.named_buffers() if id(buffer) in masks
        ]
        with self._stage_arguments(stage, folder, is_last=stage is stages[-1]), self._signals:
            output = self._run(stage, checkpoint, **kwargs)
            self.model = self.model_wrapped = self._unwrapped()
            # States change between stages, which a sharded model cannot follow.
            self.model.gather()
            self.model.eval_backbone = False
            cost = self._cost()
            if stage is stages[-1] and self.model.config.state == "search":
                self.refresh_label_mapping(final=True)
                self.model.freeze_masks()
            evaluation = {} if self.eval_dataset is None else self.evaluate()
            record.finished.append(FinishedStage(stage.name, self.state.global_step, evaluation, cost))
            self._keep(folder, record)
            self._announce(index, stage, stages, evaluation)
            if self.was_asked_to_stop():
                self._leave(f"after the stage {stage.name}")
        return output

    def _run(self, stage: Stage, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        if stage.roles:
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            if checkpoint and self.state.global_step == self._initial_global_step:
                logger.warning("No step of the stage %s is left after %s, so none is trained.", stage.name, checkpoint)
            return output
        self.state = TrainerState()
        return TrainOutput(0, math.nan, {})

    def _cost(self) -> Cost:
        counted = {
            name: vars(self.counters)[name] for name in ("images", "forward_images", "backward_images", "seconds")
        }
        by_role = self.model.parameters_by_role()
        trained = sum(parameter.numel() for role in self.stage.roles for parameter in by_role[role].values())
        if "weights" in self.stage.roles:
            trained -= sum(int((~mask).sum()) for mask in self.model.masks().values())
        return Cost(**counted, trained_weights=trained)

    def _unwrapped(self) -> PromptedSparseModel:
        """The model without what accelerate put around it: autocast, torch.compile, DistributedDataParallel."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)

    @property
    def stage_sparsity(self) -> float:
        """The sparsity that the present stage ends with."""
        return self._sparsity if self.stage.sparsity is None else self.stage.sparsity

    @property
    def counters(self) -> Counters:
        """What is counted over the present stage."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Counters))

    def moment(self, step: int) -> Moment:
        """Where the present stage stands after this many steps."""
        return Moment(step, self.state.max_steps, self.stage_sparsity)

    def _enter(self, stage: Stage, record: RunRecord, checkpoint: Path | None) -> None:
        """Bring the model into the stage's state and make the stage's roles trainable."""
        self.counters.reset()
        self.model.config.scope = stage.scope or self._scope
        with self.counters.measuring(self.model):
            self._begin_label_mapping(checkpoint)
            if stage.state != "search":
                self.refresh_label_mapping(final=True)
        if checkpoint is None:
            # A checkpoint brings what these would do.
            self._prepare(stage, record)
        self._change_state(stage)
        self.model.eval_backbone = stage.eval_backbone
        self.model.train_only(*stage.roles)

    def _prepare(self, stage: Stage, record: RunRecord) -> None:
        first_state = record.folder / FIRST_STATE_NAME
        is_first = stage is next((other for other in self.stages if other.length != "warm_up"), None)
        if is_first and any(isinstance(prepare, Rewind) for other in self.stages for prepare in other.before):
            self._keep_first_state(first_state)
        start = StageStart(
            self.model,
            self.stage_sparsity,
            self.args.seed,
            self.calibration_batches,
            lambda: load_file(first_state, device=str(self.model.device)),
        )
        with self.counters.measuring(self.model):
            for prepare in stage.before:
                prepare(start)

    def _keep_first_state(self, path: Path) -> None:
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            state = self.model.backbone_state()
            save_file({name: tensor.detach().clone() for name, tensor in state.items()}, temporary)
            os.replace(temporary, path)
        self.accelerator.wait_for_everyone()

    def _change_state(self, stage: Stage) -> None:
        model, state = self.model, self.model.config.state
        if stage.state != "frozen" and state == "frozen":
            raise ValueError(
                f"`method={self.args.method!r}` starts from an unpruned model, and this one is pruned already; wrap "
                "the pretrained backbone with `PromptedSparseModel.from_backbone`."
            )
        if stage.state == "frozen":
            stage.masks.begin_frozen(model)
        elif state == "search" and (stage.state == "dense" or model.config.signed_scores != stage.signed_scores):
            model.detach_scores()
        if stage.state == "search":
            if model.config.state == "dense":
                model.attach_scores(signed=stage.signed_scores)
            model.set_implicit_gradient(stage.implicit_gradient)
            stage.masks.begin_search(model, self.stage_sparsity)

    @torch.no_grad()
    def fill_prompt_with_noise(self, step: int) -> None:
        """Draw every parameter of the prompt from N(0, `args.prompt_noise` ** 2), by seed, stage and step alone."""
        (seed,) = np.random.SeedSequence([self.args.seed, self.stage_index, step]).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        for parameter in self.model.parameters_by_role()["prompt"].values():
            noise = self.args.prompt_noise * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(sharding.split_like(noise, parameter))

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """Training images to score with, as prompted batches show them (usually not augmented).

        Balanced over the classes: `args.calibration_images_per_class` of each (or all that there are), in batches of
        sizes as equal as they can be. Images are read in random order until there are enough of every class.
        """
        dataset, wanted = self.prompted_train_dataset, self.args.calibration_images_per_class
        generator = torch.Generator().manual_seed(self.args.seed)
        seen, chosen = collections.Counter[int](), []
        for index in torch.randperm(len(dataset), generator=generator).tolist():
            example = dataset[index]
            labels = self.data_collator([example])["labels"]
            label = int(labels.argmax(-1) if labels.is_floating_point() else labels)
            if seen[label] < wanted:
                seen[label] += 1
                chosen.append(example)
            if len(chosen) == wanted * self.model.config.num_labels:
                break
        parts = np.array_split(np.arange(len(chosen)), math.ceil(len(chosen) / self.args.per_device_eval_batch_size))
        return [self.data_collator([chosen[index] for index in part]) for part in parts]

    @contextmanager
    def _stage_arguments(self, stage: Stage, folder: Path, is_last: bool) -> Iterator[None]:
        run_args, args = self.args, copy.copy(self.args)
        args.output_dir = str(folder)
        args.num_train_epochs, args.max_steps = run_args.stage_length(stage)
        if run_args.total_max_steps > 0 and stage in self._budgeted:
            args.max_steps = self._share_of_budget(stage)
        if stage.length == "warm_up" and run_args.max_steps > 0:
            args.max_steps = min(run_args.max_steps, self._steps(args.num_train_epochs))
        args.load_best_model_at_end = run_args.load_best_model_at_end and is_last
        self.args = args
        try:
            yield
        finally:
            self.args = run_args

    @property
    def _budgeted(self) -> list[Stage]:
        """The stages that `args.total_max_steps` is shared out over."""
        return [stage for stage in self.stages if stage.length != "warm_up" and stage.roles]

    def _share_of_budget(self, stage: Stage) -> int:
        budget, count, index = self.args.total_max_steps, len(self._budgeted), self._budgeted.index(stage)
        return budget * (index + 1) // count - budget * index // count

    def _steps(self, epochs: float) -> int:
        batches_a_step = self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(epochs * math.ceil(len(self._sampler()) / batches_a_step))

    def _keep(self, folder: Path, record: RunRecord) -> None:
        """Save the stage's model and log, then record that it ended."""
        if self.args.should_save:
            temporary = folder / f"{MODEL_FOLDER}.tmp"
            advice = "; its checkpoints are as they were, so make room and pass `resume_from_checkpoint=True`"
            with writing(f"The model of the stage {self.stage.name}, {folder / MODEL_FOLDER},", temporary, advice):
                self.model.save_pretrained(temporary, packed=False)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                publish_folder(temporary, folder / MODEL_FOLDER)
            record.save()
        self.accelerator.wait_for_everyone()

    def _announce(self, index: int, stage: Stage, stages: tuple[Stage, ...], evaluation: dict[str, float]) -> None:
        if not self.is_world_process_zero():
            return
        accuracies = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.2%}"
            for name, value in evaluation.items()
            if name.startswith("eval_accuracy")
        ]
        facts = [f"{self.state.global_step} steps", f"density {1 - self.model.sparsity:.2%}", *accuracies]
        print(f"[stage {index + 1} of {len(stages)}] {stage.name}: {', '.join(facts)}", flush=True)

    @property
    def finished_stages(self) -> list[FinishedStage]:
        """The stages of the run in `args.output_dir` that have ended."""
        return RunRecord.load(Path(self.args.output_dir), self._settings).finished

    def stage_settings(self) -> list[StageSettings]:
        """How the finished stages trained, for the model card."""
        stages = {stage.name: stage for stage in self.stages}
        return [self._settings_of(stages[finished.name], finished.steps) for finished in self.finished_stages]

    def planned_stages(self) -> list[StageSettings]:
        """How the stages will train, before any of them has run."""
        present = self.stage, self.stage_index
        planned = []
        for index, stage in enumerate(self.stages):
            self.stage, self.stage_index = stage, index
            with self._stage_arguments(stage, Path(self.args.output_dir), is_last=False):
                steps = self.args.max_steps if self.args.max_steps > 0 else self._steps(self.args.num_train_epochs)
            planned.append(self._settings_of(stage, steps if stage.roles else 0))
        self.stage, self.stage_index = present
        return planned

    def _settings_of(self, stage: Stage, steps: int) -> StageSettings:
        present = {role for role, parameters in self.model.parameters_by_role().items() if parameters} | {"scores"}
        settings = {role: self.args.role_settings(role, stage) for role in sorted(stage.roles & present)}
        optimizers = {role: (chosen.optim, chosen.learning_rate) for role, chosen in settings.items()}
        return StageSettings(stage.name, steps, optimizers)

    def load_stage(self, name: str) -> PromptedSparseModel:
        """The model as a finished stage left it.

        Raises:
            ValueError: no stage of that name has ended.
        """
        return PromptedSparseModel.from_pretrained(self._folder_of(name) / MODEL_FOLDER).to(self.args.device)

    def logs(self) -> dict[str, list[dict[str, float]]]:
        """What every finished stage logged, by stage name."""
        names = [stage.name for stage in self.finished_stages]
        return {
            name: TrainerState.load_from_json(str(self._folder_of(name) / TRAINER_STATE_NAME)).log_history
            for name in names
        }

    def _folder_of(self, name: str) -> Path:
        names = [stage.name for stage in self.finished_stages]
        if name not in names:
            raise ValueError(
                f"No stage {name!r} has ended in {self.args.output_dir}; finished: {', '.join(names) or 'none'}."
            )
        return RunRecord(Path(self.args.output_dir), self._settings, []).stage_folder(names.index(name), name)

    def _become(self, folder: Path) -> None:
        loaded = type(self.model).from_pretrained(folder)
        # Copied, because tensors that are mapped from the file lie at other addresses, where kernels may sum in
        # another order.
        self.model.become(copy.deepcopy(loaded).to(self.args.device, memory_format=_memory_format(self.model)))

    def _begin_label_mapping(self, checkpoint: Path | None) -> None:
        """Set the label mapping: as the checkpoint has it, else from the dense model's predictions."""
        config = self.model.config
        if config.label_mapping is None or config.label_mapping_state != "unset":
            return
        if checkpoint is not None:
            saved = PromptedSparseModel.from_pretrained(checkpoint)
            mapping = saved.config.mapped_labels if saved.label_matrix is None else saved.label_matrix
            self.model.set_label_mapping(mapping, final=saved.config.label_mapping_state == "final")
            return
        if config.state == "search":
            # The predictions are those of the dense model; the stage selects its mask later.
            self.model.set_sparsity(0.0)
        self.model.set_label_mapping(self._find_label_mapping(), final=config.label_mapping != "iterative")

    def refresh_label_mapping(self, final: bool = False) -> None:
        """Find an iterative label mapping again, from the predictions of the model as it is masked now, unprompted.

        Args:
            final: this is the mapping that stays.
        """
        if self.model.config.label_mapping_state == "open":
            self.model.set_label_mapping(self._find_label_mapping(), final=final)

    def _find_label_mapping(self) -> Tensor:
        config = self.model.config
        # Neither the loader nor a random mapping may move the global random state, which resuming restores later.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            counts = count_predictions(self._predicted_pairs(), config.backbone_config.num_labels, config.num_labels)
            return map_labels(counts, str(config.label_mapping))

    @torch.no_grad()
    def _predicted_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.model.eval()
        for batch in self.get_eval_dataloader(self.prompted_train_dataset):
            predicted = self.model.head_logits(batch["pixel_values"]).argmax(-1)
            labels = batch["labels"].argmax(-1) if batch["labels"].is_floating_point() else batch["labels"]
            yield self.accelerator.gather_for_metrics((predicted, labels))

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        folder, step = Path(self.args.output_dir), self.state.global_step
        self._keep_losses()
        written = folder / UNFINISHED_CHECKPOINT / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        advice = "; earlier ones are as they were, so make room and pass `resume_from_checkpoint=True`"
        with writing(f"The checkpoint of step {step} in {folder}", written.parent, advice):
            with self._output_to(written.parent):
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

    @contextmanager
    def _output_to(self, folder: Path) -> Iterator[None]:
        run_args, self.args = self.args, copy.copy(self.args)
        self.args.output_dir = str(folder)
        try:
            yield
        finally:
            self.args = run_args

    def _keep_losses(self) -> None:
        """Put what was not logged yet into the checkpoint, so that a resumed run logs what this one would."""
        counters = self.counters
        counters.logged_step, counters.logged_loss = self._globalstep_last_logged, self._total_loss_scalar
        counters.loss = self.accelerator.gather(self._tr_loss).mean().item()

    def restore_losses(self) -> None:
        """Go on summing the losses where the checkpoint stopped; Trainer calls this through the stage's callback."""
        counters = self.counters
        self._globalstep_last_logged, self._total_loss_scalar = counters.logged_step, counters.logged_loss
        self._tr_loss += counters.loss

    def _check_finite(self) -> None:
        """Raise before a model that is ruined takes the place of a good one."""
        for name, parameter in self.model.named_parameters():
            local = sharding.local(parameter)
            if parameter.requires_grad and not local.isfinite().all():
                raise self._diverged(self.state.global_step, f"{name} is not finite")

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        rate = "score_learning_rate" if "scores" in self.stage.roles else "learning_rate"
        return FloatingPointError(
            f"Training diverged at step {step} of the stage {self.stage.name}: {what}. Try a lower `{rate}`, "
            "`max_grad_norm=1.0`, or bf16 instead of fp16; checkpoints of earlier steps are good."
        )

    # What a stage trains ---------------------------------------------------------------------------------------------

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

    # What is logged and measured -------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward."""
        if self._batches != "prompted":
            inputs = {**inputs, "use_prompt": False}
        self._optimizer_by_role.resting = () if inputs.get("use_prompt", True) else ("prompt",)
        images = len(inputs["pixel_values"]) * self.args.world_size
        for name in ("images", "forward_images", "backward_images"):
            setattr(self.counters, name, getattr(self.counters, name) + images)
        try:
            loss = super().training_step(model, self._mixed(inputs), *args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise ValueError(self._single_image) from error
            raise
        if not loss.isfinite():
            raise self._diverged(self.state.global_step + 1, f"the loss is {loss.item()}")
        return loss

    @property
    def _single_image(self) -> str:
        images, size = len(self.train_dataset), self._train_batch_size
        return (
            "BatchNorm cannot train on a batch of one image whose features are 1 x 1 pixels, and there is one in "
            f"{images} images in batches of {size}; choose another `per_device_train_batch_size`, of at least 2."
        )

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
        outputs = []
        for use_prompt in self._evaluated_roles():
            self._evaluates_prompted = use_prompt
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self.args.world_size > 1:
                self._correct_loss(output, metric_key_prefix)
            suffix = "_prompted" if use_prompt else ""
            outputs.append(
                output._replace(metrics={f"{name}{suffix}": value for name, value in output.metrics.items()})
            )
        return outputs[0]._replace(
            metrics={name: value for output in outputs for name, value in output.metrics.items()}
        )

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

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # As Trainer does it, but checkpoints are not packed and no pickle of the arguments is left beside the weights.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        packed = False if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else None
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, packed=packed, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The files of a run that is not sharded: accelerate's knows no optimizer of several parts.
        state = self.optimizer.state_dict()
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        for name, part in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, self.lr_scheduler)):
            part.load_state_dict(torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A method that prunes gradually is better before it has pruned.
        if not self.stage.masks.is_final(self.moment(self.state.global_step)):
            return False
        return super()._determine_best_metric(metrics, trial)

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

    # The Hub ---------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `args.hub_model_id` on the Hub, if there is none.

        Args:
            token: of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            private: whether it is private; None: `args.hub_private_repo`.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        # Not Trainer's own, which takes no `private` before transformers 5.23.
        with clear_errors(f"Could not create {name} on the Hub"):
            repository = self._hub.create_repo(
                name,
                token=self.args.hub_token if token is None else token,
                private=self.args.hub_private_repo if private is None else private,
                exist_ok=True,
            )
        self.hub_model_id, self.push_in_progress = repository.repo_id, None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write a short model card to `args.output_dir`, unless there is one with results, as recipes write it.

        Args:
            language, license, tags: of the metadata.
            model_name: name of the model in the metadata.
            finetuned_from: Hub id of the backbone; None: where it was loaded from.
            dataset_tags: Hub ids of the data sets.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "model_name": model_name, "datasets": dataset_tags}
        metadata = given | ({"base_model": finetuned_from} if finetuned_from else {})
        self._write_card(self.model, Path(self.args.output_dir), [tags] if isinstance(tags, str) else tags, metadata)

    def _write_card(
        self, model: PromptedSparseModel, folder: Path, tags: Sequence[str] | None, metadata: dict[str, Any]
    ) -> None:
        path = folder / CARD_NAME
        there = ModelCard.load(path) if path.is_file() else None
        if there is not None and BEGIN in there.text and there.data.to_dict().get("model-index"):
            return
        card = model.short_card(self.hub_model_id or folder.absolute().name, tags or (), **metadata)
        (merge_cards(there, card) if there is not None else card).save(path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the model, its image processor, card, recipe, report and figures in one commit, and nothing else.

        All of it is saved in `args.output_dir` first, so a push that fails can be repeated.

        Args:
            commit_message: of the commit.
            blocking: wait until it is done.
            token: of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            revision: branch to commit to; None: `args.hub_revision`, else `main`.
            private: whether a repository that is created is private; None: `args.hub_private_repo`.
            kwargs: passed to [`~VPNsTrainer.create_model_card`].

        Returns:
            The commit, or without `blocking` its future; None on processes other than the main one.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = functools.partial(
            push_folder,
            self.args.output_dir,
            str(self.hub_model_id),
            commit_message=commit_message or "End of training",
            token=token,
            revision=revision or self.args.hub_revision,
        )
        if not blocking:
            return self._hub.run_as_future(push)
        try:
            return push()
        except OSError as error:
            raise OSError(
                f"{error} The model is saved in {self.args.output_dir}; `trainer.push_to_hub()` pushes it again."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own would copy the checkpoint over the results in `output_dir` and publish a pickle.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress: {self.stage.name}, step {self.state.global_step}"
        with _training_goes_on():
            copied = self._complete_copy(Path(checkpoint_folder))
            job = self._hub.run_as_future(self._push_copy, copied, message)
            if running is None or running.is_done():
                self.push_in_progress = PushInProgress([job])
            else:
                running.jobs.append(job)

    def _complete_copy(self, checkpoint: Path) -> tempfile.TemporaryDirectory[str]:
        """What a push of a checkpoint publishes; a copy, because checkpoints are deleted while training goes on."""
        copied, run_folder = tempfile.TemporaryDirectory(), checkpoint.parents[1]
        folder = Path(copied.name)
        for name in published_files(run_folder):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(run_folder / name, folder / name)
        model = type(self.model).from_pretrained(checkpoint)
        model.save_pretrained(folder)
        self._write_card(model, folder, None, {})
        return copied

    def _push_copy(self, copied: tempfile.TemporaryDirectory[str], message: str) -> None:
        with _training_goes_on(), copied as folder:
            push_folder(
                folder,
                str(self.hub_model_id),
                commit_message=message,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
