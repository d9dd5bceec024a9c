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
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from vpns_hf import VPNsTrainingArguments
from vpns_hf.experiments import DataArguments, DryRunArguments, Experiment, ModelArguments, parse_recipe
from vpns_hf.experiments.dry_run import PlannedRun, dry_run
from vpns_hf.experiments.figure import plot_comparison
from vpns_hf.experiments.results import Cell, CellResult, read_results
from vpns_hf.experiments.runner import CellRunner, settings_digest
from vpns_hf.experiments.tables import comparison_markdown, comparison_table, differences_markdown, summary_markdown
from vpns_hf.methods import get_method

DEMO = Path(__file__).parent / "comparison" / "demo.yaml"


@dataclass
class ComparisonArguments(DryRunArguments):
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


class Comparison(CellRunner):
    """Runs cells and reports them.

    Args:
        experiment: backbone and data.
        args: the arguments that all cells share.
        wanted: which cells are run.
    """

    def __init__(self, experiment: Experiment, args: VPNsTrainingArguments, wanted: ComparisonArguments):
        super().__init__(Path(args.output_dir))
        self.experiment, self.args, self.wanted = experiment, args, wanted
        self.digest = settings_digest(experiment)
        if args.eval_prompt == "with":
            raise ValueError("Methods are compared without the prompt; use `eval_prompt` 'both' or 'without'.")

    def settings(self, cell: Cell) -> str:
        """One for all cells: they have no task of their own."""
        return self.digest

    def arguments(self, cell: Cell) -> VPNsTrainingArguments:
        """The shared arguments with those of the cell."""
        args = copy.copy(self.args)
        args.method, args.sparsity, args.seed = cell.method, cell.sparsity, cell.seed
        args.output_dir = str(self.cell_folder(cell))
        return args

    def run_cell(self, cell: Cell) -> CellResult:
        """Train one cell and measure it on the test split."""
        trainer = self.experiment.trainer(self.arguments(cell))
        validation = self.train(trainer)
        return self.measure(cell, trainer, self.experiment, validation)

    def dry_run(self) -> None:
        """Print what one cell of each method would do."""
        firsts = {cell.method: cell for cell in reversed(list(self.wanted.cells()))}
        dry_run(PlannedRun(method, self.experiment, self.arguments(firsts[method])) for method in self.wanted.methods)

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
    if wanted.dry_run:
        return comparison.dry_run()
    if not wanted.only_report:
        comparison.run(list(wanted.cells()))
    if args.process_index == 0:
        comparison.report()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
