"""What the benchmarks share: callables timed in turns, the machine in one line, Markdown tables."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from vpns_hf.report.tables import markdown_table

logging.disable_progress_bar()


def time_in_turns(
    actions: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every action, taken in turns after one call each that does not count.

    A machine that slows down for a while then slows down all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            gc.collect()
            start = clock()
            result = action()
            elapsed = clock() - start
            # Freed before the next one starts, outside of the time.
            del result
            if repeat:
                samples[name].append(elapsed)
    return samples


def machine() -> str:
    """Processor, threads and versions, and how busy the machine is with other work."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; load average {os.getloadavg()[0]:.1f}"
    )


def ratio_cells(seconds: Sequence[float], reference: Sequence[float]) -> tuple[str, str]:
    """Median of the ratios of each round, and their smallest and largest."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
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
