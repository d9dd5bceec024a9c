"""Times of several ways to compute one thing, taken in turns, and the machine that they are of."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

Measure = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]
"""Gives the milliseconds of each named action; see [`median_milliseconds`]."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measured values."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Compute them; quartiles are interpolated between the two values around them."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def time_in_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 2,
    between: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time every action in turns; a machine that slows down for a while then slows down all of them.

    Args:
        actions: what to time, by name.
        rounds: calls of each action.
        clock: gives seconds; `time.process_time` leaves out waiting on a busy machine, and adds up threads.
        warm_up: rounds before these that do not count.
        between: called before each action, outside of its time, such as `gc.collect`.

    Returns:
        Seconds of each round by the name of the action.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            if between is not None:
                between()
            start = clock()
            result = action()
            elapsed = clock() - start
            # Freed before the next one starts, outside of the time.
            del result
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def median_milliseconds(
    actions: Mapping[str, Callable[[], object]], rounds: int = 11, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median time of each action in milliseconds; arguments as of [`time_in_turns`]."""
    return {name: 1000 * statistics.median(samples) for name, samples in time_in_turns(actions, rounds, clock).items()}


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Divide the time of each round by that of the reference in the same round."""
    return [one / other for one, other in zip(seconds, reference, strict=True)]


def processor_name() -> str:
    """Name the processor as its maker does, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def resident_bytes(field: str) -> int | None:
    """Read a figure of this process's resident memory; None where the system does not tell.

    Args:
        field: of Linux' `/proc/self/status`: `"VmRSS"` for what it is now, `"VmHWM"` for its peak.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else None
