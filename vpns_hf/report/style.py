"""Share colours, resolution and saving between the figures."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, SKY, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#B0578D", "#6E6E6E"
_DPI = 150


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, with the folders it needs; the file is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=_DPI)
    os.replace(temporary, path)


def say(panel: Axes, message: str) -> None:
    """Write a sentence into a panel that has nothing to show."""
    panel.text(0.5, 0.5, message, transform=panel.transAxes, ha="center", va="center", color=GREY)
    panel.set_yticks([])
