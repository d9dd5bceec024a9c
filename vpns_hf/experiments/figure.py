"""Plot accuracy against sparsity."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count, cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from ..report.style import save_figure, say
from ..report.tables import percent
from .results import DENSE, CellResult
from .tables import comparable, methods_of, percentage, standard_deviation

# Okabe and Ito's colours, without yellow, which is too light for lines on white, and with dark grey for black.
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
        return [standard_deviation(self.accuracies[sparsity]) or 0.0 for sparsity in self.sparsities]


def plot_comparison(
    results: Sequence[CellResult], path: str | os.PathLike[str], controls: Collection[str] = ()
) -> None:
    """Save [`comparison_figure`] as a PNG, with the same arguments and errors.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(comparison_figure(results, controls), path)


def comparison_figure(results: Sequence[CellResult], controls: Collection[str] = ()) -> Figure:
    """Plot test accuracy without the prompt against sparsity, one line a method, for up to 63 methods.

    Bars are sample standard deviations over the seeds; points of one sparsity are drawn side by side. The reference
    `"dense"` is a horizontal line with a band. Sparsities are spaced by the logarithm of the share of weights that is
    kept. The legend is sorted by, and shows, the accuracy at the highest of the sparsities that most methods have run.

    Args:
        results: of any methods, but of one setting.
        controls: methods that are drawn dashed.

    Raises:
        ValueError: the results were measured with different settings.
    """
    results = comparable(results)
    curves = [_curve(results, method) for method in methods_of(results)]
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: percentage(1 - density)))
    axes.set_xlabel("sparsity")
    axes.spines[["top", "right"]].set_visible(False)


def _scale_accuracy(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Show all bars; matplotlib ignores shifted points when it scales an axis."""
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
    title = "mean accuracy" + (f" at {percentage(reference)} sparsity" if curves else "")
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
    """Return the highest of the sparsities that most methods have run."""
    uses = Counter(sparsity for curve in curves for sparsity in curve.sparsities)
    return max(uses, key=lambda sparsity: (uses[sparsity], sparsity), default=0.0)
