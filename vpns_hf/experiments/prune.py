"""Prune a backbone for a task, train references beside it, and report."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import logging

from ..methods.table import get_method
from ..training.arguments import VPNsTrainingArguments
from ..training.trainer import VPNsTrainer
from .arguments import DataArguments, ModelArguments, PruneArguments, Reference
from .dry_run import PlannedRun, dry_run
from .experiment import Experiment
from .parsing import parse_recipe
from .prune_report import MeasuredModel, PruningReport, measure_model, row_name, with_milliseconds, write_report
from .speed import DENSE, measure_milliseconds


def main(arguments: Iterable[str] | None = None, default_config: Path | None = None) -> None:
    """Prune a pretrained image classifier for a task, evaluate it beside references, and write its model card.

    Args:
        arguments: the command line, as of [`parse_recipe`]; None: `sys.argv[1:]`.
        default_config: the YAML file used when no `--config` is given.

    Raises:
        ValueError: arguments, model and data do not fit each other.
        OSError: model or data cannot be read, or the output folder cannot be written.
    """
    logging.disable_progress_bar()  # of loading and saving weights; training keeps its own
    classes = (ModelArguments, DataArguments, VPNsTrainingArguments, PruneArguments)
    model_args, data_args, args, prune_args = parse_recipe(classes, arguments, default_config)
    experiment = Experiment(model_args, data_args, args)
    if prune_args.dry_run:
        dry_run([PlannedRun(args.method, experiment, args)])
        return
    trainer = experiment.trainer(args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Not pushed by this save: the report and the card follow.
    trainer.save_model(args.output_dir, _internal_call=True)
    references = _train_references(experiment, prune_args.references, _steps(trainer))
    measured = _measure(experiment, trainer, references)
    if trainer.is_world_process_zero():
        milliseconds = _time(trainer, references)
        measured = [with_milliseconds(each, milliseconds) for each in measured]
        write_report(PruningReport(experiment, prune_args, trainer, references, measured, milliseconds.get(DENSE)))
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def _steps(trainer: VPNsTrainer) -> int:
    """Optimizer steps of the run, without those of the warm-up of a new head and of a teacher."""
    return sum(stage.steps for stage in trainer.finished_stages if stage.name not in ("warm_up", "teacher"))


def _train_references(experiment: Experiment, names: Iterable[str], steps: int) -> dict[str, VPNsTrainer]:
    """Train each reference in a folder of its own below that of the run."""
    references = {}
    for name in names:
        references[name] = experiment.trainer(_reference_arguments(experiment.args, name, steps))
        references[name].train(resume_from_checkpoint=experiment.args.resume_from_checkpoint)
        references[name].save_model()
    return references


def _reference_arguments(args: VPNsTrainingArguments, name: str, steps: int) -> VPNsTrainingArguments:
    """Arguments of a reference: a control has the lengths of the run, any other method its number of steps in all."""
    own, reference = copy.copy(args), Reference.parse(name)
    own.method, own.output_dir, own.push_to_hub = reference.method, str(Path(args.output_dir) / name), False
    if reference.sparsity is not None:
        own.sparsity = reference.sparsity
    if not get_method(reference.method).is_control:
        own.total_max_steps = steps
    if not get_method(reference.method).uses_prompt:
        own.eval_prompt = "without"
    return own


def _measure(experiment: Experiment, trainer: VPNsTrainer, references: dict[str, VPNsTrainer]) -> list[MeasuredModel]:
    """Evaluate the references, the model as the search left it and the model on the test split, in this order."""
    rows = [("after tuning", run) for run in references.values()]
    if any(stage.name == "search" for stage in trainer.finished_stages):
        args = copy.copy(trainer.args)
        args.push_to_hub = False
        searched = VPNsTrainer(model=trainer.load_stage("search"), args=args, eval_dataset=trainer.eval_dataset)
        rows.append(("before tuning", searched))
    rows.append(("after tuning", trainer))
    return [measure_model(name, run, experiment.eval_split("test")) for name, run in rows]


def _time(trainer: VPNsTrainer, references: dict[str, VPNsTrainer]) -> dict[str, float]:
    """Time one image in the model and in each pruned reference, by the names of their rows."""
    runs = [run for run in (*references.values(), trainer) if run.model.sparsity > 0]
    return measure_milliseconds(trainer.model, {row_name(run, "after tuning"): run.model for run in runs})
