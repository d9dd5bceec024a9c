"""Say how fast a model is: a table, and in sentences where it is not faster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..hub import BEGIN, END, LATENCY_FIGURE
from ..inference import Spread
from ..latency import Latency, LatencyReport
from ..latency.measured import INT8, SPARSE
from .tables import MISSING, TerminalTable, file_size, markdown_table, milliseconds, percent

_HEADING = "## Latency"
_COLUMNS = (
    "runtime",
    "batch",
    "threads",
    "ms",
    "quartiles",
    "images/s",
    "speed-up",
    "file",
    "memory",
    "accuracy",
)


def latency_table(report: LatencyReport) -> TerminalTable:
    """Format the measured times for the terminal, one row for each runtime, batch size and number of threads.

    Times are medians with quartiles. "speed-up" is the median of the ratios to dense torch in the same round.
    """
    return TerminalTable(_COLUMNS, list(_rows(report)), "Latency")


def latency_markdown(report: LatencyReport) -> str:
    """Format the table of [`latency_table`] in Markdown, without a newline at its end."""
    return markdown_table(_COLUMNS, _rows(report))


def _rows(report: LatencyReport) -> Iterator[tuple[str, ...]]:
    for row in report.rows:
        time, speedup = row.milliseconds, report.speedup(row)
        yield (
            row.runtime,
            str(row.batch),
            str(row.threads),
            milliseconds(time.median),
            f"{milliseconds(time.lower)}-{milliseconds(time.upper)}",
            f"{row.images_per_second:,.1f}",
            MISSING if speedup is None else f"{speedup.median:.2f}",
            file_size(row.file_bytes),
            file_size(row.memory_bytes),
            percent(row.accuracy),
        )


def latency_notes(report: LatencyReport) -> list[str]:
    """Write the sentences that belong to the table: the machine, where the model is not faster, what is left out."""
    machine = report.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    load = "" if machine.load is None else f", load average {machine.load}"
    height, width = report.image_size
    notes = [
        f"Measured on {machine.processor}, {machine.cores} cores{load}, {packages}; images of {height} x {width} "
        "pixels, float32. Times of a batch are medians; the speed-up over dense torch is taken round by round, and "
        "faster means faster in three quarters of the rounds.",
        *_comparisons(report),
        "Every runtime but sparse computes with dense kernels, which take the same time for pruned and for dense "
        "weights: their rows hold for the dense model, too.",
    ]
    if kernels := dict.fromkeys(f"{_conditions(row)}: {row.note}" for row in report.rows if row.note):
        notes.append(f"Sparse kernels: {'; '.join(kernels)}.")
    if report.int8 is not None:
        ranges = "fixed from calibration images" if report.int8 == "static" else "found for each input"
        notes.append(f"{INT8} is {report.int8}: weights are int8, and the ranges of activations are {ranges}.")
    if report.accuracy_of is not None:
        notes.append(f"Accuracy: {report.accuracy_of}.")
    if report.left_out:
        notes.append(f"Not measured: {'; '.join(f'{name}, {why}' for name, why in report.left_out.items())}.")
    return notes


def _comparisons(report: LatencyReport) -> Iterator[str]:
    """Compare sparse kernels with each runtime of the dense model in float32."""
    groups = report.groups()
    others = dict.fromkeys(row.runtime for row in report.rows if row.runtime not in (SPARSE, INT8))
    for other in others:
        speedups = {
            _conditions(group[SPARSE]): report.speedup(group[SPARSE], other)
            for group in groups.values()
            if SPARSE in group
        }
        measured = {where: speedup for where, speedup in speedups.items() if speedup is not None}
        if measured:
            yield _comparison(other, measured)


def _comparison(other: str, speedups: dict[str, Spread]) -> str:
    """Call a model faster only where three quarters of the rounds say so."""
    faster = {where: speedup for where, speedup in speedups.items() if speedup.lower > 1}
    slower = {where: speedup for where, speedup in speedups.items() if where not in faster}
    said = []
    if faster:
        said.append(f"faster than the dense one in {other} with {_listed(faster)}")
    if slower:
        said.append(f"NOT faster than the dense one in {other} with {_listed(slower)}")
    return f"In sparse kernels the pruned model is {', and '.join(said)}."


def _listed(speedups: dict[str, Spread]) -> str:
    return "; ".join(
        f"{where} ({speedup.median:.2f} times as fast, quartiles {speedup.lower:.2f} to {speedup.upper:.2f})"
        for where, speedup in speedups.items()
    )


def _conditions(row: Latency) -> str:
    return f"batch {row.batch} and {row.threads} thread{'s' * (row.threads > 1)}"


def latency_section(report: LatencyReport) -> str:
    """Write the section "Latency" of a model card, without a newline at its end."""
    notes = "\n".join(f"- {note}" for note in latency_notes(report))
    return f"{_HEADING}\n\n{latency_markdown(report)}\n\n{notes}\n\n![Latency]({LATENCY_FIGURE})"


def with_latency(card: str, report: LatencyReport) -> str:
    """Put the section "Latency" into the generated part of a card, in place of an earlier one.

    Args:
        card: text of the card, with its metadata.
        report: what was measured.

    Raises:
        ValueError: the card has no generated part.
    """
    before, begin, rest = card.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"The model card has no part between {BEGIN} and {END}, so latency cannot be added to it.")
    sections = re.split(r"^(?=## )", generated, flags=re.MULTILINE)
    kept = [section for section in sections if not section.startswith(f"{_HEADING}\n")]
    place = next((index for index, section in enumerate(kept) if section.startswith("## Limits\n")), len(kept))
    kept.insert(place, f"{latency_section(report)}\n\n")
    return before + begin + "".join(kept) + end + after
