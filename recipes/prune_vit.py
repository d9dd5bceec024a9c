"""Prune a pretrained image classifier with VPNs, and compare it with references such as the densely tuned model.

    accelerate launch recipes/prune_vit.py                                    # the embedded demo
    accelerate launch recipes/prune_vit.py --config recipes/vit/vit_base_cifar100.yaml --sparsity 0.8

Without `--config` the demo's recipe, `recipes/vit/demo.yaml`, is run. Every choice is made on the validation split;
the test split is evaluated once, at the end. The output folder then holds the model, its image processor, its model
card `README.md`, `recipe.yaml`, `metrics.json`, `results.md`, `sparsity_report.json` and `figures/`. An interrupted
run goes on with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from transformers.utils import logging

from vpns_hf import SparsityReport, VPNsTrainer, VPNsTrainingArguments
from vpns_hf.data import TRANSFER_TASKS
from vpns_hf.experiments import DataArguments, DryRunArguments, Experiment, ModelArguments, parse_recipe
from vpns_hf.experiments.dry_run import PlannedRun, dry_run
from vpns_hf.methods import get_method
from vpns_hf.metrics import METRICS, predicted_classes
from vpns_hf.report import (
    Result,
    SubnetworkCard,
    plot_confusion,
    plot_density,
    plot_prompt,
    plot_training,
    results_markdown,
    results_table,
)
from vpns_hf.report.confusion import MAX_CONFUSION_CLASSES
from vpns_hf.report.tables import blocks_table

DEMO = Path(__file__).parent / "vit" / "demo.yaml"
PACKAGES = ("vpns-hf", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm")


@dataclass
class RecipeArguments(DryRunArguments):
    """What this recipe does besides pruning."""

    references: list[str] = field(
        default_factory=lambda: ["dense"],
        metadata={
            "help": "Methods to run as well, for the table: 'dense' is the dense model tuned for as many optimizer "
            "steps, 'vpns_zero_prompt' is the same loop without a prompt; 'none' runs none."
        },
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the pruned model, as the Hub spells it; by default the backbone's own."},
    )

    def __post_init__(self) -> None:
        if self.references == ["none"]:
            self.references = []


class Recipe(Experiment):
    """The pruning run and its references.

    Args:
        model_args, data_args, args, recipe_args: the parsed arguments.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        args: VPNsTrainingArguments,
        recipe_args: RecipeArguments,
    ):
        super().__init__(model_args, data_args, args)
        self.recipe_args = recipe_args
        self.folder = Path(args.output_dir)

    def reference_arguments(self, method: str, steps: int) -> VPNsTrainingArguments:
        """Arguments of a reference: a control is run like the method itself, any other for as many steps in all."""
        args = copy.copy(self.args)
        args.method, args.output_dir, args.push_to_hub = method, str(self.folder / method), False
        if not get_method(method).is_control:
            args.total_max_steps = steps
        if not get_method(method).uses_prompt:
            args.eval_prompt = "without"
        return args

    def license(self) -> str | None:
        """The licence that was given, else that of the backbone's model card, if it has one that can be read."""
        if self.recipe_args.license:
            return self.recipe_args.license
        backbone = Path(self.model_args.model_name_or_path)
        try:
            card = ModelCard.load(
                backbone / "README.md" if backbone.is_dir() else str(backbone), ignore_metadata_errors=True
            )
        except (OSError, ValueError):
            return None
        return card.data.license

    def card(self, trainer: VPNsTrainer, results: list[Result], sparsity: SparsityReport) -> SubnetworkCard:
        """The model card: what this run has shown."""
        backbone, data = self.model_args.model_name_or_path, self.data_args.dataset_name
        captions = {
            "prompt": "The learned prompt",
            "training": "Accuracy over training",
            "density": "Density per layer",
            "confusion": "Confusion of the classes",
        }
        return SubnetworkCard(
            title=Path(trainer.hub_model_id or self.folder).name,
            repo_id=trainer.hub_model_id or self.folder.name,
            base_model=public_name(backbone),
            base_model_is_on_hub=not Path(backbone).is_dir(),
            dataset=public_name(data),
            dataset_id=None if Path(data).is_dir() else TRANSFER_TASKS[data].path if data in TRANSFER_TASKS else data,
            split="test",
            images=self.splits["test"].num_rows,
            method=trainer.method.description,
            results=results,
            sparsity=sparsity,
            stages=trainer.stage_settings(),
            settings={
                "seed": str(self.args.seed),
                "batch size": str(self.args.train_batch_size),
                "images": ", ".join(f"{split.num_rows:,} {name}" for name, split in self.splits.items()),
            },
            uses_prompt=trainer.model.config.use_prompt,
            has_prompt=trainer.model.prompt is not None,
            figures={
                caption: f"figures/{name}.png"
                for name, caption in captions.items()
                if (self.folder / f"figures/{name}.png").is_file()
            },
            license=self.license(),
        )

    def provenance(self) -> str:
        """`recipe.yaml`: the exact arguments, and as comments the package versions and what data they met."""
        groups = (asdict(self.model_args), asdict(self.data_args), self.args.to_dict(), asdict(self.recipe_args))
        arguments = {key: _portable(value) for group in groups for key, value in group.items()} | {"token": None}
        facts = {
            "packages": {name: version(name) for name in PACKAGES},
            "images": {name: split.num_rows for name, split in self.splits.items()},
            "rows": self.splits.digests(),
        }
        comments = "".join(f"# {line}\n" for line in yaml.safe_dump(facts, sort_keys=False).splitlines())
        return comments + yaml.safe_dump(json.loads(json.dumps(arguments, default=str)))


def _portable(value: Any) -> Any:
    """A path below the folder that the run was started in, relative to that: the rest is of no use to others."""
    here = Path.cwd()
    is_below = isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(here)
    return str(Path(value).relative_to(here)) if is_below else value


def public_name(path: str) -> str:
    """A Hub id as it is; of a local folder its name and that of the folder it is in."""
    return "/".join(Path(path).resolve().parts[-2:]) if Path(path).is_dir() else path


def main() -> None:
    """Prune, train the reference, save, and report."""
    logging.disable_progress_bar()  # those of loading and saving weights; training keeps its own
    recipe = Recipe(
        *parse_recipe((ModelArguments, DataArguments, VPNsTrainingArguments, RecipeArguments), default_config=DEMO)
    )
    if recipe.recipe_args.dry_run:
        return dry_run([PlannedRun(recipe.args.method, recipe, recipe.args)])
    resume = recipe.args.resume_from_checkpoint
    trainer = recipe.trainer(recipe.args)
    trainer.train(resume_from_checkpoint=resume)
    # Not yet pushed: the report and the card follow.
    trainer.save_model(str(recipe.folder), _internal_call=True)
    steps = sum(stage.steps for stage in trainer.finished_stages if stage.name != "warm_up")
    references = {}
    for method in recipe.recipe_args.references:
        references[method] = recipe.trainer(recipe.reference_arguments(method, steps))
        references[method].train(resume_from_checkpoint=resume)
        references[method].save_model()
    measured = evaluate(recipe, trainer, references)
    if trainer.is_world_process_zero():
        report(recipe, trainer, references, measured)
    if recipe.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


@dataclass(frozen=True)
class Measured:
    """A row of the table, with all metrics of the test split and the predictions without the prompt.

    Args:
        result: the row.
        metrics: by name, without the prefix of the split.
        labels, predicted: classes [n].
    """

    result: Result
    metrics: dict[str, float]
    labels: np.ndarray
    predicted: np.ndarray


def evaluate(recipe: Recipe, trainer: VPNsTrainer, references: dict[str, VPNsTrainer]) -> list[Measured]:
    """The rows of the table, each one pass over the test split without and one with the prompt."""
    rows = [("after tuning", run) for run in references.values()]
    if any(stage.name == "search" for stage in trainer.finished_stages):
        args = copy.copy(trainer.args)
        args.push_to_hub = False
        searched = VPNsTrainer(model=trainer.load_stage("search"), args=args, eval_dataset=trainer.eval_dataset)
        rows.append(("before tuning", searched))
    rows.append(("after tuning", trainer))
    return [measure(recipe, name, run) for name, run in rows]


def measure(recipe: Recipe, name: str, run: VPNsTrainer) -> Measured:
    """Evaluate a model on the test split."""
    output = run.predict(recipe.eval_split("test"), metric_key_prefix="test")
    metrics = {key.removeprefix("test_"): value for key, value in output.metrics.items()}
    reported = {key: value for key, value in metrics.items() if key.removesuffix("_prompted") in METRICS}
    steps = {"before tuning": run.finished_stages[:-1]}.get(name, run.finished_stages)
    weights = Path(run.args.output_dir) / "model.safetensors"
    result = Result(
        name=f"{run.args.method} {name}",
        sparsity=run.model.sparsity,
        accuracy=metrics["accuracy"],
        accuracy_prompted=metrics.get("accuracy_prompted"),
        steps=sum(stage.steps for stage in steps),
        file_bytes=None if name == "before tuning" else weights.stat().st_size,
    )
    return Measured(result, reported, output.label_ids, predicted_classes(output.predictions))


def report(recipe: Recipe, trainer: VPNsTrainer, references: dict[str, VPNsTrainer], measured: list[Measured]) -> None:
    """Print the tables and write numbers and figures into the output folder."""
    folder, sparsity = recipe.folder, trainer.model.sparsity_report()
    results = [each.result for each in measured]
    console = Console()
    console.print(results_table(results, title=f"Test split, {recipe.splits['test'].num_rows:,} images"))
    console.print(blocks_table(sparsity))
    (folder / "recipe.yaml").write_text(recipe.provenance(), encoding="utf-8")
    (folder / "results.md").write_text(results_markdown(results) + "\n", encoding="utf-8")
    (folder / "sparsity_report.json").write_text(sparsity.to_json(), encoding="utf-8")
    metrics = {
        "test": [asdict(each.result) | each.metrics for each in measured],
        "validation": {stage.name: stage.metrics for stage in trainer.finished_stages},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    draw(recipe, trainer, references, sparsity)
    draw_confusion(recipe, measured[-1])
    card = recipe.card(trainer, results, sparsity)
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    card.save(folder / "README.md")
    console.print(f"The pruned model, its numbers and figures are in {folder}.")


def draw(recipe: Recipe, trainer: VPNsTrainer, references: dict[str, VPNsTrainer], sparsity: SparsityReport) -> None:
    """The three figures."""
    figures = recipe.folder / "figures"
    plot_density(sparsity, figures / "density.png")
    levels = {name: run.finished_stages[-1].metrics["eval_accuracy"] for name, run in references.items()}
    plot_training(trainer.logs(), figures / "training.png", dense=levels)
    if trainer.model.prompt is not None:
        sample = recipe.eval_split("validation")[0]
        plot_prompt(trainer.model, sample["pixel_values"], figures / "prompt.png")


def draw_confusion(recipe: Recipe, measured: Measured) -> None:
    """The figure of the test split, where its classes are few enough to be read."""
    names = recipe.splits["test"].features["label"].names
    if len(names) <= MAX_CONFUSION_CLASSES:
        path = recipe.folder / "figures/confusion.png"
        plot_confusion(measured.labels, measured.predicted, names, path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
