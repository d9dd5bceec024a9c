"""Find subnetworks on one task and tune them on others: one line of results a cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging

from ..model.modeling import PromptedSparseModel
from ..saved_folder import writing
from ..training.arguments import VPNsTrainingArguments
from .arguments import ModelArguments
from .dry_run import PlannedRun, dry_run
from .parsing import parse_recipe
from .results import DENSE, Cell, read_results, row_name
from .tables import comparison_markdown, differences_markdown, transfer_markdown
from .transfer_arguments import FIND, MODES, SHARED, SourceArguments, TransferArguments
from .transfer_runner import Transfer, task_name


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
    flags = list(sys.argv[1:] if arguments is None else arguments)

    def parse(*further: str) -> tuple[Any, ...]:
        classes = (ModelArguments, SourceArguments, VPNsTrainingArguments, TransferArguments)
        return parse_recipe(classes, [*flags, *further], default_config)

    model_args, source_args, args, wanted = parse()
    # Parsed again for each task, which brings its row of the table where neither file nor flags say otherwise.
    transfer = Transfer(model_args, source_args, wanted, lambda task: parse("--dataset_name", task)[2])
    if wanted.dry_run:
        plan(transfer)
        return
    if not wanted.only_report:
        transfer.run(list(transfer.cells()))
    if args.process_index == 0:
        report(transfer)


def plan(transfer: Transfer) -> None:
    """Print the search of each method, and the stages of one cell of each method and mode on each target."""
    wanted, sparsity = transfer.wanted, transfer.sparsities[0]
    source = transfer.source or next(iter(transfer.targets))
    searches = [(method, source) for method in wanted.methods if method not in (DENSE, SHARED)]
    if wanted.prompt_dataset_name is not None:
        searches.append(("vpns", task_name(wanted.prompt_dataset_name)))
    first: dict[tuple[str | None, ...], Cell] = {}
    for cell in transfer.cells():
        first.setdefault((cell.task, cell.method, cell.mode), cell)
    dry_run(_planned_run(transfer, Cell(method, sparsity, wanted.seeds[0], task, FIND)) for method, task in searches)
    dry_run(_planned_run(transfer, cell, _stand_in(transfer, cell)) for cell in first.values())


def _planned_run(
    transfer: Transfer, cell: Cell, prepare: Callable[[PromptedSparseModel], None] | None = None
) -> PlannedRun:
    return PlannedRun(str(cell), transfer.experiment(cell), transfer.arguments(cell), prepare)


def _stand_in(transfer: Transfer, cell: Cell) -> Callable[[PromptedSparseModel], None]:
    """Return a function that applies a mask to the model of a dry run, in which no mask is found."""
    if cell.method in (DENSE, SHARED):
        mask = None if cell.method == DENSE else transfer.wanted.subnetwork
        return lambda model: transfer.move(model, mask, None)
    return PromptedSparseModel.freeze_masks


def report(transfer: Transfer) -> None:
    """Write `results.md`, and only then print the tables.

    Raises:
        ValueError: no cell of these targets has a line yet.
        OSError: the file cannot be written.
    """
    wanted = transfer.wanted
    results = [result for result in read_results(transfer.results) if result.task in transfer.targets]
    if not results:
        raise ValueError(f"{transfer.results} holds no cell of these targets yet; run some before you report.")
    rows = [row_name(method, mode) for method in wanted.methods for mode in transfer.modes_of(method)]
    own = [] if transfer.shared_sparsity is None else [transfer.shared_sparsity]
    sparsities = sorted({*transfer.sparsities, *own})
    summary = transfer_markdown(results, list(transfer.targets), rows, sparsities)
    parts = [summary]
    for task in transfer.targets:
        of_task = [result for result in results if result.task == task]
        parts += [
            f"## {task}",
            differences_markdown(of_task, [(wanted.reference, row) for row in rows]),
            comparison_markdown(of_task, rows, sparsities),
        ]
    parts.append("\n".join(f"- `{mode}`: {MODES[mode].description}" for mode in wanted.modes))
    with writing(f"The report in {transfer.folder}", advice="; the results are saved, so make room and report again"):
        (transfer.folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    Console().print(Markdown(summary))
