"""Format results as tables for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
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


def file_size(size: int | None) -> str:
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


def milliseconds(value: float | None) -> str:
    """Format milliseconds with three digits."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


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
        milliseconds: time of one image on the machine of the run; None if it was not measured.
    """

    name: str
    sparsity: float
    accuracy: float
    accuracy_prompted: float | None
    steps: int
    file_bytes: int | None
    milliseconds: float | None = None


_RESULT_COLUMNS = (
    "model",
    "sparsity",
    "accuracy",
    "accuracy with prompt",
    "share of dense accuracy",
    "optimizer steps",
    "file size",
)
_TIME_COLUMN = "ms an image"


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
            file_size(result.file_bytes),
            *([milliseconds(result.milliseconds)] if _are_timed(results) else []),
        )


def _are_timed(results: Sequence[Result]) -> bool:
    return any(result.milliseconds is not None for result in results)


def _result_columns(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the columns: times only where they were measured, which a run on a GPU does not do."""
    return (*_RESULT_COLUMNS, _TIME_COLUMN) if _are_timed(results) else _RESULT_COLUMNS


def results_table(results: Sequence[Result], title: str | None = "Results") -> TerminalTable:
    """Format results for the terminal, one row each.

    Args:
        results: rows in order. The share of dense accuracy is `accuracy` (without the prompt) divided by that of the
            first row whose sparsity is 0. Missing values are shown as an en dash.
        title: line above the table; None for no title.
    """
    return TerminalTable(_result_columns(results), list(_result_rows(results)), title)


def results_markdown(results: Sequence[Result]) -> str:
    """Format the table of [`results_table`] in Markdown, without a title and without a newline at its end."""
    return markdown_table(_result_columns(results), _result_rows(results))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table whose first columns are text and the others numbers, without a newline at its end."""
    cells = [columns, *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * text_columns + "---:|" * (len(columns) - text_columns), *lines[1:]])


@dataclass(frozen=True)
class TerminalTable:
    """Table for the terminal that shows whole numbers in any width: last columns that do not fit are left out.

    Args:
        columns: headings.
        rows: cells of each row.
        title: line above the table; None for no title.
        total: last row, below a line; None for none.
        text_columns: number of first columns that are text and fold; the others are numbers.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, ...]]
    title: str | None = None
    total: tuple[str, ...] | None = None
    text_columns: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the widest form that fits, and a line that names the columns that do not."""
        count = len(self.columns)
        stacked = [column.replace(" ", "\n") for column in self.columns]
        forms = [list(self.columns), *(stacked[:shown] for shown in range(count, 0, -1))]
        headings = next((form for form in forms if self._width(form) <= options.max_width), forms[-1])
        yield self._table(headings)
        if len(headings) < count:
            yield f"Too narrow for: {', '.join(self.columns[len(headings) :])}."

    def _width(self, headings: Sequence[str]) -> int:
        """Return the least width of the table: two blanks between columns and one at each edge."""
        return sum(self._column_width(index, heading) for index, heading in enumerate(headings)) + 2 * len(headings)

    def _column_width(self, index: int, heading: str) -> int:
        cells = [row[index] for row in (*self.rows, *self._totals())]
        if index >= self.text_columns:
            return max(map(len, (*heading.split("\n"), *cells)))
        words = [word for cell in (heading, *cells) for word in cell.split()]
        return min(24, max(map(len, words)))

    def _table(self, headings: Sequence[str]) -> Table:
        table = Table(title=self.title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for index, heading in enumerate(headings):
            width = self._column_width(index, heading)
            if index < self.text_columns:
                table.add_column(heading, overflow="fold", min_width=width)
            else:
                table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        for row in self.rows:
            table.add_row(*map(escape, row[: len(headings)]))
        for row in self._totals():
            table.add_section()
            table.add_row(*map(escape, row[: len(headings)]), style="bold")
        return table

    def _totals(self) -> list[tuple[str, ...]]:
        return [] if self.total is None else [self.total]


def blocks_table(report: SparsityReport) -> TerminalTable:
    """Format the sparsity of every block for the terminal, and of all blocks in the last row.

    Args:
        report: sparsity of each layer; blocks have the names that `ignore_modules` takes. The share of
            multiply-accumulates is an en dash where they were not counted.
    """
    columns = ("block", "sparsity", "weights kept", "weights", "MACs kept")
    rows = list(map(_block_row, report.blocks().values()))
    return TerminalTable(columns, rows, "Sparsity by block", total=_block_row(report.whole()))


def _block_row(block: LayerSparsity) -> tuple[str, ...]:
    macs = block.kept_macs / block.macs if block.macs else None
    return block.name, percent(block.sparsity), f"{block.kept:,}", f"{block.total:,}", percent(macs)
