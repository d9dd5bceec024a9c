"""`VPNsTrainer`: the run over the stages of a pruning method.

`StageTrainer` below it is one stage inside transformers' Trainer; `callbacks` holds the work around each step, `plan`
the stages as values, `run_record` the finished ones, `publishing` the pushes.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from safetensors.torch import load_file
from torch import Tensor
from transformers import BaseImageProcessor, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..data.batches import collate_images
from ..data.calibration import calibration_batches
from ..methods.preparations import Rewind, StageStart
from ..metrics import compute_metrics
from ..model.modeling import PromptedSparseModel
from .arguments import VPNsTrainingArguments
from .callbacks import CheckpointControl, LabelMappingUpdates, MaskUpdates, PushCheckpoints
from .checks import asked_sparsity, check_data, check_model, check_processes, check_stages, check_state, check_training
from .consistency import ConsistencyCheck, keep_masks_from_ddp
from .counters import trained_weights
from .interruption import StopSignals
from .label_mapper import LabelMapper
from .losses import scoring_loss
from .plan import StagePlan, StageSettings, plan_stages
from .progress import replace_progress
from .publishing import Publisher
from .reporting import numbers
from .restoring import replace_model, save_first_state, save_stage
from .run_record import FIRST_STATE_NAME, FinishedStage, RunRecord, only_run
from .run_settings import run_settings
from .score_rates import settle_score_rate
from .stage_trainer import StageTrainer
from .teacher import Teaching
from .trainer_arguments import check_objects

logger = logging.getLogger(__name__)


class VPNsTrainer(StageTrainer):
    """Prune a [`PromptedSparseModel`] by the method that `args.method` names.

    `train()` runs the stages of the method one after the other on the same model. Checkpoints go to
    `output_dir/<index>-<stage>/checkpoint-N`; `train(resume_from_checkpoint=True)` resumes in whichever stage was
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
        check_objects(kwargs | {"args": args})
        self.method = args.pruning_method
        check_model(model, args, self.method)
        check_data(train_dataset, prompted_train_dataset)
        if isinstance(processing_class, BaseImageProcessor):
            model.image_processor = processing_class
        self.prompted_train_dataset = train_dataset if prompted_train_dataset is None else prompted_train_dataset
        self.label_mapper = LabelMapper(self, self.prompted_train_dataset)
        self.sparsity = asked_sparsity(model, args)
        self.scope = model.config.scope
        self.teaching = Teaching(args, self.method, model, kwargs.get("compute_loss_func"))
        self.stages = self.teaching.stages(self.method.stages_for(model.config.new_head, self.sparsity))
        check_stages(self.stages, args)
        self.evaluates_prompt = self.method.uses_prompt
        self.publisher = Publisher(args)
        self._signals = StopSignals(announces=args.process_index == 0)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", collate_images),
            compute_metrics=kwargs.pop("compute_metrics", partial(compute_metrics, names=args.reported_metrics)),
            callbacks=[
                MaskUpdates(lambda: self.plan, lambda: self.counters),
                LabelMappingUpdates(self.label_mapper, lambda: self.counters),
                *(callbacks or []),
            ],
            **kwargs,
        )
        replace_progress(self, lambda: self.plan.place)
        self.plan = self.plan_stages()[0]
        self._settings = run_settings(args, model, self.sparsity, self.scope, self.prompted_train_dataset)
        check_processes(self, self.stages)
        if self.is_fsdp_enabled:
            # Every stage starts from the whole model, which may score or map labels before it is sharded.
            model.to(args.device)
        if args.world_size > 1 and args.consistency_check_steps:
            self.add_callback(ConsistencyCheck(self.accelerator, args.consistency_check_steps))
        self.add_callback(PushCheckpoints(self._push_checkpoint, self.publisher.wait))
        self._checkpoint_control = CheckpointControl(self._signals, self.accelerator)
        self.add_callback(self._checkpoint_control)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Run every stage.

        Args:
            resume_from_checkpoint: True: resume where the run in `args.output_dir` stopped (from the start if it
                never began). A path `<output_dir>/<index>-<stage>/checkpoint-N`: resume from there.
            kwargs: passed to [`~transformers.Trainer.train`] for every stage.

        Returns:
            Steps of all stages together, the last stage's training loss, and all metrics as `<stage>_<name>`.

        Raises:
            ValueError: `output_dir` holds another run or is in use by one, or the checkpoint is none of it.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
            FloatingPointError: the loss is no finite number.
            OSError: something could not be written, as on a full disk.
        """
        with only_run(Path(self.args.output_dir), self.is_world_process_zero()):
            return self._train_stages(resume_from_checkpoint, **kwargs)

    def _train_stages(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        plans, record = self.plan_stages(), self._record()
        checkpoint = record.find_checkpoint([plan.name for plan in plans], resume_from_checkpoint)
        record.check(self._settings, started=checkpoint is not None)
        if len(record.finished) == len(plans):
            logger.warning("Every stage of the run in %s has ended, so nothing is trained.", record.folder)
        if record.finished:
            replace_model(self.model, record.model_folder(record.finished[-1].name))
        check_training(plans[len(record.finished) :], self.model, self.args, self.train_dataset)
        if self.args.should_save:
            record.save()
            record.remove_leftovers()
        # Last, so that every other callback has run when a signal ends the run after a save.
        self.remove_callback(self._checkpoint_control)
        self.add_callback(self._checkpoint_control)
        loss, metrics = math.nan, dict[str, float]()
        for plan in plans[len(record.finished) :]:
            output = self._train_stage(plan, record, checkpoint, **kwargs)
            checkpoint, loss = None, output.metrics.get("train_loss", math.nan)
            metrics |= {f"{plan.name}_{name}": value for name, value in output.metrics.items()}
        return TrainOutput(record.steps, loss, metrics)

    def plan_stages(self) -> list[StagePlan]:
        """Plan the stages of the run from the arguments, the model and the number of training images."""
        return plan_stages(
            self.stages,
            self.args,
            sparsity=self.sparsity,
            scope=self.scope,
            has_prompt=self.model.prompt is not None,
            rows=0 if self.train_dataset is None else len(self.train_dataset),
        )

    def _record(self) -> RunRecord:
        return RunRecord.load(Path(self.args.output_dir), self._settings)

    def _train_stage(self, plan: StagePlan, record: RunRecord, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        self.plan, self.callback_handler.finished_steps = plan, record.steps
        if checkpoint is None and self.args.should_save:
            shutil.rmtree(plan.folder, ignore_errors=True)
        # Random numbers of a stage must not depend on whether the run was interrupted before it.
        set_seed(self.args.seed + plan.index)
        self._begin(record, checkpoint)
        with self.using(plan.args), self._signals:
            output = self._run(checkpoint, **kwargs)
            cost = self.counters.cost(trained_weights(self.model, plan.stage.roles))
            if plan.stage is self.stages[-1] and self.model.config.state == "search":
                self.label_mapper.refresh(final=True)
                self.model.freeze_masks()
            evaluation = numbers(self._evaluate_stage())
            steps, rate = self.state.global_step, self.counters.score_learning_rate
            record.finished.append(FinishedStage(plan.name, steps, evaluation, cost, rate))
            if self.args.should_save:
                save_stage(self.model, self.state, plan)
                record.save()
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                print(f"{plan.place}: {record.finished[-1].summary(1 - self.model.sparsity)}", flush=True)
            if self._checkpoint_control.was_asked_to_stop():
                self._checkpoint_control.leave(f"after the stage {plan.name}")
        return output

    def _evaluate_stage(self) -> dict[str, Any]:
        """Evaluate after a stage; a failure is reported and must not lose the stage."""
        if self.eval_dataset is None:
            return {}
        try:
            return self.evaluate()
        except Exception:
            logger.exception("The evaluation after the stage %s failed; the run continues.", self.plan.name)
            return {}

    def _run(self, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        """Train the present stage and leave the model whole and unwrapped."""
        output = TrainOutput(0, math.nan, {})
        if self.plan.stage.roles:
            output = self.train_stage(checkpoint, **kwargs)
        else:
            self.state = TrainerState()
        # From autocast, torch.compile and DistributedDataParallel.
        self.model = self.model_wrapped = self.accelerator.unwrap_model(
            self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        # States change between stages, which a sharded model cannot follow.
        self.model.gather_shards()
        self.model.eval_backbone = False
        return output

    def _begin(self, record: RunRecord, checkpoint: Path | None) -> None:
        """Bring the model into the stage's state and make the stage's roles trainable."""
        stage = self.plan.stage
        self.optimizer, self.lr_scheduler = None, None
        self.counters.reset()
        self.model.config.scope = self.plan.scope
        with self.counters.measuring(self.model):
            self.label_mapper.begin(checkpoint)
            if stage.masks.state != "search":
                self.label_mapper.refresh(final=True)
        if checkpoint is None:
            # A checkpoint holds their effects.
            self._prepare(record)
        check_state(stage, self.model, self.args)
        stage.masks.begin(self.model, self.plan.sparsity)
        if checkpoint is None and "scores" in stage.roles:
            self.counters.score_learning_rate = settle_score_rate(self.model, self.plan)
        self.teacher = self.teaching.teacher_of(stage, self.load_stage)
        self.model.eval_backbone = stage.eval_backbone
        self.model.train_only(*stage.roles)
        self.model_wrapped = self.model
        keep_masks_from_ddp(self.model)

    def _prepare(self, record: RunRecord) -> None:
        first_state = record.folder / FIRST_STATE_NAME
        is_first = self.plan.stage is next((stage for stage in self.stages if stage.length != "warm_up"), None)
        if is_first and any(isinstance(prepare, Rewind) for stage in self.stages for prepare in stage.before):
            if self.args.should_save:
                save_first_state(self.model, first_state)
            self.accelerator.wait_for_everyone()
        start = StageStart(
            self.model,
            self.plan.sparsity,
            self.args.seed,
            self.calibration_batches,
            lambda: load_file(first_state, device=str(self.model.device)),
            scoring_loss(self.compute_loss_func),
        )
        with self.counters.measuring(self.model):
            for prepare in self.plan.preparations:
                prepare(start)

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """Return training images to score with, see [`data.calibration.calibration_batches`]."""
        return calibration_batches(
            self.prompted_train_dataset,
            self.data_collator,
            self.args.calibration_images_per_class,
            self.model.config.num_labels,
            self.args.per_device_eval_batch_size,
            self.args.seed,
        )

    @property
    def finished_stages(self) -> list[FinishedStage]:
        """Return the finished stages of the run in `args.output_dir`."""
        return self._record().finished

    def load_stage(self, name: str) -> PromptedSparseModel:
        """Load the model of a finished stage.

        Raises:
            ValueError: no stage of that name has ended, or its model was removed at the end of the run.
        """
        return PromptedSparseModel.from_pretrained(self._record().model_folder(name)).to(self.args.device)

    def logs(self) -> dict[str, list[dict[str, float]]]:
        """Return the log of every finished stage, by stage name."""
        record = self._record()
        paths = {stage.name: record.finished_folder(stage.name) / TRAINER_STATE_NAME for stage in record.finished}
        return {name: TrainerState.load_from_json(str(path)).log_history for name, path in paths.items()}

    def stage_settings(self) -> list[StageSettings]:
        """Return length and optimizers of the finished stages, for the model card."""
        planned = {settings.name: settings for settings in self.planned_stages()}
        return [planned[finished.name].as_finished(finished) for finished in self.finished_stages]

    def planned_stages(self) -> list[StageSettings]:
        """Return length and optimizers of all stages, before any of them has run."""
        present = {role for role, parameters in self.model.parameters_by_role().items() if parameters} | {"scores"}
        return [plan.settings(present) for plan in self.plan_stages()]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `args.hub_model_id` on the Hub if it does not exist.

        Args:
            token: token of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            private: whether the repository is private; None: `args.hub_private_repo`.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        if self.is_world_process_zero():
            self.hub_model_id, self.push_in_progress = self.publisher.create_repository(token, private), None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write a short model card to `args.output_dir`, unless it holds one with results, as recipes write it.

        Args:
            language, license, tags: entries of the metadata.
            model_name: name of the model in the metadata.
            finetuned_from: Hub id of the backbone; None: the place it was loaded from.
            dataset_tags: Hub ids of the data sets.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "model_name": model_name, "datasets": dataset_tags}
        metadata = given | ({"base_model": finetuned_from} if finetuned_from else {})
        tags = [tags] if isinstance(tags, str) else tags
        self.publisher.write_card(self.model, Path(self.args.output_dir), tags, metadata)

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
            commit_message: message of the commit.
            blocking: whether to wait until the push is done.
            token: token of an account that may write; None: `args.hub_token`, else that of `hf auth login`.
            revision: branch to commit to; None: `args.hub_revision`, else `main`.
            private: whether a repository that is created is private; None: `args.hub_private_repo`.
            kwargs: passed to [`~VPNsTrainer.create_model_card`].

        Returns:
            The commit, or without `blocking` its future; None on processes other than the main one.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        return self.publisher.push(commit_message or "End of training", blocking, token, revision)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            message = f"Training in progress: {self.plan.name}, step {self.state.global_step}"
            self.publisher.push_checkpoint(self.model, checkpoint, message)
