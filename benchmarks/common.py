"""What the benchmarks share: runs that take turns, the machine's name, and the table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from vpns_hf.report import markdown_table

logging.disable_progress_bar()

RESULTS = Path(__file__).parent / "results"


def take_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, each called once to warm up and then once in every one of `repeats` rounds.

    Taking turns spreads what else the machine does over all of them.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_cells(seconds: Sequence[float], reference: Sequence[float]) -> tuple[str, str]:
    """Median of the ratios of each round, and their smallest and largest."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    return f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"


def machine() -> str:
    """Processor, threads and versions."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return (
        f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def write_table(name: str, about: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the table and write it to `results/<name>.md`, with what it is and the machine it was measured on.

    Args:
        name: of the benchmark.
        about: its module's docstring.
        columns, rows: the table.
    """
    table = markdown_table(columns, rows)
    print(table, flush=True)
    RESULTS.mkdir(exist_ok=True)
    text = f"# {name}\n\n{about.strip()}\n\nMeasured on: {machine()}.\n\n{table}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
