"""Compare pruning methods on one backbone and data set: one line of results a cell of (method, sparsity, seed)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from ..methods.table import get_method
from ..saved_files import read_json
from ..saved_folder import writing
from ..training.arguments import VPNsTrainingArguments
from ..values import FRACTIONS, NAME, SEEDS, check_fields
from .arguments import METHOD_NAMES, DataArguments, DryRunArguments, ModelArguments
from .dry_run import PlannedRun, dry_run
from .experiment import Experiment, check_cells
from .figure import plot_comparison
from .parsing import parse_recipe
from .results import DENSE, Cell, CellResult, read_results
from .runner import CellRunner, settings_digest
from .tables import comparison_markdown, comparison_table, differences_markdown, summary_markdown


def main(arguments: Iterable[str] | None = None, default_config: Path | None = None) -> None:
    """Train the cells that have no line in `output_dir/results.jsonl`, then report all of them.

    Args:
        arguments: the command line, as of [`parse_recipe`]; None: `sys.argv[1:]`.
        default_config: the YAML file used when no `--config` is given.

    Raises:
        ValueError: arguments, model and data do not fit each other, or there are lines of other settings.
        OSError: model or data cannot be read, or the output folder cannot be written.
    """
    logging.disable_progress_bar()  # of loading and saving weights; training keeps its own
    classes = (ModelArguments, DataArguments, VPNsTrainingArguments, ComparisonArguments)
    model_args, data_args, args, wanted = parse_recipe(classes, arguments, default_config)
    comparison = Comparison(Experiment(model_args, data_args, args), wanted)
    if wanted.dry_run:
        comparison.dry_run()
        return
    if not wanted.only_report:
        comparison.run(list(wanted.cells()))
    if args.process_index == 0:
        comparison.report()


@dataclass
class ComparisonArguments(DryRunArguments):
    """Arguments of `compare` beside those of model, data and training: the cells."""

    methods: list[str] = field(
        default_factory=lambda: [DENSE, "vpns", "hydra", "omp"],
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
        check_fields(self, {"methods": METHOD_NAMES, "sparsities": FRACTIONS, "seeds": SEEDS, "reference": NAME})
        for method in (*self.methods, self.reference):
            if get_method(method).needs_pruned:
                raise ValueError(
                    f"`methods` has {method!r}, which starts from a pruned model, and a comparison starts from the "
                    "backbone; use `vpns-hf transfer`."
                )
        _read_paper_numbers(self.paper_numbers)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells, in the order given; the dense ones once."""
        for sparsity in self.sparsities:
            for method in self.methods:
                if method != DENSE or sparsity == self.sparsities[0]:
                    for seed in self.seeds:
                        yield Cell(method, 0.0 if method == DENSE else sparsity, seed)


class Comparison(CellRunner):
    """Run cells of (method, sparsity, seed) and report them.

    Args:
        experiment: backbone, data and the arguments of training that all cells share.
        wanted: the cells.

    Raises:
        ValueError: `eval_prompt` leaves out the accuracy without the prompt, or a method or sparsity does not work
            with the pattern.
    """

    def __init__(self, experiment: Experiment, wanted: ComparisonArguments):
        super().__init__(Path(experiment.args.output_dir))
        self.experiment, self.wanted = experiment, wanted
        check_cells(experiment.model_args.pattern, wanted.methods, wanted.sparsities)
        self.digest = settings_digest(experiment)
        if experiment.args.eval_prompt == "with":
            raise ValueError("Methods are compared without the prompt; use `eval_prompt` 'both' or 'without'.")

    def settings(self, cell: Cell) -> str:
        """Return the digest of the experiment: cells have no task of their own."""
        return self.digest

    def arguments(self, cell: Cell) -> VPNsTrainingArguments:
        """Return the shared arguments with method, sparsity, seed and folder of the cell."""
        args = copy.copy(self.experiment.args)
        args.method, args.sparsity, args.seed = cell.method, cell.sparsity, cell.seed
        args.output_dir = str(self.cell_folder(cell))
        return args

    def run_cell(self, cell: Cell) -> CellResult:
        """Train one cell and evaluate it on the test split."""
        trainer = self.experiment.trainer(self.arguments(cell))
        validation = self.train(trainer)
        return self.measure(cell, trainer, self.experiment, validation)

    def dry_run(self) -> None:
        """Print the stages of one cell of each method."""
        firsts = {cell.method: cell for cell in reversed(list(self.wanted.cells()))}
        dry_run(PlannedRun(method, self.experiment, self.arguments(firsts[method])) for method in self.wanted.methods)

    def report(self) -> None:
        """Write `results.md` and `accuracy.png`, and only then print the table."""
        results = read_results(self.results)
        if not results:
            raise ValueError(f"{self.results} holds no cell yet; run some before you ask for the report.")
        methods, sparsities = self.wanted.methods, sorted(self.wanted.sparsities)
        paper = _read_paper_numbers(self.wanted.paper_numbers)
        explained = "\n".join(f"- `{method}`: {get_method(method).description}" for method in methods)
        parts = (
            summary_markdown(results, methods, sparsities),
            differences_markdown(results, [(self.wanted.reference, method) for method in methods]),
            comparison_markdown(results, methods, sparsities, paper),
            explained,
        )
        controls = {name for name in methods if get_method(name).is_control}
        with writing(f"The report in {self.folder}", advice="; the results are saved, so make room and report again"):
            (self.folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            plot_comparison(results, self.folder / "accuracy.png", controls=controls)
        Console().print(comparison_table(results, methods, sparsities, paper))


def _read_paper_numbers(path: str | None) -> Mapping[tuple[str, float], float] | None:
    if path is None:
        return None
    try:
        return {
            (method, float(sparsity)): float(accuracy)
            for method, row in read_json(Path(path)).items()
            for sparsity, accuracy in row.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`paper_numbers` {path} cannot be used ({error}); expected a JSON file of figures."
        ) from error
