"""What a comparison of pruning methods has shown: one line of JSON a cell, and tables and a picture of all cells.

A cell is one method at one sparsity with one seed; where masks are transferred, also one target task and one way to
tune on it. Several processes may work on the cells of one folder:

    for cell in cells:
        with claim(folder, cell) as won:
            if won and cell not in {result.cell for result in read_results(path)}:
                append_result(path, run(cell))
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, cycle
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation
from rich.console import Group

from .report import MISSING, markdown_table, percent, save_figure, say, terminal_table

logger = logging.getLogger(__name__)

DENSE = "dense"
FULL = "full"


# Cells and their results ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        method: name of the pruning method; `"dense"` is the reference.
        sparsity: fraction of the prunable weights to remove; 0 for the reference.
        seed: of the new head, the order of the data and everything else that is drawn.
        task: the task that the mask was transferred to; None where masks are found on the task itself.
        mode: what was trained on it under the mask; None as there.
    """

    method: str
    sparsity: float
    seed: int
    task: str | None = None
    mode: str | None = None

    def __str__(self) -> str:
        parts = (self.task, self.method, self.mode, f"sparsity {self.sparsity:.0%}", f"seed {self.seed}")
        return ", ".join(part for part in parts if part is not None)


def row_name(method: str, mode: str | None) -> str:
    """Name of a row in tables: the method, and the mode unless that is `"full"`."""
    return method if mode in (None, FULL) else f"{method}, {mode}"


_AMOUNTS = (
    "steps",
    "warm_up_steps",
    "images",
    "forward_images",
    "backward_images",
    "seconds",
    "trained_weights",
)


@dataclass(frozen=True)
class CellResult:
    """What one run has shown and what it cost.

    Args:
        method, sparsity, seed: the cell; the sparsity is the one asked for.
        accuracy: test accuracy without the prompt, in [0, 1].
        accuracy_prompted: test accuracy with the prompt, in [0, 1]; None where there is none.
        validation_accuracy: in [0, 1]; None where it was not measured.
        measured_sparsity: fraction of the prunable weights that were removed.
        steps: optimizer steps, without those of the warm-up of a new head.
        warm_up_steps: optimizer steps of that warm-up.
        images: training images seen.
        forward_images, backward_images: images that went forward and backward through the backbone, for training and
            for scoring.
        seconds: of training and scoring, without evaluation.
        trained_weights: number of weights trained in the last stage.
        splits: which split chose what.
        settings: short digest of everything that must be equal for two results to be comparable.
        task, mode: of the cell.
        mask_steps: optimizer steps that found the mask on the source task, without its warm-up; None where the mask
            was found on the task itself or is a shared one.
        metrics: the other metrics of the test split without the prompt, by name, as fractions.

    Raises:
        ValueError: a number is out of its range.
    """

    method: str
    sparsity: float
    seed: int
    accuracy: float
    accuracy_prompted: float | None
    validation_accuracy: float | None
    measured_sparsity: float
    steps: int
    warm_up_steps: int
    images: int
    forward_images: int
    backward_images: int
    seconds: float
    trained_weights: int
    splits: dict[str, str]
    settings: str
    task: str | None = None
    mode: str | None = None
    mask_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sparsity", "measured_sparsity", "accuracy", "accuracy_prompted", "validation_accuracy"):
            _check_range(name, vars(self)[name], 1)
        for name in _AMOUNTS:
            _check_range(name, vars(self)[name], math.inf)

    @property
    def cell(self) -> Cell:
        """Which run this is."""
        return Cell(self.method, self.sparsity, self.seed, self.task, self.mode)

    @property
    def row(self) -> str:
        """Name of its row in tables."""
        return row_name(self.method, self.mode)

    def to_line(self) -> str:
        """One line of JSON, without a newline at its end."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> CellResult:
        """The result that [`to_line`] wrote.

        Args:
            line: one JSON object with all fields.

        Raises:
            ValueError: the line is none.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"This is no result of a cell: {error}.") from error


def _check_range(name: str, value: float | None, most: float) -> None:
    if value is not None and not 0 <= value <= most:
        raise ValueError(f"`{name}` is {value}; expected a number from 0 to {most}.")


# The file of results -------------------------------------------------------------------------------------------------

# Ends a line that a kill cut off, so that it is not taken for a damaged one.
_CUT_OFF = "# cut off"


def read_results(path: str | os.PathLike[str]) -> list[CellResult]:
    """The results of a file, one JSON line each.

    A line that was cut off by a kill is skipped with a warning: its cell counts as not run. Of two results of one cell
    with the same settings the first counts.

    Args:
        path: the file; a missing one holds no results.

    Raises:
        ValueError: a whole line is no result.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().decode(errors="replace").split("\n")
    results = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(_CUT_OFF):
            logger.warning("Line %d of %s is cut off and skipped.", number, path)
            continue
        try:
            results.append(CellResult.from_line(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is damaged: {error}") from error
    if rest:
        logger.warning("The last line of %s is cut off and skipped.", path)
    return _distinct(results)


def append_result(path: str | os.PathLike[str], result: CellResult) -> None:
    """Append one line to the file of results, whole or not at all as far as other processes of this machine can see.

    Args:
        path: the file; it is made if missing, with the folders it needs.
        result: what to write.

    Raises:
        OSError: the line could not be written whole, as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # The half of a line that another process is writing would look cut off.
        with FileLock(f"{path}.lock"):
            line = f"{_end_cut_off_line(file)}{result.to_line()}\n".encode()
            written = os.write(file, line)
        if written < len(line):
            raise OSError(f"A result was cut off while it was written to {path}.")
        os.fsync(file)
    finally:
        os.close(file)


def _end_cut_off_line(file: int) -> str:
    """What to write before a new line: nothing, unless the file ends within a line."""
    if not (size := os.fstat(file).st_size):
        return ""
    os.lseek(file, size - 1, os.SEEK_SET)
    return "" if os.read(file, 1) == b"\n" else f"{_CUT_OFF}\n"


def _distinct(results: Iterable[CellResult]) -> list[CellResult]:
    first: dict[tuple[Cell, str], CellResult] = {}
    for result in results:
        first.setdefault((result.cell, result.settings), result)
    return list(first.values())


@contextmanager
def claim(folder: str | os.PathLike[str], cell: Cell) -> Iterator[bool]:
    """Claim a cell for the length of a `with` block, so that no other process that asks runs it as well.

    The operating system releases the claim of a process that ends in any way. Another process may have finished the
    cell just before it was claimed, so read the results again once the claim is won.

    Args:
        folder: where the lock files are, one a cell; it is made if missing.
        cell: what to run.

    Returns:
        Whether the claim was won.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = (cell.method, cell.sparsity, cell.seed, cell.task, cell.mode)
    name = quote("-".join(str(part) for part in parts if part is not None) + ".lock", safe="")
    lock = FileLock(folder / name, blocking=False)
    try:
        lock.acquire()
        won = True
    except Timeout:
        won = False
    try:
        yield won
    finally:
        lock.release()


# Statistics ----------------------------------------------------------------------------------------------------------


def _comparable(results: Iterable[CellResult]) -> list[CellResult]:
    """The results, each cell once.

    Raises:
        ValueError: they were measured with different settings.
    """
    results = _distinct(results)
    if len(settings := sorted({result.settings for result in results})) > 1:
        raise ValueError(f"Results of different settings cannot be compared: {', '.join(settings)}.")
    return results


def _methods(results: Iterable[CellResult]) -> list[str]:
    """Rows in order of first appearance, without the reference."""
    return [row for row in dict.fromkeys(result.row for result in results) if row != DENSE]


def _select(results: Iterable[CellResult], method: str, sparsity: float) -> list[CellResult]:
    """All seeds of a row at one sparsity; the reference stands for every sparsity."""
    return [
        result
        for result in results
        if result.row == method and (result.method == DENSE or result.sparsity == sparsity)
    ]


def _spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; a single value shows none."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class PairedDifference:
    """How far a method is ahead of a baseline at one sparsity, over the seeds that both have run.

    Args:
        method, baseline: the accuracy of the baseline is subtracted from that of the method.
        sparsity: of the method, and of the baseline unless that is `"dense"`.
        mean: mean difference of the test accuracies in percentage points.
        sd: sample standard deviation of the differences; None for a single one.
        n: number of seeds.
    """

    method: str
    baseline: str
    sparsity: float
    mean: float
    sd: float | None
    n: int


def paired_differences(results: Sequence[CellResult], method: str, baseline: str) -> list[PairedDifference]:
    """Differences of test accuracy without the prompt, seed by seed, for each sparsity that both have run.

    Runs of the same seed share the initial head and the order of the data, so their difference varies less than the
    accuracies do.

    Args:
        results: of any methods.
        method, baseline: names of two methods.

    Raises:
        ValueError: the results were measured with different settings.
    """
    results = _comparable(results)
    sparsities = sorted({result.sparsity for result in results if result.row == method})
    pairs = ((sparsity, _seed_differences(results, method, baseline, sparsity)) for sparsity in sparsities)
    return [
        PairedDifference(method, baseline, sparsity, statistics.fmean(values), _spread(values), len(values))
        for sparsity, values in pairs
        if values
    ]


def _seed_differences(results: Sequence[CellResult], method: str, baseline: str, sparsity: float) -> list[float]:
    ours, theirs = (
        {result.seed: result.accuracy for result in _select(results, name, sparsity)} for name in (method, baseline)
    )
    return [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


# Tables --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A method at one sparsity, and what of the rest of its table it is compared with."""

    method: str
    runs: list[CellResult]
    dense: list[CellResult]
    seeds: int
    paper: float | None


@dataclass(frozen=True)
class _Block:
    """The table of one sparsity."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _of_seeds(measured: Callable[[CellResult], float | None]) -> Callable[[_Row], str | None]:
    def text(row: _Row) -> str | None:
        return _mean_and_spread([value for run in row.runs if (value := measured(run)) is not None], row.seeds)

    return text


def _mean_and_spread(accuracies: Sequence[float], seeds: int) -> str | None:
    if not accuracies:
        return None
    spread = _spread(accuracies)
    text = f"{100 * statistics.fmean(accuracies):.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    return text if len(accuracies) == seeds else f"{text} (n={len(accuracies)})"


def _difference(row: _Row) -> str | None:
    if not row.runs or not row.dense or row.method == DENSE:
        return None
    ours, dense = (statistics.fmean(run.accuracy for run in runs) for runs in (row.runs, row.dense))
    return f"{100 * (ours - dense):+.2f}"


def _paper(row: _Row) -> str | None:
    return None if row.paper is None else f"{100 * row.paper:.2f}"


def _measured(row: _Row) -> str | None:
    return percent(statistics.fmean(run.measured_sparsity for run in row.runs)) if row.runs else None


def _deviates(row: _Row) -> bool:
    """Whether the sparsity is not the one asked for, by more than the rounding to whole weights explains."""
    return any(abs(run.measured_sparsity - run.sparsity) >= 0.0005 for run in row.runs)


def _mean(value: Callable[[CellResult], float], digits: int = 0) -> Callable[[_Row], str | None]:
    def text(row: _Row) -> str | None:
        return f"{statistics.fmean(map(value, row.runs)):,.{digits}f}" if row.runs else None

    return text


def _metric(name: str) -> Callable[[_Row], str | None]:
    return _of_seeds(lambda run: run.metrics.get(name))


_prompted = _of_seeds(lambda run: run.accuracy_prompted)
_ACCURACY = "accuracy (%)"
_MASK_STEPS = "steps for the mask"
_COLUMNS: dict[str, Callable[[_Row], str | None]] = {
    "method": lambda row: row.method,
    _ACCURACY: _of_seeds(lambda run: run.accuracy),
    "with prompt (%)": _prompted,
    "vs dense (points)": _difference,
    "paper (its own setting, %)": _paper,
    "measured sparsity": _measured,
    _MASK_STEPS: _mean(lambda run: run.mask_steps or 0),
    "steps": _mean(lambda run: run.steps),
    "images forward (k)": _mean(lambda run: run.forward_images / 1000, 1),
    "images backward (k)": _mean(lambda run: run.backward_images / 1000, 1),
    "seconds": _mean(lambda run: run.seconds),
    "trained weights": _mean(lambda run: run.trained_weights),
}
# Columns that are only shown if this is true of a row.
_OPTIONAL: dict[str, Callable[[_Row], bool]] = {
    "with prompt (%)": lambda row: _prompted(row) is not None,
    "paper (its own setting, %)": lambda row: row.paper is not None,
    "measured sparsity": _deviates,
    _MASK_STEPS: lambda row: any(run.mask_steps is not None for run in row.runs),
}

Paper = Mapping[tuple[str, float], float]


def comparison_table(
    results: Sequence[CellResult],
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    paper: Paper | None = None,
) -> Group:
    """The tables of [`comparison_markdown`] for the terminal, with the same arguments and errors."""
    blocks = _blocks(results, methods, sparsities, paper or {})
    tables = [terminal_table(block.columns, block.rows, block.title) for block in blocks]
    for table in tables:
        # rich narrows the other columns to their words then, so that the table fits.
        table.columns[0].no_wrap = True
    return Group(*tables)


def comparison_markdown(
    results: Sequence[CellResult],
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    paper: Paper | None = None,
) -> str:
    """One table a sparsity in Markdown, each with a line above it, and without a newline at the end.

    Rows are methods, below the reference `"dense"`. Accuracies are means over the seeds and sample standard deviations
    in percent; the number of seeds is given where it is not the largest of the table. The difference to dense is that
    of the mean accuracies without the prompt, in percentage points. Costs are means; steps do not count the warm-up of
    a new head. What was not run or has no such number is shown as an en dash. The columns for accuracies with the
    prompt and of the papers are left out where they would be empty, as is that for the measured sparsity where it is
    the one asked for.

    Args:
        results: of any methods, but of one setting.
        methods: in the order to show; None: in order of first appearance.
        sparsities: in the order to show; None: all that were run, in rising order.
        paper: accuracies in [0, 1] that papers report in settings of their own, by method and sparsity.

    Raises:
        ValueError: the results were measured with different settings, or an accuracy of `paper` is not in [0, 1].
    """
    blocks = _blocks(results, methods, sparsities, paper or {})
    return "\n\n".join(f"**{block.title}**\n\n{markdown_table(block.columns, block.rows)}" for block in blocks)


def summary_markdown(
    results: Sequence[CellResult],
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
) -> str:
    """One table in Markdown of the accuracies alone: a row a method, a column a sparsity.

    Arguments and errors as of [`comparison_markdown`].
    """
    blocks = _blocks(results, methods, sparsities, {})
    accuracy = [block.columns.index(_ACCURACY) for block in blocks]
    columns = ("test accuracy (%)", *(block.title.partition(",")[0] for block in blocks))
    rows = [
        (rows[0][0], *(row[column] for row, column in zip(rows, accuracy, strict=True)))
        for rows in zip(*(block.rows for block in blocks), strict=True)
    ]
    return markdown_table(columns, rows)


def differences_markdown(results: Sequence[CellResult], pairs: Sequence[tuple[str, str]]) -> str:
    """A table in Markdown of differences between two methods in percentage points, paired by seed.

    Args:
        results: of one setting.
        pairs: (method, baseline); those without a common cell are left out.
    """
    rows = [
        (
            f"{method} - {baseline}",
            _percentage(difference.sparsity),
            f"{difference.mean:+.2f}" + ("" if difference.sd is None else f" ± {difference.sd:.2f}"),
            str(difference.n),
        )
        for method, baseline in pairs
        if method != baseline
        for difference in paired_differences(results, method, baseline)
    ]
    return markdown_table(("paired difference (points)", "sparsity", "mean ± standard deviation", "seeds"), rows)


def transfer_markdown(
    results: Sequence[CellResult],
    tasks: Sequence[str],
    rows: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
) -> str:
    """One table a sparsity in Markdown of masks tuned on other tasks: a row a method and mode, a column a task.

    Accuracies are means over the seeds and sample standard deviations in percent, without the prompt. A row whose runs
    have a prompt is followed by one that was evaluated with it. The last column is the mean over the tasks of the
    difference to `"dense"`, in percentage points; it needs both on every task. What was not run is an en dash.

    Args:
        results: of one setting for each task.
        tasks: in the order of the columns.
        rows: as of [`CellResult.row`], in the order to show; None: in order of first appearance.
        sparsities: in the order to show; None: all that were run, in rising order.

    Raises:
        ValueError: the results of a task were measured with different settings.
    """
    by_task = {task: _comparable(result for result in results if result.task == task) for task in tasks}
    rows = [DENSE, *(row for row in (_methods(results) if rows is None else rows) if row != DENSE)]
    columns = ("method", *(f"{task} (%)" for task in tasks), "vs dense (points, mean of the tasks)")
    tables = []
    for sparsity in _sparsities(results) if sparsities is None else sparsities:
        blocks = [{row: _select(by_task[task], row, sparsity) for row in rows} for task in tasks]
        lines = [line for row in rows for line in _transfer_lines(row, blocks)]
        tables.append(f"**{_percentage(sparsity)} sparse**\n\n{markdown_table(columns, lines)}")
    return "\n\n".join(tables)


def _transfer_lines(row: str, blocks: Sequence[Mapping[str, list[CellResult]]]) -> Iterator[tuple[str, ...]]:
    """The row of the table, and the one evaluated with the prompt where there is a prompt."""
    plain = [[run.accuracy for run in block[row]] for block in blocks]
    prompted = [[run.accuracy_prompted for run in block[row] if run.accuracy_prompted is not None] for block in blocks]
    dense = [[run.accuracy for run in block[DENSE]] for block in blocks]
    for name, accuracies in ((row, plain), (f"{row}, with its prompt", prompted)):
        if name != row and not any(accuracies):
            continue
        seeds = max(len(runs) for block in blocks for runs in block.values())
        texts = [_mean_and_spread(values, seeds) or MISSING for values in accuracies]
        is_whole = name != DENSE and all(accuracies) and all(dense)
        gaps = [
            statistics.fmean(ours) - statistics.fmean(theirs)
            for ours, theirs in zip(accuracies, dense, strict=True)
            if is_whole
        ]
        yield name, *texts, f"{100 * statistics.fmean(gaps):+.2f}" if gaps else MISSING


def _blocks(
    results: Iterable[CellResult], methods: Sequence[str] | None, sparsities: Sequence[float] | None, paper: Paper
) -> list[_Block]:
    results = _comparable(results)
    for (method, sparsity), accuracy in paper.items():
        _check_range(f"paper[{method!r}, {sparsity}]", accuracy, 1)
    wanted = _methods(results) if methods is None else [method for method in methods if method != DENSE]
    sparsities = _sparsities(results) if sparsities is None else sparsities
    return [_block(results, [DENSE, *wanted], sparsity, paper) for sparsity in sparsities]


def _sparsities(results: Iterable[CellResult]) -> list[float]:
    return sorted({run.sparsity for run in results if run.method != DENSE}) or [0.0]


def _block(results: Sequence[CellResult], methods: Sequence[str], sparsity: float, paper: Paper) -> _Block:
    runs = {method: _select(results, method, sparsity) for method in methods}
    seeds = max(map(len, runs.values()))
    rows = [_Row(method, runs[method], runs[DENSE], seeds, _of_paper(paper, method, sparsity)) for method in methods]
    shown = {
        name: text
        for name, text in _COLUMNS.items()
        if name not in _OPTIONAL or any(_OPTIONAL[name](row) for row in rows)
    }
    metrics = dict.fromkeys(name for row in rows for run in row.runs for name in run.metrics)
    shown |= {f"{name.replace('_', ' ')} (%)": _metric(name) for name in metrics}
    cells = [tuple(text(row) or MISSING for text in shown.values()) for row in rows]
    means = {0: "nothing run yet", 1: "1 seed"}.get(seeds, f"mean ± standard deviation of {seeds} seeds")
    return _Block(f"{_percentage(sparsity)} sparse, {means}", tuple(shown), cells)


def _of_paper(paper: Paper, method: str, sparsity: float) -> float | None:
    return paper.get((method, 0.0 if method == DENSE else sparsity))


def _percentage(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


# The picture ---------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours without yellow, which is too light for lines on white, and with a dark grey for black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#404040")
# Their number and that of the colours have no common divisor, so all their pairs differ.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p")
_LINES = ("-", "-.", ":")
_DENSE_COLOUR = "#222222"
# Points (1/72 inch) between neighbouring methods: at most, and of all methods and sparsities together.
_MOST_APART, _ALL_APART = 4, 230


@dataclass(frozen=True)
class _Curve:
    """Test accuracy of a method by sparsity, over its seeds."""

    method: str
    accuracies: dict[float, list[float]]

    @property
    def sparsities(self) -> list[float]:
        return sorted(self.accuracies)

    @property
    def means(self) -> list[float]:
        return [statistics.fmean(self.accuracies[sparsity]) for sparsity in self.sparsities]

    @property
    def spreads(self) -> list[float]:
        """Zero for a single seed, which draws no bar."""
        return [_spread(self.accuracies[sparsity]) or 0.0 for sparsity in self.sparsities]


def plot_comparison(
    results: Sequence[CellResult], path: str | os.PathLike[str], controls: Collection[str] = ()
) -> None:
    """Save the picture of [`comparison_figure`], which has the same arguments and errors, as a PNG.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(comparison_figure(results, controls), path)


def comparison_figure(results: Sequence[CellResult], controls: Collection[str] = ()) -> Figure:
    """Test accuracy without the prompt against sparsity, one line a method, for up to 63 methods.

    Bars are sample standard deviations over the seeds; points of one sparsity are drawn side by side. The reference
    `"dense"` is a horizontal line with a band. Sparsities are spaced by the logarithm of the share of weights that is
    kept. The legend is sorted by, and shows, the accuracy at the highest of the sparsities that most methods have run.

    Args:
        results: of any methods, but of one setting.
        controls: methods that are drawn dashed.

    Raises:
        ValueError: the results were measured with different settings.
    """
    results = _comparable(results)
    curves = [_curve(results, method) for method in _methods(results)]
    dense = [_curve(results, DENSE)] if any(result.row == DENSE for result in results) else []
    figure = Figure(figsize=(10.5, max(5.5, 1.5 + 0.26 * len(curves))), layout="constrained")
    axes = figure.add_subplot()
    for reference in dense:
        _draw_dense(axes, reference)
    _draw_curves(figure, axes, curves, controls)
    _scale_sparsity(axes, sorted({sparsity for curve in curves for sparsity in curve.sparsities}))
    _scale_accuracy(axes, [*curves, *dense])
    if results:
        _add_legend(figure, axes, curves)
    else:
        say(axes, "nothing run yet")
    return figure


def _curve(results: Sequence[CellResult], method: str) -> _Curve:
    accuracies: dict[float, list[float]] = {}
    for result in results:
        if result.row == method:
            accuracies.setdefault(result.sparsity, []).append(result.accuracy)
    return _Curve(method, accuracies)


def _draw_dense(axes: Axes, dense: _Curve) -> None:
    for mean, spread in zip(dense.means, dense.spreads, strict=True):
        label = f"{DENSE} ({percent(mean)})"
        axes.axhline(mean, color=_DENSE_COLOUR, linestyle="--", linewidth=1.4, zorder=1.5, label=label)
        axes.axhspan(mean - spread, mean + spread, color=_DENSE_COLOUR, alpha=0.12, linewidth=0, zorder=0.5)


def _draw_curves(figure: Figure, axes: Axes, curves: Sequence[_Curve], controls: Collection[str]) -> None:
    apart = min(_MOST_APART, _ALL_APART / max(1, sum(len(curve.accuracies) for curve in curves)))
    styles = zip(cycle(_COLOURS), cycle(_MARKERS), count())
    for curve, (colour, marker, index) in zip(curves, styles, strict=False):
        # Points of one sparsity would hide each other's bars.
        shift = ScaledTranslation(apart * (index - (len(curves) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
        axes.errorbar(
            [1 - sparsity for sparsity in curve.sparsities],
            curve.means,
            curve.spreads,
            transform=axes.transData + shift,
            label=curve.method,
            color=colour,
            marker=marker,
            linestyle="--" if curve.method in controls else _LINES[index // len(_COLOURS) % len(_LINES)],
            linewidth=1.3,
            markersize=5,
            elinewidth=0.9,
            capsize=1.5,
        )


def _scale_sparsity(axes: Axes, sparsities: Sequence[float]) -> None:
    densities = [1 - sparsity for sparsity in sparsities]
    if densities:
        axes.set_xscale("log")
        axes.set_xlim(1.25 * max(densities), min(densities) / 1.25)
    axes.xaxis.set_major_locator(FixedLocator(densities))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: _percentage(1 - density)))
    axes.set_xlabel("sparsity")
    axes.spines[["top", "right"]].set_visible(False)


def _scale_accuracy(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Show all bars; matplotlib does not count what is drawn side by side."""
    ranges = [pair for curve in curves for pair in zip(curve.means, curve.spreads, strict=True)]
    lowest = min((mean - spread for mean, spread in ranges), default=0)
    highest = max((mean + spread for mean, spread in ranges), default=1)
    margin = 0.04 * (highest - lowest) or 0.01
    axes.set_ylim(lowest - margin, highest + margin)
    axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_ylabel("test accuracy without prompt (%)")
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)


def _add_legend(figure: Figure, axes: Axes, curves: Sequence[_Curve]) -> None:
    reference = _reference_sparsity(curves)
    at_reference = {
        curve.method: statistics.fmean(curve.accuracies[reference])
        for curve in curves
        if reference in curve.accuracies
    }
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    dense = [label for label in handles if label not in {curve.method for curve in curves}]
    methods = sorted((curve.method for curve in curves), key=lambda method: -at_reference.get(method, -1))
    labels = [f"{method} ({percent(at_reference.get(method))})" for method in methods]
    title = "mean accuracy" + (f" at {_percentage(reference)} sparsity" if curves else "")
    figure.legend(
        [handles[name] for name in (*dense, *methods)],
        [*dense, *labels],
        title=title,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=3.5,
        alignment="left",
    )


def _reference_sparsity(curves: Sequence[_Curve]) -> float:
    """The highest of the sparsities that most methods have run."""
    uses = Counter(sparsity for curve in curves for sparsity in curve.sparsities)
    return max(uses, key=lambda sparsity: (uses[sparsity], sparsity), default=0.0)
