"""Plot the confusion matrix of a classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from .style import save_figure
from .tables import percent

MAX_CONFUSION_CLASSES = 20


def plot_confusion(
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Save [`confusion_figure`] as a PNG, with the same arguments and errors.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(confusion_figure(labels, predicted, names), path)


def confusion_figure(
    labels: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, names: Sequence[str]
) -> Figure:
    """Plot the confusion matrix: rows are true classes, columns predicted ones, cells numbers of images.

    The shade is the share of the true class, so that classes of any size can be compared.

    Args:
        labels: true classes [n].
        predicted: predicted classes [n].
        names: names of all classes, at most 20.

    Raises:
        ValueError: there are more than 20 classes.
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
