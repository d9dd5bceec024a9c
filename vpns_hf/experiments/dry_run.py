"""Print the plans of runs: build model, data and arguments, and train nothing."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console

from ..model.modeling import PromptedSparseModel
from ..report.tables import MISSING, TerminalTable
from ..training.arguments import VPNsTrainingArguments
from ..training.trainer import VPNsTrainer
from .experiment import Experiment


@dataclass(frozen=True)
class PlannedRun:
    """A run that an experiment would make.

    Args:
        name: title of its table of stages.
        experiment: backbone and data.
        args: arguments of the run.
        prepare: function that changes the model, as of [`Experiment.trainer`].
    """

    name: str
    experiment: Experiment
    args: VPNsTrainingArguments
    prepare: Callable[[PromptedSparseModel], None] | None = None

    def trainer(self) -> VPNsTrainer:
        """Build the trainer of the run, which writes nothing and creates no repository."""
        args = copy.copy(self.args)
        args.push_to_hub = False
        with tempfile.TemporaryDirectory() as args.output_dir:
            return self.experiment.trainer(args, self.prepare)


def dry_run(runs: Iterable[PlannedRun]) -> None:
    """Build every run and print its stages, and the facts of each experiment before its first run.

    Args:
        runs: planned runs; those of one experiment must follow each other.
    """
    console, shown = Console(), None
    for run in runs:
        trainer = run.trainer()
        if run.experiment is not shown:
            shown = run.experiment
            console.print(
                TerminalTable(
                    ("what", "value"), list(_facts(shown, trainer)), "Dry run: nothing is trained", text_columns=2
                )
            )
            first = trainer.train_dataset[0]
            console.print(f"First training image: {tuple(first['pixel_values'].shape)}, class {first['labels']}")
        columns = ("stage", "what trains and how", "optimizer steps")
        console.print(
            TerminalTable(columns, [stage.row() for stage in trainer.planned_stages()], run.name, text_columns=2)
        )


def _facts(experiment: Experiment, trainer: VPNsTrainer) -> Iterator[tuple[str, str]]:
    model, args = trainer.model, trainer.args
    prunable = model.prunable_weights().values()
    accumulated = args.gradient_accumulation_steps
    height, width = model.config.geometry.size
    yield "backbone", f"{experiment.model_args.model_name_or_path} ({type(model.backbone).__name__})"
    yield "parameters", f"{sum(parameter.numel() for parameter in model.backbone.parameters()):,}"
    yield "prunable weights", f"{sum(weight.numel() for weight in prunable):,}"
    yield "pattern", model.config.pattern
    yield "input", f"{height} x {width} pixels"
    yield "prompt", model.config.prompt or MISSING
    yield "data", experiment.data_args.dataset_name
    yield "classes", f"{model.config.num_labels:,}" + (" (new head)" if model.config.new_head else "")
    for name, split in experiment.splits.items():
        yield f"{name} images", f"{split.num_rows:,}"
    yield (
        "images a step",
        f"{args.train_batch_size * accumulated * args.world_size} = {args.train_batch_size} a batch x {accumulated} "
        f"accumulated x {args.world_size} processes",
    )
    yield "metrics", ", ".join(args.reported_metrics)
