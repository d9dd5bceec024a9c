"""Format results as tables for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from ..model.sparsity import LayerSparsity, SparsityReport

MISSING = "–"  # noqa: RUF001


def percent(fraction: float | None) -> str:
    """Format a percentage with two digits, rounded to 0 or 100 only where it is exactly that."""
    if fraction is None:
        return MISSING
    if 0 < fraction < 0.00005:
        return "<0.01%"
    return ">99.99%" if 0.99995 <= fraction < 1 else f"{fraction:.2%}"


def _file_size(size: int | None) -> str:
    """Format bytes in decimal units, as the Hub shows them."""
    if size is None:
        return MISSING
    if size < 1000:
        return f"{size} B"
    value, units = size / 1000, iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.95 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


@dataclass(frozen=True)
class Result:
    """One row of the table of results.

    Args:
        name: name of the model, such as "dense after tuning".
        sparsity: fraction of the prunable weights that are masked.
        accuracy: accuracy without the prompt, in [0, 1].
        accuracy_prompted: accuracy with the prompt, in [0, 1]; None where there is none.
        steps: number of optimizer steps that trained it.
        file_bytes: size of the saved weights; None if they were not saved.
    """

    name: str
    sparsity: float
    accuracy: float
    accuracy_prompted: float | None
    steps: int
    file_bytes: int | None


_RESULT_COLUMNS = (
    "model",
    "sparsity",
    "accuracy",
    "accuracy with prompt",
    "share of dense accuracy",
    "optimizer steps",
    "file size",
)


def _result_rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    dense = next((result.accuracy for result in results if result.sparsity == 0), None)
    for result in results:
        yield (
            result.name,
            percent(result.sparsity),
            percent(result.accuracy),
            percent(result.accuracy_prompted),
            f"{result.accuracy / dense:.2%}" if dense else MISSING,
            f"{result.steps:,}",
            _file_size(result.file_bytes),
        )


def results_table(results: Sequence[Result], title: str | None = "Results") -> Table:
    """Format results for the terminal, one row each.

    Args:
        results: rows in order. The share of dense accuracy is `accuracy` (without the prompt) divided by that of the
            first row whose sparsity is 0. Missing values are shown as an en dash.
        title: line above the table; None for no title.
    """
    return terminal_table(_RESULT_COLUMNS, _result_rows(results), title)


def results_markdown(results: Sequence[Result]) -> str:
    """Format the table of [`results_table`] in Markdown, without a title and without a newline at its end."""
    return markdown_table(_RESULT_COLUMNS, _result_rows(results))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table whose first columns are text and the others numbers, without a newline at its end."""
    cells = [columns, *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * text_columns + "---:|" * (len(columns) - text_columns), *lines[1:]])


def terminal_table(columns: Sequence[str], rows: Iterable[tuple[str, ...]], title: str | None) -> Table:
    """Format a table for the terminal whose first column is text and the others numbers."""
    rows = list(rows)
    words = [word for row in rows for word in row[0].split()]
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column(columns[0], overflow="fold", min_width=min(24, max(map(len, words), default=0)))
    for column in columns[1:]:
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for row in rows:
        table.add_row(escape(row[0]), *row[1:])
    return table


def blocks_table(report: SparsityReport) -> Table:
    """Format the sparsity of every block for the terminal, and of all blocks in the last row.

    Args:
        report: sparsity of each layer; blocks have the names that `ignore_modules` takes. The share of
            multiply-accumulates is an en dash where they were not counted.
    """
    columns = ("block", "sparsity", "weights kept", "weights", "MACs kept")
    table = terminal_table(columns, map(_block_row, report.blocks().values()), "Sparsity by block")
    table.add_section()
    table.add_row(*_block_row(report.whole()), style="bold")
    return table


def _block_row(block: LayerSparsity) -> tuple[str, ...]:
    macs = block.kept_macs / block.macs if block.macs else None
    return block.name, percent(block.sparsity), f"{block.kept:,}", f"{block.total:,}", percent(macs)
