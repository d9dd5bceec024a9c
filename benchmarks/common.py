"""What the benchmarks share: callables timed in turns, the machine in one line, Markdown tables."""

from __future__ import annotations

import functools
import gc
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from vpns_hf.inference import measuring
from vpns_hf.report.tables import markdown_table

logging.disable_progress_bar()


# A step of training leaves cycles that hold its graph.
time_in_turns = functools.partial(measuring.time_in_turns, warm_up=1, between=gc.collect)


def machine() -> str:
    """Processor, threads and versions, and how busy the machine is with other work."""
    return (
        f"{measuring.processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; load average {os.getloadavg()[0]:.1f}"
    )


def ratio_cells(seconds: Sequence[float], reference: Sequence[float]) -> tuple[str, str]:
    """Median of the ratios of each round, and their smallest and largest."""
    ratios = measuring.ratios(seconds, reference)
    return f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return markdown_table(head, [[str(cell) for cell in row] for row in rows])


def write_results(name: str, sections: Sequence[str]) -> None:
    """Print the sections of a report and write them to `benchmarks/results/<name>.md`."""
    text = "\n\n".join(sections) + "\n"
    print(text)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def write_table(name: str, about: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a report of one table.

    Args:
        name: of the benchmark.
        about: its module's docstring.
        head, rows: the table.
    """
    write_results(name, [f"# {name.capitalize()}", about.strip(), f"Machine: {machine()}.", table(head, rows)])
