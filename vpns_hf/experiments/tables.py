"""Summarise results of a comparison as tables, with spreads and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group

from ..report.tables import MISSING, TerminalTable, markdown_table, percent
from .results import DENSE, CellResult, check_range, distinct_results


def comparable(results: Iterable[CellResult]) -> list[CellResult]:
    """Return the results, each cell once.

    Raises:
        ValueError: they were measured with different settings.
    """
    results = distinct_results(results)
    if len(settings := sorted({result.settings for result in results})) > 1:
        raise ValueError(f"Results of different settings cannot be compared: {', '.join(settings)}.")
    return results


def methods_of(results: Iterable[CellResult]) -> list[str]:
    """Return the rows in order of first appearance, without the reference."""
    return [row for row in dict.fromkeys(result.row for result in results) if row != DENSE]


def _select(results: Iterable[CellResult], method: str, sparsity: float) -> list[CellResult]:
    """Return all seeds of a row at one sparsity; the reference stands for every sparsity."""
    return [
        result
        for result in results
        if result.row == method and (result.method == DENSE or result.sparsity == sparsity)
    ]


def standard_deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class PairedDifference:
    """Lead of a method over a baseline at one sparsity, over the seeds that both have run.

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
    """Compute differences of test accuracy without the prompt, seed by seed, for each sparsity that both have run.

    Runs of the same seed share the initial head and the order of the data, so their difference varies less than the
    accuracies do.

    Args:
        results: of any methods.
        method, baseline: names of two methods.

    Raises:
        ValueError: the results were measured with different settings.
    """
    results = comparable(results)
    sparsities = sorted({result.sparsity for result in results if result.row == method})
    pairs = ((sparsity, _seed_differences(results, method, baseline, sparsity)) for sparsity in sparsities)
    return [
        PairedDifference(method, baseline, sparsity, statistics.fmean(values), standard_deviation(values), len(values))
        for sparsity, values in pairs
        if values
    ]


def _seed_differences(results: Sequence[CellResult], method: str, baseline: str, sparsity: float) -> list[float]:
    ours, theirs = (
        {result.seed: result.accuracy for result in _select(results, name, sparsity)} for name in (method, baseline)
    )
    return [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


@dataclass(frozen=True)
class _Row:
    """A method at one sparsity, with the reference runs and the number of seeds of its table."""

    method: str
    runs: list[CellResult]
    dense: list[CellResult]
    seeds: int
    paper: float | None


@dataclass(frozen=True)
class _Block:
    """Build the table of one sparsity."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _of_seeds(measured: Callable[[CellResult], float | None]) -> Callable[[_Row], str | None]:
    def text(row: _Row) -> str | None:
        return mean_and_spread([value for run in row.runs if (value := measured(run)) is not None], row.seeds)

    return text


def mean_and_spread(accuracies: Sequence[float], seeds: int) -> str | None:
    """Return mean and sample standard deviation in points, and the count where it is not that of the seeds.

    None where nothing was measured.
    """
    if not accuracies:
        return None
    spread = standard_deviation(accuracies)
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
    """Return whether the sparsity is not the one asked for, by more than the rounding to whole weights explains."""
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
_TEACHER_STEPS = "steps of a teacher"
_TEACHER_IMAGES = "images through a teacher (k)"
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
    _TEACHER_STEPS: _mean(lambda run: run.teacher_steps),
    _TEACHER_IMAGES: _mean(lambda run: run.teacher_images / 1000, 1),
}
# Columns that are only shown if this is true of a row.
_OPTIONAL: dict[str, Callable[[_Row], bool]] = {
    "with prompt (%)": lambda row: _prompted(row) is not None,
    "paper (its own setting, %)": lambda row: row.paper is not None,
    "measured sparsity": _deviates,
    _MASK_STEPS: lambda row: any(run.mask_steps is not None for run in row.runs),
    _TEACHER_STEPS: lambda row: any(run.teacher_steps for run in row.runs),
    _TEACHER_IMAGES: lambda row: any(run.teacher_images for run in row.runs),
}
Paper = Mapping[tuple[str, float], float]


def comparison_table(
    results: Sequence[CellResult],
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    paper: Paper | None = None,
) -> Group:
    """Format the tables of [`comparison_markdown`] for the terminal, with the same arguments and errors."""
    blocks = _blocks(results, methods, sparsities, paper or {})
    return Group(*(TerminalTable(block.columns, block.rows, block.title) for block in blocks))


def comparison_markdown(
    results: Sequence[CellResult],
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    paper: Paper | None = None,
) -> str:
    """Format one Markdown table a sparsity, each with a line above it, without a newline at the end.

    Rows are methods, below the reference `"dense"`. Accuracies are means over the seeds and sample standard deviations
    in percent; the number of seeds is given where it is not the largest of the table. The difference to dense is that
    of the mean accuracies without the prompt, in percentage points. Costs are means; steps do not count the warm-up of
    a new head. Missing runs and numbers are shown as an en dash. The columns for accuracies with the
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
    """Format the accuracies alone as one Markdown table: a row a method, a column a sparsity.

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
    """Format differences between two methods, paired by seed, as a Markdown table in percentage points.

    Args:
        results: of one setting.
        pairs: (method, baseline); those without a common cell are left out.
    """
    rows = [
        (
            f"{method} - {baseline}",
            percentage(difference.sparsity),
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
    """Format masks tuned on other tasks as one Markdown table a sparsity: a row a method and mode, a column a task.

    Accuracies are means over the seeds and sample standard deviations in percent, without the prompt. A row whose runs
    have a prompt is followed by one that was evaluated with it. The last column is the mean over the tasks of the
    difference to `"dense"`, in percentage points; it needs both on every task. Missing runs are shown as an en dash.

    Args:
        results: of one setting for each task.
        tasks: in the order of the columns.
        rows: as of [`CellResult.row`], in the order to show; None: in order of first appearance.
        sparsities: in the order to show; None: all that were run, in rising order.

    Raises:
        ValueError: the results of a task were measured with different settings.
    """
    by_task = {task: comparable(result for result in results if result.task == task) for task in tasks}
    rows = [DENSE, *(row for row in (methods_of(results) if rows is None else rows) if row != DENSE)]
    columns = ("method", *(f"{task} (%)" for task in tasks), "vs dense (points, mean of the tasks)")
    tables = []
    for sparsity in _sparsities(results) if sparsities is None else sparsities:
        blocks = [{row: _select(by_task[task], row, sparsity) for row in rows} for task in tasks]
        lines = [line for row in rows for line in _transfer_lines(row, blocks)]
        tables.append(f"**{percentage(sparsity)} sparse**\n\n{markdown_table(columns, lines)}")
    return "\n\n".join(tables)


def _transfer_lines(row: str, blocks: Sequence[Mapping[str, list[CellResult]]]) -> Iterator[tuple[str, ...]]:
    """Yield the row of the table, and the row evaluated with the prompt where there is one."""
    plain = [[run.accuracy for run in block[row]] for block in blocks]
    prompted = [[run.accuracy_prompted for run in block[row] if run.accuracy_prompted is not None] for block in blocks]
    dense = [[run.accuracy for run in block[DENSE]] for block in blocks]
    for name, accuracies in ((row, plain), (f"{row}, with its prompt", prompted)):
        if name != row and not any(accuracies):
            continue
        seeds = max(len(runs) for block in blocks for runs in block.values())
        texts = [mean_and_spread(values, seeds) or MISSING for values in accuracies]
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
    results = comparable(results)
    for (method, sparsity), accuracy in paper.items():
        check_range(f"paper[{method!r}, {sparsity}]", accuracy, 1)
    wanted = methods_of(results) if methods is None else [method for method in methods if method != DENSE]
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
    return _Block(f"{percentage(sparsity)} sparse, {means}", tuple(shown), cells)


def _of_paper(paper: Paper, method: str, sparsity: float) -> float | None:
    return paper.get((method, 0.0 if method == DENSE else sparsity))


def percentage(fraction: float) -> str:
    """Format a fraction as a percentage with at most four digits."""
    return f"{100 * fraction:.4g}%"
