"""Prune a backbone for a task, train references beside it, and report."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..methods.table import get_method
from ..training.arguments import VPNsTrainingArguments
from ..training.clearing import clear_run, size
from ..training.trainer import VPNsTrainer
from .arguments import DataArguments, ModelArguments, PruneArguments, Reference
from .dry_run import PlannedRun, dry_run
from .experiment import Experiment
from .origins import dataset_origin
from .parsing import parse_recipe
from .prune_report import MeasuredModel, PruningReport, closing_line, measure_model, write_report
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
    dataset = dataset_origin(data_args.dataset_name, prune_args.dataset_title)
    experiment = Experiment(model_args, data_args, args)
    if prune_args.dry_run:
        dry_run([PlannedRun(args.method, experiment, args)])
        return
    trainer = experiment.trainer(args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Not pushed by this save: the report and the card follow.
    trainer.save_model(args.output_dir, _internal_call=True)
    references = _train_references(experiment, prune_args.references, _steps(trainer))
    rows = _rows(trainer, references)
    measured = [measure_model(name, run, experiment.eval_split("test")) for name, run in rows]
    report = PruningReport(experiment, prune_args, dataset, trainer, references, measured)
    if trainer.is_world_process_zero():
        measured, dense = _with_milliseconds(measured, rows)
        report = replace(report, measured=measured, dense_milliseconds=dense)
        write_report(report)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        print(closing_line(report, _checkpoint_bytes(report)), flush=True)
    trainer.end()


def _checkpoint_bytes(report: PruningReport) -> int:
    """Remove the checkpoints of run and references unless they are kept; return their bytes."""
    if report.prune_args.keep_checkpoints:
        return sum(size(checkpoint) for checkpoint in report.folder.rglob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    references = [Path(run.args.output_dir) for run in report.references.values()]
    # The report of a resumed run measures the model of the search again.
    return clear_run(report.folder, keep=("search",)) + sum(clear_run(folder) for folder in references)


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


def _rows(trainer: VPNsTrainer, references: dict[str, VPNsTrainer]) -> list[tuple[str, VPNsTrainer]]:
    """List the rows of the table: the references, the model as the search left it, and the model."""
    rows = [("after tuning", run) for run in references.values()]
    if any(stage.name == "search" for stage in trainer.finished_stages):
        args = copy.copy(trainer.args)
        args.push_to_hub = False
        searched = VPNsTrainer(model=trainer.load_stage("search"), args=args, eval_dataset=trainer.eval_dataset)
        rows.append(("before tuning", searched))
    return [*rows, ("after tuning", trainer)]


def _with_milliseconds(
    measured: Sequence[MeasuredModel], rows: Sequence[tuple[str, VPNsTrainer]]
) -> tuple[list[MeasuredModel], float | None]:
    """Add the time of one image to tuned rows; return them, and the time in dense kernels."""
    pruned = {str(index): run for index, (name, run) in enumerate(rows) if name == "after tuning"}
    times = measure_milliseconds({index: run.model for index, run in pruned.items() if run.model.sparsity > 0})
    keys = [DENSE if each.result.sparsity == 0 else str(index) for index, each in enumerate(measured)]
    timed = [each.at_speed(times.get(key)) for each, key in zip(measured, keys, strict=True)]
    return timed, times.get(DENSE)
