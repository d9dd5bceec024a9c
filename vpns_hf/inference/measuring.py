"""Times of several ways to compute one thing, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Measure = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]
"""Gives the milliseconds of each named action; see [`median_milliseconds`]."""


def median_milliseconds(
    actions: Mapping[str, Callable[[], object]], rounds: int = 11, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median time of each action in milliseconds, taken in turns after two calls that do not count.

    A machine that slows down for a while then slows down all of them.

    Args:
        actions: what to time, by name.
        rounds: calls of each action.
        clock: gives seconds; `time.process_time` leaves out waiting on a busy machine, and adds up threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 2):
        for name, action in actions.items():
            start = clock()
            action()
            elapsed = clock() - start
            if turn >= 2:
                seconds[name].append(elapsed)
    return {name: 1000 * statistics.median(samples) for name, samples in seconds.items()}
