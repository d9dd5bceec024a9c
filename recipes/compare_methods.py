"""Compare pruning methods on one backbone and data set, fairly: one line a cell of (method, sparsity, seed).

    python recipes/compare_methods.py                                         # the embedded demo
    accelerate launch recipes/compare_methods.py --config my.yaml --methods dense vpns hydra omp+prompt \
        --sparsities 0.8 0.9 --seeds 7 17 27 --total_max_steps 400

Each cell appends its line to `output_dir/results.jsonl` when it is done; cells that are there already are skipped, so
the command can be killed and started again, and several may share one folder. Once all cells are done, or with
`--only_report`, it writes `results.md` and `accuracy.png`. With `--total_max_steps` every method makes the same number
of optimizer steps after the warm-up of a new head. The test split is evaluated once a cell, with the last weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers.utils import logging

from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.comparison import (
    Cell,
    CellResult,
    append_result,
    claim,
    comparison_markdown,
    comparison_table,
    differences_markdown,
    plot_comparison,
    read_results,
    summary_markdown,
)
from vpns_hf.methods import get_method
from vpns_hf.recipe import DataArguments, Experiment, ModelArguments, parse_recipe

DEMO = Path(__file__).parent / "comparison" / "demo.yaml"
# They describe a cell, a machine or what is printed, not the setting that cells must share.
NOT_A_SETTING = (
    *("method", "sparsity", "seed", "methods", "sparsities", "seeds", "only_report", "reference", "paper_numbers"),
    *("output_dir", "run_name", "logging_dir", "token", "cache_dir", "disable_tqdm", "logging_steps", "report_to"),
    *("cache_images", "check_duplicates", "preprocessing_num_workers"),
)


@dataclass
class ComparisonArguments:
    """Which cells are run."""

    methods: list[str] = field(
        default_factory=lambda: ["dense", "vpns", "hydra", "omp"],
        metadata={"help": "Methods to compare; `dense` is run once, as the reference for every sparsity."},
    )
    sparsities: list[float] = field(default_factory=lambda: [0.9], metadata={"help": "Sparsities of the cells."})
    seeds: list[int] = field(default_factory=lambda: [7, 17, 27], metadata={"help": "Seeds of the cells."})
    reference: str = field(
        default="vpns", metadata={"help": "Method whose distance to every other is reported, seed by seed."}
    )
    only_report: bool = field(default=False, metadata={"help": "Run no cell; write table and plot of what is there."})
    paper_numbers: str | None = field(
        default=None,
        metadata={"help": "JSON file {method: {sparsity: accuracy}} of published figures to show beside ours."},
    )

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise ValueError(f"`sparsities` has {sparsity}; expected fractions in [0, 1), such as 0.9 for 90 %.")
        for method in self.methods:
            get_method(method)

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order given; the dense ones once."""
        for sparsity in self.sparsities:
            for method in self.methods:
                if method != "dense" or sparsity == self.sparsities[0]:
                    for seed in self.seeds:
                        yield Cell(method, 0.0 if method == "dense" else sparsity, seed)


class Comparison:
    """Runs cells and reports them.

    Args:
        experiment: backbone and data.
        args: the arguments that all cells share.
        wanted: which cells are run.
    """

    def __init__(self, experiment: Experiment, args: VPNsTrainingArguments, wanted: ComparisonArguments):
        self.experiment, self.args, self.wanted = experiment, args, wanted
        self.folder = Path(args.output_dir)
        self.results = self.folder / "results.jsonl"
        self.settings = _digest(experiment, args)
        if args.eval_prompt == "with":
            raise ValueError("Methods are compared without the prompt; use `eval_prompt` 'both' or 'without'.")

    def run(self) -> None:
        """Run the cells that are not there yet and that no other process is running."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cells = list(self.wanted.cells())
        for index, cell in enumerate(cells):
            with self._turn(cell) as is_ours:
                if is_ours:
                    self._finish(self.run_cell(cell), f"[cell {index + 1} of {len(cells)}]")

    @contextmanager
    def _turn(self, cell: Cell) -> Iterator[bool]:
        """Whether this launch runs the cell: decided by its main process, for all of its processes."""
        main_process = PartialState().is_main_process
        with claim(self.folder, cell) if main_process else nullcontext(False) as is_ours:
            # Every process reads, so that all of them meet an error. Another launch may have finished the cell.
            is_done = cell in self._done()
            yield broadcast_object_list([is_ours and not is_done])[0]

    def _finish(self, result: CellResult, place: str) -> None:
        """Keep the line of a cell, and only then drop its folder."""
        if PartialState().is_main_process:
            append_result(self.results, result)
            shutil.rmtree(self._cell_folder(result.cell))
            cell = f"{result.method}, sparsity {result.sparsity:.0%}, seed {result.seed}"
            print(f"{place} {cell}: accuracy {result.accuracy:.2%}, {result.seconds:.0f} s", flush=True)

    def _cell_folder(self, cell: Cell) -> Path:
        # Half a cell of other settings must not be gone on with.
        return self.folder / "cells" / f"{cell.method}-{cell.sparsity:g}-{cell.seed}-{self.settings}"

    def _done(self) -> set[Cell]:
        results = read_results(self.results)
        for result in results:
            if result.settings != self.settings:
                raise ValueError(
                    f"{self.results} holds cells of other settings ({result.settings}; these are {self.settings}); "
                    "choose another `output_dir`."
                )
        return {Cell(result.method, result.sparsity, result.seed) for result in results}

    def run_cell(self, cell: Cell) -> CellResult:
        """Train one cell and measure it on the test split."""
        args = copy.copy(self.args)
        args.method, args.sparsity, args.seed = cell.method, cell.sparsity, cell.seed
        args.output_dir = str(self._cell_folder(cell))
        trainer = self.experiment.trainer(args)
        validation = trainer.eval_dataset
        if args.eval_strategy == "no":
            # Nor after every stage: a method in rounds has many.
            trainer.eval_dataset = None
        trainer.train(resume_from_checkpoint=True)
        return self._measure(cell, trainer, validation)

    def _measure(self, cell: Cell, trainer: VPNsTrainer, validation: Any) -> CellResult:
        test = trainer.evaluate(self.experiment.eval_split("test"), metric_key_prefix="test")
        stages = trainer.finished_stages
        costs = [stage.cost for stage in stages]
        warm_up = sum(stage.steps for stage in stages if stage.name == "warm_up")
        return CellResult(
            method=cell.method,
            sparsity=cell.sparsity,
            seed=cell.seed,
            accuracy=test["test_accuracy"],
            accuracy_prompted=test.get("test_accuracy_prompted"),
            validation_accuracy=trainer.evaluate(validation)["eval_accuracy"],
            measured_sparsity=trainer.model.sparsity,
            steps=sum(stage.steps for stage in stages) - warm_up,
            warm_up_steps=warm_up,
            images=sum(cost.images for cost in costs),
            forward_images=sum(cost.forward_images for cost in costs),
            backward_images=sum(cost.backward_images for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
            trained_weights=costs[-1].trained_weights,
            splits={
                "weights, masks, prompt, scores": "train",
                "checkpoint": "validation" if self.args.load_best_model_at_end else "none: the last weights",
                "accuracy": "test",
            },
            settings=self.settings,
        )

    def report(self) -> None:
        """Print the table, and write it and the plot."""
        results = read_results(self.results)
        if not results:
            raise ValueError(f"{self.results} holds no cell yet; run some before you ask for the report.")
        methods, sparsities = self.wanted.methods, sorted(self.wanted.sparsities)
        paper = _read_paper_numbers(self.wanted.paper_numbers)
        Console().print(comparison_table(results, methods, sparsities, paper))
        explained = "\n".join(f"- `{method}`: {get_method(method).description}" for method in methods)
        parts = (
            summary_markdown(results, methods, sparsities),
            differences_markdown(results, [(self.wanted.reference, method) for method in methods]),
            comparison_markdown(results, methods, sparsities, paper),
            explained,
        )
        (self.folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        controls = {name for name in methods if get_method(name).is_control}
        plot_comparison(results, self.folder / "accuracy.png", controls=controls)


def _digest(experiment: Experiment, *arguments: Any) -> str:
    """A short name of everything that cells must share: arguments that are not at their default, and the data."""
    settings: dict[str, Any] = {"images": {name: split.num_rows for name, split in experiment.splits.items()}}
    for group in (experiment.model_args, experiment.data_args, *arguments):
        for entry in fields(group):
            value = getattr(group, entry.name)
            if entry.init and entry.name not in NOT_A_SETTING and value != entry.default:
                settings[entry.name] = value
    for name in ("model_name_or_path", "dataset_name"):
        # Wherever the files lie.
        settings[name] = Path(settings[name]).name
    if (processes := PartialState().num_processes) > 1:
        # They share the batch size.
        settings["processes"] = processes
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _read_paper_numbers(path: str | None) -> Mapping[tuple[str, float], float] | None:
    if path is None:
        return None
    numbers = json.loads(Path(path).read_text(encoding="utf-8"))
    return {
        (method, float(sparsity)): accuracy for method, row in numbers.items() for sparsity, accuracy in row.items()
    }


def main() -> None:
    """Run the missing cells, then report."""
    logging.disable_progress_bar()
    model_args, data_args, args, wanted = parse_recipe(
        (ModelArguments, DataArguments, VPNsTrainingArguments, ComparisonArguments), default_config=DEMO
    )
    comparison = Comparison(Experiment(model_args, data_args, args), args, wanted)
    if not wanted.only_report:
        comparison.run()
    if args.process_index == 0:
        comparison.report()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
