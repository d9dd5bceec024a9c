"""Report a pruning run: tables, figures, provenance and the model card in its output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from rich.console import Console

from ..data.splits import SplitView
from ..data.tasks import TRANSFER_TASKS
from ..hub import LATENCY_FIGURE, LATENCY_REPORT
from ..latency import Machine
from ..metrics import METRICS, predicted_classes
from ..report.confusion import MAX_CONFUSION_CLASSES, plot_confusion
from ..report.density import plot_density
from ..report.model_card import SubnetworkCard
from ..report.prompt import plot_prompt
from ..report.tables import Result, blocks_table, file_size, results_markdown, results_table
from ..report.training import plot_training
from ..saved_folder import writing
from ..training.trainer import VPNsTrainer
from .arguments import PruneArguments
from .experiment import Experiment
from .origins import Origin, backbone_origin
from .speed import smaller_and_faster

PACKAGES = ("vpns-hf", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm")
# The figures of the card, by the names of their files.
CAPTIONS = {
    "prompt": "The learned prompt",
    "training": "Accuracy over training",
    "density": "Density per layer",
    "confusion": "Confusion of the classes",
}


@dataclass(frozen=True)
class MeasuredModel:
    """A row of the table, with all metrics of the test split and the predictions without the prompt.

    Args:
        result: the row.
        metrics: metrics of `METRICS` by name, without the prefix of the split.
        labels, predicted: classes [n].
    """

    result: Result
    metrics: dict[str, float]
    labels: np.ndarray
    predicted: np.ndarray

    def at_speed(self, milliseconds: float | None) -> Self:
        """Add the time of one image to the row."""
        return replace(self, result=replace(self.result, milliseconds=milliseconds))


def measure_model(name: str, run: VPNsTrainer, test: SplitView) -> MeasuredModel:
    """Evaluate a model on the test split, without and with its prompt.

    Args:
        name: `"before tuning"`, where the last stage of the run is not yet in the model, or `"after tuning"`.
        run: trainer of the model.
        test: the test split.
    """
    output = run.predict(test, metric_key_prefix="test")
    metrics = {key.removeprefix("test_"): value for key, value in output.metrics.items()}
    is_tuned = name == "after tuning"
    stages = run.finished_stages if is_tuned else run.finished_stages[:-1]
    result = Result(
        name=f"{run.args.method} {name}",
        sparsity=run.model.sparsity,
        accuracy=metrics["accuracy"],
        accuracy_prompted=metrics.get("accuracy_prompted"),
        steps=sum(stage.steps for stage in stages),
        file_bytes=(Path(run.args.output_dir) / "model.safetensors").stat().st_size if is_tuned else None,
    )
    reported = {key: value for key, value in metrics.items() if key.removesuffix("_prompted") in METRICS}
    return MeasuredModel(result, reported, output.label_ids, predicted_classes(output.predictions))


@dataclass(frozen=True)
class PruningReport:
    """Everything that the report of a pruning run is made from.

    Args:
        experiment: backbone, data and arguments.
        prune_args: arguments of the program.
        trainer: trainer of the run.
        dataset: name, licence and source of the data set.
        references: trainers of the references by method.
        measured: rows of the table; the last one is the pruned model.
        dense_milliseconds: time of one image in dense kernels; None if it was not measured.
    """

    experiment: Experiment
    prune_args: PruneArguments
    dataset: Origin
    trainer: VPNsTrainer
    references: Mapping[str, VPNsTrainer]
    measured: Sequence[MeasuredModel]
    dense_milliseconds: float | None = None

    @property
    def folder(self) -> Path:
        """Return the output folder."""
        return Path(self.experiment.args.output_dir)

    @property
    def results(self) -> list[Result]:
        """Return the rows of the table."""
        return [each.result for each in self.measured]


def write_report(report: PruningReport) -> None:
    """Write numbers, figures and card into the output folder, and only then print the tables.

    Raises:
        OSError: a file cannot be written; the model is saved already.
    """
    advice = "; the model in it is saved, so make room and resume, which writes the report"
    with writing(f"The report in {report.folder}", advice=advice):
        _write_files(report)
    console = Console()
    images = report.experiment.splits["test"].num_rows
    results, sparsity = report.results, report.trainer.model.sparsity_report()
    console.print(results_table(results, title=f"Test split, {images:,} images"))
    console.print(blocks_table(sparsity))
    if results[-1].sparsity > 0:
        console.print(smaller_and_faster(results[-1], sparsity.dense_bytes, report.dense_milliseconds))


def _write_files(report: PruningReport) -> None:
    folder, results = report.folder, report.results
    # Measured on the model that was here before; the new card says nothing of it.
    for name in (LATENCY_REPORT, LATENCY_FIGURE):
        (folder / name).unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(_provenance(report), encoding="utf-8")
    (folder / "results.md").write_text(results_markdown(results) + "\n", encoding="utf-8")
    sparsity = report.trainer.model.sparsity_report()
    (folder / "sparsity_report.json").write_text(sparsity.to_json(), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(_metrics(report), indent=2), encoding="utf-8")
    _draw_figures(report)
    card = _card(report)
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    card.save(folder / "README.md")


def closing_line(report: PruningReport, checkpoint_bytes: int) -> str:
    """Say in one line what is where when a run has ended.

    Args:
        report: the report of the run.
        checkpoint_bytes: bytes of the checkpoints, removed or kept.
    """
    folder, model = report.folder, report.folder / "model.safetensors"
    references = " and ".join(str(folder / name) for name in report.references)
    places = [
        f"The pruned model ({file_size(model.stat().st_size)}), its card, numbers and figures are in {folder}",
        *([f"the references are in {references}"] if references else []),
    ]
    kept = "are kept" if report.prune_args.keep_checkpoints else "were removed (`--keep_checkpoints true` keeps them)"
    checkpoints = f"Checkpoints of {file_size(checkpoint_bytes)} {kept}." if checkpoint_bytes else ""
    return f"{'; '.join(places)}. {checkpoints}".strip()


def _metrics(report: PruningReport) -> dict[str, Any]:
    return {
        "test": [asdict(each.result) | each.metrics for each in report.measured],
        "validation": {stage.name: stage.metrics for stage in report.trainer.finished_stages},
    }


def _draw_figures(report: PruningReport) -> None:
    """Draw density, training, prompt and, for few classes, the confusion matrix."""
    figures, trainer = report.folder / "figures", report.trainer
    plot_density(trainer.model.sparsity_report(), figures / "density.png")
    levels = {name: run.finished_stages[-1].metrics["eval_accuracy"] for name, run in report.references.items()}
    plot_training(trainer.logs(), figures / "training.png", dense=levels)
    if trainer.model.prompt is not None:
        sample = report.experiment.eval_split("validation")[0]
        plot_prompt(trainer.model, sample["pixel_values"], figures / "prompt.png")
    names, pruned = report.experiment.splits["test"].features["label"].names, report.measured[-1]
    if len(names) <= MAX_CONFUSION_CLASSES:
        plot_confusion(pruned.labels, pruned.predicted, names, figures / "confusion.png")


def _card(report: PruningReport) -> SubnetworkCard:
    """Create the model card: facts of this run alone."""
    experiment, trainer, folder = report.experiment, report.trainer, report.folder
    backbone, data = experiment.model_args.model_name_or_path, experiment.data_args.dataset_name
    origin, machine = backbone_origin(backbone), Machine.this()
    return SubnetworkCard(
        title=Path(trainer.hub_model_id or folder).name,
        repo_id=trainer.hub_model_id or Path(_portable(str(folder))).as_posix(),
        base_model=origin.title,
        base_model_is_on_hub=not Path(backbone).is_dir(),
        dataset=report.dataset.title,
        dataset_id=None if Path(data).is_dir() else TRANSFER_TASKS[data].path if data in TRANSFER_TASKS else data,
        split="test",
        images=experiment.splits["test"].num_rows,
        method=trainer.method.description,
        results=report.results,
        sparsity=trainer.model.sparsity_report(),
        stages=trainer.stage_settings(),
        settings={
            "seed": str(experiment.args.seed),
            "batch size": str(experiment.args.train_batch_size),
            "machine": f"{machine.processor}, {machine.cores} cores",
            "images": ", ".join(f"{split.num_rows:,} {name}" for name, split in experiment.splits.items()),
        },
        uses_prompt=trainer.model.config.use_prompt,
        has_prompt=trainer.model.prompt is not None,
        figures={
            caption: f"figures/{name}.png"
            for name, caption in CAPTIONS.items()
            if (folder / f"figures/{name}.png").is_file()
        },
        license=report.prune_args.license or origin.license,
        dataset_license=report.dataset.license,
        dataset_source=report.dataset.source,
    )


def _provenance(report: PruningReport) -> str:
    """`recipe.yaml`: the exact arguments; as comments the package versions and the images of each split."""
    experiment = report.experiment
    groups = (
        asdict(experiment.model_args),
        asdict(experiment.data_args),
        experiment.args.to_dict(),
        asdict(report.prune_args),
    )
    given = {key: value for group in groups for key, value in group.items()} | {"token": None}
    arguments = {key: _portable(value) for key, value in given.items()}
    facts = {
        "shortened to the name, so give the path again": [key for key in given if _is_elsewhere(given[key])],
        "packages": {name: version(name) for name in PACKAGES},
        "images": {name: split.num_rows for name, split in experiment.splits.items()},
        "rows": experiment.splits.digests(),
    }
    comments = "".join(f"# {line}\n" for line in yaml.safe_dump(facts, sort_keys=False).splitlines())
    return comments + yaml.safe_dump(json.loads(json.dumps(arguments, default=str)))


def _portable(value: Any) -> Any:
    """Make a path below the working directory relative to it, and shorten others to their name.

    Folders of a machine mean nothing to others, and may name its user.
    """
    if _is_elsewhere(value):
        return Path(value).name
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return str(Path(value).relative_to(Path.cwd())) if is_path else value


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute() and not Path(value).is_relative_to(Path.cwd())
