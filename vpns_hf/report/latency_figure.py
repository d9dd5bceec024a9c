"""Plot latency against accuracy."""

from __future__ import annotations

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..latency import LatencyReport
from .style import BLUE, GREEN, GREY, PURPLE, SKY, VERMILLION, save_figure

_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY)


def plot_latency(report: LatencyReport, path: str | os.PathLike[str]) -> None:
    """Save [`latency_figure`] as a PNG, with the same arguments.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(latency_figure(report), path)


def latency_figure(report: LatencyReport) -> Figure:
    """Plot the time of a batch in every runtime, a panel for each batch size and number of threads.

    Points are medians, bars reach from quartile to quartile. The height is the accuracy in percent where it is known
    of every runtime in a panel, with a line for that of the dense model; otherwise each runtime has a line of its own.
    """
    groups = report.groups()
    names = list(dict.fromkeys(row.runtime for row in report.rows))
    known = all(row.accuracy is not None for row in report.rows)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.8 * columns, 1.0 + 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for panel, ((batch, threads), group) in zip(panels, groups.items(), strict=False):
        for name, row in group.items():
            time = row.milliseconds
            height = 100 * row.accuracy if known and row.accuracy is not None else names.index(name)
            panel.errorbar(
                time.median,
                height,
                xerr=[[time.median - time.lower], [time.upper - time.median]],
                fmt="o",
                color=_COLOURS[names.index(name) % len(_COLOURS)],
                label=name,
                capsize=3,
            )
        panel.set_title(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        _set_axes(panel, names, known, report.dense_accuracy)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    if known:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Latency on {report.machine.processor}, {100 * report.sparsity:.0f} % sparse")
    return figure


def _set_axes(panel: Axes, names: list[str], known: bool, dense_accuracy: float | None) -> None:
    panel.set_xlim(left=0)
    panel.set_xlabel("milliseconds a batch")
    panel.grid(color="#D9D9D9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if not known:
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        return
    panel.set_ylabel("accuracy (%)")
    if dense_accuracy is not None:
        panel.axhline(100 * dense_accuracy, color=GREY, linestyle="--", label=f"dense ({dense_accuracy:.2%})")
