"""Plot loss, accuracy and density over the steps of all stages."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from .style import BLUE, GREEN, GREY, PURPLE, VERMILLION, save_figure, say
from .tables import percent

Logs = Sequence[Mapping[str, float]]


def plot_training(
    stages: Mapping[str, Logs], path: str | os.PathLike[str], dense: Mapping[str, float] | None = None
) -> None:
    """Save [`training_figure`] as a PNG, with the same arguments.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(training_figure(stages, dense), path)


def training_figure(stages: Mapping[str, Logs], dense: Mapping[str, float] | None = None) -> Figure:
    """Plot validation accuracy, training loss and mask changes over the optimizer steps of all stages in sequence.

    Args:
        stages: `log_history` of each stage's `TrainerState` by its name, in order; each counts its steps from 0. Read
            are `step`, `eval_accuracy`, `eval_accuracy_prompted`, `loss`, `sparsity` and `mask_flips`; a series that
            was not logged is left out.
        dense: accuracies in [0, 1] to compare with by their names, drawn as grey lines.
    """
    regions = _regions(stages)
    flips = _series(regions, "mask_flips")
    figure = Figure(figsize=(9, 8 if flips.steps else 6.5), layout="constrained")
    ratios = (3, 2, 1.3) if flips.steps else (3, 2)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    _draw_accuracy(panels[0], regions, dense or {})
    _draw_series(panels[1], _series(regions, "loss"), GREEN, "training loss", "no training loss was logged")
    if flips.steps:
        _draw_series(panels[2], flips, PURPLE, "mask entries\nchanged per log", "")
        panels[2].yaxis.set_major_formatter(EngFormatter(sep=""))
        panels[2].set_ylim(bottom=0)
    for panel in panels:
        _shade_stages(panel, regions)
    _name_stages(panels[0], regions)
    panels[-1].set_xlabel("optimizer steps, all stages together")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.suptitle("Validation accuracy and training loss over the run")
    if panels[0].get_lines():
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.align_ylabels()
    return figure


@dataclass(frozen=True)
class _Region:
    """A stage on the common axis: its logs, and the steps at which it starts and ends."""

    name: str
    logs: Logs
    start: float
    end: float


@dataclass(frozen=True)
class _Series:
    """Values over the common axis; a NaN lies between two stages, so that no line joins them."""

    steps: list[float]
    values: list[float]


def _regions(stages: Mapping[str, Logs]) -> list[_Region]:
    regions: list[_Region] = []
    for name, logs in stages.items():
        start = regions[-1].end if regions else 0
        regions.append(_Region(name, logs, start, start + max((entry["step"] for entry in logs), default=0)))
    return regions


def _series(regions: Sequence[_Region], key: str) -> _Series:
    steps: list[float] = []
    values: list[float] = []
    for region in regions:
        entries = [entry for entry in region.logs if key in entry]
        if entries and steps:
            steps.append(math.nan)
            values.append(math.nan)
        steps += [region.start + entry["step"] for entry in entries]
        values += [entry[key] for entry in entries]
    return _Series(steps, values)


def _draw_accuracy(panel: Axes, regions: Sequence[_Region], dense: Mapping[str, float]) -> None:
    for key, name, colour, marker in (
        ("eval_accuracy", "without prompt", BLUE, "o"),
        ("eval_accuracy_prompted", "with prompt", VERMILLION, "s"),
    ):
        series = _series(regions, key)
        if series.steps:
            label = f"{name} (last: {percent(series.values[-1])})"
            panel.plot(
                series.steps,
                series.values,
                color=colour,
                marker=marker,
                markersize=1 + _marker_size(series),
                label=label,
            )
    if not panel.get_lines():
        say(panel, "no evaluation was logged")
    for (name, accuracy), style in zip(dense.items(), cycle(("--", "-.", ":")), strict=False):
        label = f"{name} ({percent(accuracy)})"
        panel.axhline(accuracy, color=GREY, linestyle=style, linewidth=1.5, zorder=1.5, label=label)
    panel.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    panel.set_ylabel("validation accuracy (%)")


def _marker_size(series: _Series) -> float:
    return 4 if len(series.steps) < 20 else 2


def _draw_series(panel: Axes, series: _Series, colour: str, label: str, otherwise: str) -> None:
    panel.set_ylabel(label)
    if series.steps:
        panel.plot(
            series.steps, series.values, color=colour, marker="o", markersize=_marker_size(series), linewidth=1.2
        )
    else:
        say(panel, otherwise)


def _shade_stages(panel: Axes, regions: Sequence[_Region]) -> None:
    """Give every stage that has steps a background of its own, and show all of them from first to last step."""
    shown = [region for region in regions if region.end > region.start]
    for region, shade in zip(shown, ("#F1F1F1", "#FFFFFF") * len(shown), strict=False):
        panel.axvspan(region.start, region.end, color=shade, linewidth=0, zorder=0)
    for region in shown[1:]:
        panel.axvline(region.start, color="#9A9A9A", linewidth=0.8, zorder=0.5, label="_stage")
    panel.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    last = regions[-1].end if regions else 0
    panel.set_xlim(-0.01 * (last or 1), 1.01 * (last or 1))


def _name_stages(panel: Axes, regions: Sequence[_Region]) -> None:
    last = regions[-1].end if regions else 0
    for region in regions:
        width = (region.end - region.start) / (last or 1)
        if not width:
            continue
        name = region.name.replace("_", " ")
        sparsities = [entry["sparsity"] for entry in region.logs if "sparsity" in entry]
        narrow = width < 0.15
        if sparsities and not narrow:
            name += f"\n{percent(sparsities[-1])} sparse" if sparsities[-1] else "\ndense"
        centre, transform = (region.start + region.end) / 2, panel.get_xaxis_transform()
        panel.text(centre, 1.02, name, transform=transform, ha="center", va="bottom", rotation=90 if narrow else 0)
