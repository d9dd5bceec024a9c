"""Show a subnetwork and its accuracy in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..latency import LatencyReport
from ..report.latency import latency_notes, latency_table
from ..report.tables import TerminalTable, percent
from ..saved_files import printable
from .inspection import StoredSubnetwork


def show_subnetwork(found: StoredSubnetwork) -> None:
    """Print a table of the masked weights, and below it the other facts of a subnetwork."""
    console = Console()
    layers = [
        (layer.name, f"{layer.kept:,}", f"{layer.total:,}", percent(layer.sparsity), f"{layer.bytes:,}", layer.coding)
        for layer in found.layers
    ]
    if layers:
        columns = ("weight", "kept", "total", "sparsity", "bytes", "mask")
        console.print(TerminalTable(columns, _printable(layers)))
    facts = Table.grid("name", "value", padding=(0, 2))
    for name, value in _printable([(name, _in_words(value)) for name, value in _facts(found).items()]):
        facts.add_row(escape(name), escape(value))
    console.print(facts)


def show_accuracies(data: str, images: int, accuracies: Iterable[float | None]) -> None:
    """Print one row: the data, the number of images, and the accuracies without and with the prompt."""
    row = (data, f"{images:,}", *map(percent, accuracies))
    Console().print(TerminalTable(("data", "images", "accuracy", "accuracy with prompt"), _printable([row])))


def show_latency(report: LatencyReport) -> None:
    """Print the table of times, and below it where the model is not faster and what was left out."""
    console = Console()
    console.print(latency_table(report))
    for note in latency_notes(report):
        console.print(escape(printable(note, 2000)))


def _facts(found: StoredSubnetwork) -> dict[str, Any]:
    """List the facts below the table of weights."""
    return {
        "backbone": found.backbone,
        "state": found.state,
        "classes": found.num_labels,
        "pattern": found.pattern,
        "label mapping": found.label_mapping,
        "sparsity": f"{percent(found.sparsity)} ({found.kept:,} of {found.total:,} weights kept)",
        "prompt": found.prompt and {name: value for name, value in found.prompt.items() if value is not None},
        **{name: f"{size:,} bytes" for name, size in found.files.items()},
        **found.provenance,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _printable(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Cut the cells to a line, without the characters by which a stranger's file could steer the terminal."""
    return [tuple(printable(cell) for cell in row) for row in rows]
