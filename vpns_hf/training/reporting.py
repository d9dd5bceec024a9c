"""Make metrics of any `compute_metrics` loggable and storable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor


def loggable(value: Any) -> Any:
    """Return a value that JSON can hold: arrays and tensors as lists, other objects as text."""
    if isinstance(value, Mapping):
        return {str(name): loggable(entry) for name, entry in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [loggable(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among metrics, which a run records; nested ones are named `outer_inner`."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        value = loggable(value)
        if isinstance(value, dict):
            found |= numbers({f"{name}_{inner}": entry for inner, entry in value.items()})
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = value
    return found
