"""`VPNsTrainer`: runs the stages of a pruning method, each as one run of transformers' Trainer.

It stands on three layers: `HubTrainer` pushes, `ResumableTrainer` saves, stops and resumes, and `StageTrainer` has the
batches, optimizers and metrics of one stage. What happens at each optimizer step is in `StageCallback`.
"""

from __future__ import annotations

import collections
import copy
import logging
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BaseImageProcessor, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..data.batches import collate_images
from ..methods.preparations import Rewind, StageStart
from ..methods.stage import Stage
from ..methods.table import get_method
from ..metrics import compute_metrics
from ..model.modeling import PromptedSparseModel
from .arguments import VPNsTrainingArguments
from .callbacks import StageCallback
from .checkpoints import publish_folder, writing
from .checks import check_data, check_model, check_processes, check_stages
from .consistency import ConsistencyCheck
from .counters import Counters
from .hub_trainer import HubTrainer
from .label_mapper import LabelMapper
from .plan import StageSettings
from .run_record import FIRST_STATE_NAME, MODEL_FOLDER, FinishedStage, RunRecord

logger = logging.getLogger(__name__)


class VPNsTrainer(HubTrainer):
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
        if "model_init" in kwargs:
            raise ValueError(
                "VPNsTrainer takes a `model`, not `model_init`: every stage goes on with the model of the one before."
            )
        self.method = get_method(args.method)
        check_model(model, args, self.method)
        check_data(train_dataset, prompted_train_dataset)
        if isinstance(processing_class, BaseImageProcessor):
            model.image_processor = processing_class
        self.prompted_train_dataset = train_dataset if prompted_train_dataset is None else prompted_train_dataset
        self.label_mapper = LabelMapper(self, self.prompted_train_dataset)
        self._sparsity = model.config.sparsity if args.sparsity is None else args.sparsity
        self._scope = model.config.scope
        self.stages = self.method.stages_for(model.config.new_head, self._sparsity)
        check_stages(self.stages, args)
        self.stage, self.stage_index = self.stages[0], 0
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
        check_processes(self, self.stages)
        if self.is_fsdp_enabled:
            # Every stage starts from the whole model, which may score or map labels before it is sharded.
            model.to(args.device)
        if args.world_size > 1 and args.consistency_check_steps:
            self.add_callback(ConsistencyCheck(self.accelerator, args.consistency_check_steps))

    # The run ---------------------------------------------------------------------------------------------------------

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
        record = self._record()
        checkpoint = record.find_checkpoint([stage.name for stage in self.stages], resume_from_checkpoint)
        if len(record.finished) == len(self.stages):
            logger.warning("Every stage of the run in %s has ended, so nothing is trained.", record.folder)
        if record.finished:
            self._become(record.finished_folder(record.finished[-1].name) / MODEL_FOLDER)
        if self.args.should_save:
            record.save()
            record.remove_leftovers()
        loss, metrics = math.nan, dict[str, float]()
        for index in range(len(record.finished), len(self.stages)):
            output = self._train_stage(index, record, checkpoint, **kwargs)
            checkpoint, loss = None, output.metrics.get("train_loss", math.nan)
            metrics |= {f"{self.stage.name}_{name}": value for name, value in output.metrics.items()}
        return TrainOutput(sum(stage.steps for stage in record.finished), loss, metrics)

    def _record(self) -> RunRecord:
        settings = {"method": self.args.method, "sparsity": self._sparsity, "seed": self.args.seed}
        return RunRecord.load(Path(self.args.output_dir), settings)

    def _train_stage(self, index: int, record: RunRecord, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        self.stage, self.stage_index = self.stages[index], index
        folder = record.stage_folder(index, self.stage.name)
        if checkpoint is None and self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        # What a stage draws must not depend on whether the run was interrupted before it.
        set_seed(self.args.seed + index)
        self._enter(record, checkpoint)
        with self._with_arguments(output_dir=str(folder), **self._stage_arguments()), self._signals:
            output = self._run(checkpoint, **kwargs)
            cost = self.counters.cost(self._trained_weights())
            if self.stage is self.stages[-1] and self.model.config.state == "search":
                self.label_mapper.refresh(final=True)
                self.model.freeze_masks()
            evaluation = {} if self.eval_dataset is None else self.evaluate()
            record.finished.append(FinishedStage(self.stage.name, self.state.global_step, evaluation, cost))
            self._keep(folder, record)
            self._announce(evaluation)
            if self.was_asked_to_stop():
                self._leave(f"after the stage {self.stage.name}")
        return output

    def _run(self, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        """Train the present stage; the model comes out of it whole and without what accelerate put around it."""
        output = TrainOutput(0, math.nan, {})
        if self.stage.roles:
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            if checkpoint and self.state.global_step == self._initial_global_step:
                name = self.stage.name
                logger.warning("No step of the stage %s is left after %s, so none is trained.", name, checkpoint)
        else:
            self.state = TrainerState()
        # From autocast, torch.compile and DistributedDataParallel.
        self.model = self.model_wrapped = self.accelerator.unwrap_model(
            self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        # States change between stages, which a sharded model cannot follow.
        self.model.unshard()
        self.model.eval_backbone = False
        return output

    def _stage_arguments(self) -> dict[str, Any]:
        """Those arguments that stages do not have in common; `max_steps` is -1 where the epochs count."""
        epochs, max_steps = self.args.stage_length(self.stage, self.stages)
        if self.stage.length == "warm_up" and self.args.max_steps > 0:
            max_steps = min(self.args.max_steps, self._steps(epochs))
        keeps_best = self.args.load_best_model_at_end and self.stage is self.stages[-1]
        return {"num_train_epochs": epochs, "max_steps": max_steps, "load_best_model_at_end": keeps_best}

    def _steps(self, epochs: float) -> int:
        batches_a_step = self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(epochs * math.ceil(len(self._sampler()) / batches_a_step))

    def _trained_weights(self) -> int:
        by_role = self.model.parameters_by_role()
        trained = sum(parameter.numel() for role in self.stage.roles for parameter in by_role[role].values())
        if "weights" in self.stage.roles:
            trained -= sum(int((~mask).sum()) for mask in self.model.masks().values())
        return trained

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

    def _announce(self, evaluation: dict[str, float]) -> None:
        if not self.is_world_process_zero():
            return
        accuracies = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.2%}"
            for name, value in evaluation.items()
            if name.startswith("eval_accuracy")
        ]
        facts = [f"{self.state.global_step} steps", f"density {1 - self.model.sparsity:.2%}", *accuracies]
        place = f"[stage {self.stage_index + 1} of {len(self.stages)}] {self.stage.name}"
        print(f"{place}: {', '.join(facts)}", flush=True)

    # How a stage begins ----------------------------------------------------------------------------------------------

    def _enter(self, record: RunRecord, checkpoint: Path | None) -> None:
        """Bring the model into the stage's state and make the stage's roles trainable."""
        stage = self.stage
        self.optimizer, self.lr_scheduler = None, None
        self.counters.reset()
        self.model.config.scope = stage.scope or self._scope
        with self.counters.measuring(self.model):
            self.label_mapper.begin(checkpoint)
            if stage.state != "search":
                self.label_mapper.refresh(final=True)
        if checkpoint is None:
            # A checkpoint brings what these would do.
            self._prepare(record)
        self._change_state()
        self.model.eval_backbone = stage.eval_backbone
        self.model.train_only(*stage.roles)
        self.model_wrapped = self.model
        # Masks follow from the scores on every process, so DDP need not send them before every forward.
        masks = {id(mask) for mask in self.model.masks().values()}
        self.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in self.model.named_buffers() if id(buffer) in masks
        ]

    def _prepare(self, record: RunRecord) -> None:
        first_state = record.folder / FIRST_STATE_NAME
        is_first = self.stage is next((other for other in self.stages if other.length != "warm_up"), None)
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
            for prepare in self.stage.before:
                prepare(start)

    def _keep_first_state(self, path: Path) -> None:
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            state = self.model.backbone_state()
            save_file({name: tensor.detach().clone() for name, tensor in state.items()}, temporary)
            os.replace(temporary, path)
        self.accelerator.wait_for_everyone()

    def _change_state(self) -> None:
        model, stage, state = self.model, self.stage, self.model.config.state
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

    def _become(self, folder: Path) -> None:
        loaded = type(self.model).from_pretrained(folder)
        # Copied, because tensors that are mapped from the file lie at other addresses, where kernels may sum in
        # another order.
        self.model.replace_with(copy.deepcopy(loaded).to(self.args.device, memory_format=_memory_format(self.model)))

    # What the stages have done and will do ---------------------------------------------------------------------------

    @property
    def finished_stages(self) -> list[FinishedStage]:
        """The stages of the run in `args.output_dir` that have ended."""
        return self._record().finished

    def load_stage(self, name: str) -> PromptedSparseModel:
        """The model as a finished stage left it.

        Raises:
            ValueError: no stage of that name has ended.
        """
        folder = self._record().finished_folder(name) / MODEL_FOLDER
        return PromptedSparseModel.from_pretrained(folder).to(self.args.device)

    def logs(self) -> dict[str, list[dict[str, float]]]:
        """What every finished stage logged, by stage name."""
        record = self._record()
        paths = {stage.name: record.finished_folder(stage.name) / TRAINER_STATE_NAME for stage in record.finished}
        return {name: TrainerState.load_from_json(str(path)).log_history for name, path in paths.items()}

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
            length = self._stage_arguments()
            steps = length["max_steps"] if length["max_steps"] > 0 else self._steps(length["num_train_epochs"])
            planned.append(self._settings_of(stage, steps if stage.roles else 0))
        self.stage, self.stage_index = present
        return planned

    def _settings_of(self, stage: Stage, steps: int) -> StageSettings:
        present = {role for role, parameters in self.model.parameters_by_role().items() if parameters} | {"scores"}
        settings = {role: self.args.role_settings(role, stage) for role in sorted(stage.roles & present)}
        optimizers = {role: (chosen.optim, chosen.learning_rate) for role, chosen in settings.items()}
        return StageSettings(stage.name, steps, optimizers)


def _memory_format(model: PromptedSparseModel) -> torch.memory_format:
    """channels_last where the model is in it; else the one that each tensor has."""
    is_last = any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in model.prunable_weights().values()
    )
    return torch.channels_last if is_last else torch.preserve_format
