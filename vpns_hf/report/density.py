"""Plot the density of every layer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..model.sparsity import SparsityReport, block_name
from .style import BLUE, SKY, VERMILLION, save_figure
from .tables import percent

_MAX_LABELLED_LAYERS = 40
# Below this share of the longest bar a bar cannot be seen on a linear axis.
_SHORTEST_LINEAR_BAR = 0.05


def plot_density(report: SparsityReport, path: str | os.PathLike[str]) -> None:
    """Save [`density_figure`] as a PNG, with the same arguments.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(density_figure(report), path)


def density_figure(report: SparsityReport) -> Figure:
    """Plot the share of weights kept in each layer as horizontal bars in network order, in percent.

    The shade changes from block to block. Up to 40 layers are named one by one, more are named by block. The axis is
    logarithmic where a bar would be too short to see. A layer without any weight left is marked by a cross.
    """
    count, named = len(report.layers), len(report.layers) <= _MAX_LABELLED_LAYERS
    figure = Figure(figsize=(9, 1.8 + 0.27 * count if named else min(max(8, 0.065 * count), 20)), layout="constrained")
    axes = figure.add_subplot()
    densities = [100 * layer.kept / layer.total for layer in report.layers]
    axes.barh(range(count), densities, height=0.8 if named else 0.9, color=_block_colours(report), linewidth=0)
    _scale_density(axes, densities)
    if named:
        _name_layers(axes, report)
    else:
        _name_blocks(axes, report, apart=0.19 * count / figure.get_figheight())
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_ylabel("layers in network order, shaded by block")
    axes.spines[["top", "right"]].set_visible(False)
    _mark_empty_layers(figure, axes, densities)
    _mark_overall(axes, report)
    facts = f"{percent(report.sparsity)} sparse overall: {report.kept:,} of {report.total:,} weights kept"
    figure.suptitle(f"Weights kept in each layer\n{facts}")
    return figure


def _block_runs(report: SparsityReport) -> Iterator[tuple[str, list[int]]]:
    """Yield runs of neighbouring layers of one block: the block's name and the layers' positions."""
    for name, run in groupby(enumerate(report.layers), key=lambda item: block_name(item[1].name)):
        yield name, [index for index, _ in run]


def _block_colours(report: SparsityReport) -> list[str]:
    runs = enumerate(_block_runs(report))
    return [(BLUE, SKY)[number % 2] for number, (_, positions) in runs for _ in positions]


def _scale_density(axes: Axes, densities: Sequence[float]) -> None:
    longest, shortest = max(densities), min((density for density in densities if density), default=0)
    if shortest < _SHORTEST_LINEAR_BAR * longest:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 2, longest * 1.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("weights kept (%, logarithmic scale)")
    else:
        axes.set_xlim(0, longest * 1.04 or 1)
        axes.set_xlabel("weights kept (%)")
    axes.grid(axis="x", color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)


def _name_layers(axes: Axes, report: SparsityReport) -> None:
    axes.set_yticks(range(len(report.layers)), _short_names([layer.name for layer in report.layers]), fontsize=9)
    axes.tick_params(axis="y", length=0)
    for index, layer in enumerate(report.layers):
        value = percent(layer.kept / layer.total)
        axes.annotate(
            value,
            xy=(1, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(50, 0),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            fontsize=9,
        )


def _name_blocks(axes: Axes, report: SparsityReport, apart: float) -> None:
    """Name as many blocks as fit at a distance of `apart` layers, those of many layers first."""
    runs = list(_block_runs(report))
    names = _short_names([name for name, _ in runs])
    named: dict[float, str] = {}
    for (_, positions), name in sorted(zip(runs, names, strict=True), key=lambda item: -len(item[0][1])):
        centre = (positions[0] + positions[-1]) / 2
        if all(abs(centre - other) >= apart for other in named):
            named[centre] = name
    axes.set_yticks(list(named), list(named.values()), fontsize=9)


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten names to distinctive parts: `vit.layers.0.attention.q_proj.weight` becomes `layers.0.q_proj`.

    Kept are numbers, the word before a number and the last part, or the last two parts where there is no number. Names
    that would then be the same keep all their parts but those in front that most names share and `weight` at the end.
    """
    parts = _without_model([name.removesuffix(".weight").split(".") for name in names])
    short = [_shortened(part) for part in parts]
    uses = Counter(short)
    return [name if uses[name] == 1 else ".".join(part) for name, part in zip(short, parts, strict=True)]


def _without_model(names: list[list[str]]) -> list[list[str]]:
    """Drop the parts in front that most names share, up to the word before a number."""
    first, uses = Counter(parts[0] for parts in names).most_common(1)[0]
    inside = [parts[1] if len(parts) > 1 else "0" for parts in names if parts[0] == first]
    if uses <= len(names) / 2 or any(part.isdigit() for part in inside):
        return names
    return _without_model([parts[1:] if parts[0] == first else parts for parts in names])


def _shortened(parts: Sequence[str]) -> str:
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return ".".join(parts[-2:])
    kept = {*numbers, *(index - 1 for index in numbers), len(parts) - 1}
    return ".".join(part for index, part in enumerate(parts) if index in kept)


def _mark_empty_layers(figure: Figure, axes: Axes, densities: Sequence[float]) -> None:
    empty = [index for index, density in enumerate(densities) if density == 0]
    if not empty:
        return
    label = f"no weight left ({len(empty)} of {len(densities)} layers)"
    crosses = axes.plot([0.012] * len(empty), empty, "x", transform=axes.get_yaxis_transform(), label=label)[0]
    crosses.set(color=VERMILLION, markersize=6, markeredgewidth=1.6, clip_on=False)
    figure.legend(loc="outside lower right", frameon=False)


def _mark_overall(axes: Axes, report: SparsityReport) -> None:
    density = report.kept / report.total
    if not density:
        return
    axes.axvline(100 * density, color="black", linestyle="--", linewidth=1.2)
    label, transform = f"overall {percent(density)}", axes.get_xaxis_transform()
    axes.text(100 * density, 1.005, label, transform=transform, ha="center", va="bottom")
