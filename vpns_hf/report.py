"""What a run has shown, as tables and pictures.

Each picture has a function that draws it and returns the matplotlib `Figure`, and one that saves it as a PNG.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter
from rich import box
from rich.markup import escape
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from torch import Tensor

from .modeling import PromptedSparseModel
from .prompts import VisualPrompt
from .sparsity import LayerSparsity, SparsityReport, block_name

MISSING = "–"  # noqa: RUF001

# Okabe and Ito's colours, which colour-blind readers tell apart.
_BLUE, _SKY, _VERMILLION, _GREEN, _PURPLE, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#B0578D", "#6E6E6E"
_DPI = 150


# Numbers as text -----------------------------------------------------------------------------------------------------


def percent(fraction: float | None) -> str:
    """A percentage with two digits that only says 0 or 100 where it is exactly that."""
    if fraction is None:
        return MISSING
    if 0 < fraction < 0.00005:
        return "<0.01%"
    return ">99.99%" if 0.99995 <= fraction < 1 else f"{fraction:.2%}"


def _file_size(size: int | None) -> str:
    """Bytes in decimal units, as the Hub shows them."""
    if size is None:
        return MISSING
    if size < 1000:
        return f"{size} B"
    value, units = size / 1000, iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.95 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


# Results -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One row of the table of results.

    Args:
        name: what was measured, such as "dense fine-tuned".
        sparsity: fraction of the prunable weights that are masked.
        accuracy: accuracy without the prompt, in [0, 1].
        accuracy_prompted: accuracy with the prompt, in [0, 1]; None where there is none.
        steps: optimizer steps that led to it.
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
    """Results for the terminal, one row each.

    Args:
        results: in the order to show. The share of dense accuracy is `accuracy` (without the prompt) divided by that
            of the first row whose sparsity is 0. Missing values are shown as an en dash.
        title: above the table; None for no title.
    """
    return terminal_table(_RESULT_COLUMNS, _result_rows(results), title)


def results_markdown(results: Sequence[Result]) -> str:
    """The same table in Markdown, without a title and without a newline at its end."""
    return markdown_table(_RESULT_COLUMNS, _result_rows(results))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table in Markdown whose first columns are text and the others numbers, without a newline at its end."""
    cells = [columns, *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * text_columns + "---:|" * (len(columns) - text_columns), *lines[1:]])


def terminal_table(columns: Sequence[str], rows: Iterable[tuple[str, ...]], title: str | None) -> Table:
    """A table for the terminal whose first column is text and the others numbers."""
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
    """Sparsity of every block for the terminal, and of all of them in the last row.

    Args:
        report: its blocks are shown under their own names, which `ignore_modules` understands. The share of
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


# Saving pictures -----------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, with the folders it needs; the file is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=_DPI)
    os.replace(temporary, path)


# Confusion of the classes --------------------------------------------------------------------------------------------

MAX_CONFUSION_CLASSES = 20


def plot_confusion(
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Save the picture of [`confusion_figure`], which has the same arguments and errors, as a PNG.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(confusion_figure(labels, predicted, names), path)


def confusion_figure(
    labels: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, names: Sequence[str]
) -> Figure:
    """Which classes are taken for which: rows are true classes, columns predicted ones, cells numbers of images.

    The shade is the share of the true class, so that classes of any size can be compared.

    Args:
        labels: true classes [n].
        predicted: predicted classes [n].
        names: of all classes, at most 20.

    Raises:
        ValueError: there are more.
    """
    count = len(names)
    if count > MAX_CONFUSION_CLASSES:
        raise ValueError(f"A confusion matrix of {count} classes cannot be read; at most {MAX_CONFUSION_CLASSES} are.")
    counts = confusion_matrix(labels, predicted, labels=range(count))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3 + 0.5 * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares, display_labels=list(names))
    display.plot(ax=axes, cmap="Blues", include_values=False, colorbar=False, im_kw={"vmin": 0, "vmax": 1})
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    axes.tick_params(axis="x", rotation=45)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set(xlabel="predicted class", ylabel="true class")
    bar = figure.colorbar(display.im_, ax=axes, label="share of the true class", fraction=0.046)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(f"{percent(float(np.trace(counts)) / max(counts.sum(), 1))} of {counts.sum():,} images are right")
    return figure


# Density per layer ---------------------------------------------------------------------------------------------------

_MAX_LABELLED_LAYERS = 40
# Below this share of the longest bar a bar cannot be seen on a linear axis.
_SHORTEST_LINEAR_BAR = 0.05


def plot_density(report: SparsityReport, path: str | os.PathLike[str]) -> None:
    """Save the picture of [`density_figure`], which has the same arguments, as a PNG.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(density_figure(report), path)


def density_figure(report: SparsityReport) -> Figure:
    """Share of weights kept in each layer, as horizontal bars in network order, in percent.

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
    """Neighbouring layers of one block: the block's name and the layers' positions."""
    for name, run in groupby(enumerate(report.layers), key=lambda item: block_name(item[1].name)):
        yield name, [index for index, _ in run]


def _block_colours(report: SparsityReport) -> list[str]:
    runs = enumerate(_block_runs(report))
    return [(_BLUE, _SKY)[number % 2] for number, (_, positions) in runs for _ in positions]


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
    """Names without the parts that tell nothing: `vit.layers.0.attention.q_proj.weight` becomes `layers.0.q_proj`.

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
    crosses.set(color=_VERMILLION, markersize=6, markeredgewidth=1.6, clip_on=False)
    figure.legend(loc="outside lower right", frameon=False)


def _mark_overall(axes: Axes, report: SparsityReport) -> None:
    density = report.kept / report.total
    if not density:
        return
    axes.axvline(100 * density, color="black", linestyle="--", linewidth=1.2)
    label, transform = f"overall {percent(density)}", axes.get_xaxis_transform()
    axes.text(100 * density, 1.005, label, transform=transform, ha="center", va="bottom")


# The prompt ----------------------------------------------------------------------------------------------------------


def plot_prompt(
    model: PromptedSparseModel, image: Tensor, path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Save the picture of [`prompt_figure`], which has the same arguments and errors, as a PNG.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(prompt_figure(model, image, title), path)


@torch.no_grad()
def prompt_figure(model: PromptedSparseModel, image: Tensor, title: str | None = None) -> Figure:
    """An image, the prompt that is added to it, and what the model sees.

    The image is shown as the prompt places it. The prompt is shown around mid-grey, which stands for no change:
    brighter and darker than that, in every colour channel, is what it adds and takes away.

    Args:
        model: a model with a prompt.
        image: one normalised image, [channels, height, width] with one or three channels.
        title: replaces the default title.

    Raises:
        ValueError: there is no prompt, or the image does not fit it.
    """
    # A copy in evaluation mode, so that a prompt that draws its place shows the same one in every panel.
    prompt = copy.deepcopy(_prompt_of(model, image)).eval()
    delta = prompt.delta().float()
    image = image.to(delta.device).float()
    placed = prompt.place(_pixels(prompt, image)[None])[0]
    prompted = _pixels(prompt, prompt(image[None])[0])
    height, width = prompt.image_size
    figure = Figure(figsize=(12, 1.6 + 3.8 * height / width), layout="constrained")
    panels = figure.subplots(1, 3, gridspec_kw={"wspace": 0.05})
    _show(panels[0], placed, _image_caption(prompt))
    _show_delta(figure, panels[1], 255 * delta)
    _show(panels[2], prompted, "image + prompt, cut off at black and white:\nwhat the model sees")
    figure.suptitle(title or "The learned visual prompt on one image")
    return figure


def _prompt_of(model: PromptedSparseModel, image: Tensor) -> VisualPrompt:
    prompt = model.prompt
    if prompt is None:
        raise ValueError('This model has no prompt to show; build it with `prompt="pad"`.')
    channels = len(prompt.mean)
    if channels not in (1, 3):
        raise ValueError(f"Images of one or three channels can be shown; this model's have {channels}.")
    if tuple(image.shape) != (expected := (channels, *prompt.image_size)):
        raise ValueError(f"`image` has shape {tuple(image.shape)}; expected {expected}: channels, height, width.")
    return prompt


def _pixels(prompt: VisualPrompt, image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (prompt.mean, prompt.std))
    return (image * std + mean).clamp(0, 1)


def _image_caption(prompt: VisualPrompt) -> str:
    if prompt.inner_size == prompt.image_size:
        return "image"
    height, width = prompt.inner_size
    return f"image, shrunk to {width} x {height} pixels\nand centred on black"


def _show(panel: Axes, pixels: Tensor, caption: str) -> None:
    """Show [1 or 3, h, w] values in [0, 1], pixel by pixel."""
    panel.imshow(pixels.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
    panel.set_title(caption, fontsize=11)
    panel.set(xticks=[], yticks=[])


def _show_delta(figure: Figure, panel: Axes, delta: Tensor) -> None:
    """Show [1 or 3, h, w] changes in units of 1/255 around mid-grey, with a colour bar below."""
    largest = delta.abs().max().item()
    bound = largest or 1
    caption = f"learned prompt, largest change {largest:.3g}/255\n(mid-grey: no change)"
    _show(panel, (delta / bound + 1) / 2, caption)
    strip = panel.inset_axes((0.0, -0.09, 1.0, 0.045))
    bar = figure.colorbar(ScalarMappable(Normalize(-bound, bound), "gray"), cax=strip, orientation="horizontal")
    bar.locator = MaxNLocator(5, symmetric=True)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0")
    bar.set_label(("added to each colour channel" if delta.shape[0] == 3 else "added to each pixel") + ", in 1/255")


# Training ------------------------------------------------------------------------------------------------------------

Logs = Sequence[Mapping[str, float]]


def plot_training(
    stages: Mapping[str, Logs], path: str | os.PathLike[str], dense: Mapping[str, float] | None = None
) -> None:
    """Save the picture of [`training_figure`], which has the same arguments, as a PNG.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(training_figure(stages, dense), path)


def training_figure(stages: Mapping[str, Logs], dense: Mapping[str, float] | None = None) -> Figure:
    """Validation accuracy, training loss and mask changes over the optimizer steps of all stages, one after the other.

    Args:
        stages: `log_history` of each stage's `TrainerState` by its name, in order; each counts its steps from 0. Read
            are `step`, `eval_accuracy`, `eval_accuracy_prompted`, `loss`, `sparsity` and `mask_flips`. What was not
            logged is left out.
        dense: accuracies in [0, 1] to compare with by their names, drawn as grey lines.
    """
    regions = _regions(stages)
    flips = _series(regions, "mask_flips")
    figure = Figure(figsize=(9, 8 if flips.steps else 6.5), layout="constrained")
    ratios = (3, 2, 1.3) if flips.steps else (3, 2)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    _draw_accuracy(panels[0], regions, dense or {})
    _draw_series(panels[1], _series(regions, "loss"), _GREEN, "training loss", "no training loss was logged")
    if flips.steps:
        _draw_series(panels[2], flips, _PURPLE, "mask entries\nchanged per log", "")
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
        ("eval_accuracy", "without prompt", _BLUE, "o"),
        ("eval_accuracy_prompted", "with prompt", _VERMILLION, "s"),
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
        panel.axhline(accuracy, color=_GREY, linestyle=style, linewidth=1.5, zorder=1.5, label=label)
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


def say(panel: Axes, message: str) -> None:
    """Write a sentence into a panel that has nothing to show."""
    panel.text(0.5, 0.5, message, transform=panel.transAxes, ha="center", va="center", color=_GREY)
    panel.set_yticks([])


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
