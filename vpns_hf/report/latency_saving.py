"""Keep measured latency beside the model, where its card shows it and a push publishes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..hub import BEGIN, CARD_NAME, LATENCY_FIGURE, LATENCY_REPORT
from ..latency import LatencyReport
from ..saved_files import MAX_CARD, read_text
from .latency import with_latency
from .latency_figure import plot_latency
from .model_card import SubnetworkCard

FACTS = "card.json"


def save_latency(report: LatencyReport, folder: Path) -> None:
    """Write `latency.json`, the figure, and the section "Latency" of the model card where there is one.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the card or its facts are damaged.
    """
    card, facts = folder / CARD_NAME, _facts(folder)
    text = read_text(card, MAX_CARD) if card.is_file() else ""
    (folder / LATENCY_REPORT).write_text(report.to_json(), encoding="utf-8")
    plot_latency(report, folder / LATENCY_FIGURE)
    if facts is not None:
        (folder / FACTS).write_text(replace(facts, latency=report).to_json(), encoding="utf-8")
    if BEGIN in text:
        card.write_text(with_latency(text, report), encoding="utf-8")


def dense_accuracy(folder: Path) -> float | None:
    """Return the accuracy of the dense model that the facts of the card state; None where they do not.

    Raises:
        ValueError: the facts are damaged.
    """
    facts = _facts(folder)
    return next((result.accuracy for result in facts.results if result.sparsity == 0), None) if facts else None


def _facts(folder: Path) -> SubnetworkCard | None:
    """Read the facts of the card, which only the folder of a run holds."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        return SubnetworkCard.from_json(read_text(path, 2**24))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold the facts of a model card ({type(error).__name__}: {error})."
        ) from None
