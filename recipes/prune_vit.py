"""Prune a pretrained image classifier with VPNs, and compare it with the same model fine-tuned densely.

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

import numpy as np
import yaml
from rich.console import Console
from transformers.utils import logging

from vpns_hf import SparsityReport, VPNsTrainer, VPNsTrainingArguments
from vpns_hf.dry_run import PlannedRun, dry_run
from vpns_hf.metrics import METRICS, predicted_classes
from vpns_hf.model_card import SubnetworkCard
from vpns_hf.recipe import DataArguments, DryRunArguments, Experiment, ModelArguments, parse_recipe
from vpns_hf.report import (
    MAX_CONFUSION_CLASSES,
    Result,
    blocks_table,
    plot_confusion,
    plot_density,
    plot_prompt,
    plot_training,
    results_markdown,
    results_table,
)
from vpns_hf.transfer_tasks import TRANSFER_TASKS

DEMO = Path(__file__).parent / "vit" / "demo.yaml"
PACKAGES = ("vpns-hf", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm")


@dataclass
class RecipeArguments(DryRunArguments):
    """What this recipe does besides pruning."""

    dense_reference: bool = field(
        default=True, metadata={"help": "Also fine-tune the dense model, for as many optimizer steps, as a reference."}
    )


class Recipe(Experiment):
    """The pruning run and its dense reference.

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

    def dense_arguments(self, steps: int) -> VPNsTrainingArguments:
        """Arguments of the reference: all weights tuned for this many steps, on the batches that VPNs sees."""
        args = copy.copy(self.args)
        args.method, args.output_dir, args.max_steps = "dense", str(self.folder / "dense"), steps
        args.eval_prompt, args.push_to_hub = "without", False
        return args

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
            title=f"{Path(backbone).name}-{Path(data).name}-{self.args.method}-{sparsity.sparsity:.0%}".rstrip("%"),
            repo_id=self.args.hub_model_id or self.folder.name,
            base_model=Path(backbone).name if Path(backbone).is_dir() else backbone,
            base_model_is_on_hub=not Path(backbone).is_dir(),
            dataset=Path(data).name,
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
        )

    def provenance(self) -> str:
        """`recipe.yaml`: the exact arguments, and as comments the package versions and what data they met."""
        groups = (asdict(self.model_args), asdict(self.data_args), self.args.to_dict(), asdict(self.recipe_args))
        arguments = {key: value for group in groups for key, value in group.items()} | {"token": None}
        facts = {
            "packages": {name: version(name) for name in PACKAGES},
            "images": {name: split.num_rows for name, split in self.splits.items()},
            "rows": self.splits.digests(),
        }
        comments = "".join(f"# {line}\n" for line in yaml.safe_dump(facts, sort_keys=False).splitlines())
        return comments + yaml.safe_dump(json.loads(json.dumps(arguments, default=str)))


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
    trainer.save_model()
    dense = None
    if recipe.recipe_args.dense_reference:
        steps = sum(stage.steps for stage in trainer.finished_stages if stage.name != "warm_up")
        dense = recipe.trainer(recipe.dense_arguments(steps))
        dense.train(resume_from_checkpoint=resume)
        dense.save_model()
    measured = evaluate(recipe, trainer, dense)
    if trainer.is_world_process_zero():
        report(recipe, trainer, dense, measured)
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


def evaluate(recipe: Recipe, trainer: VPNsTrainer, dense: VPNsTrainer | None) -> list[Measured]:
    """The rows of the table, each one pass over the test split without and one with the prompt."""
    searched = VPNsTrainer(model=trainer.load_stage("search"), args=trainer.args, eval_dataset=trainer.eval_dataset)
    rows = [("before tuning", searched), ("after tuning", trainer)]
    if dense is not None:
        rows = [("fine-tuned", dense), *rows]
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


def report(recipe: Recipe, trainer: VPNsTrainer, dense: VPNsTrainer | None, measured: list[Measured]) -> None:
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
    draw(recipe, trainer, dense, sparsity)
    draw_confusion(recipe, measured[-1])
    recipe.card(trainer, results, sparsity).save(folder / "README.md")
    console.print(f"The pruned model, its numbers and figures are in {folder}.")


def draw(recipe: Recipe, trainer: VPNsTrainer, dense: VPNsTrainer | None, sparsity: SparsityReport) -> None:
    """The three figures."""
    figures = recipe.folder / "figures"
    plot_density(sparsity, figures / "density.png")
    reference = None if dense is None else {"dense fine-tuned": dense.finished_stages[-1].metrics["eval_accuracy"]}
    plot_training(trainer.logs(), figures / "training.png", dense=reference)
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
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
