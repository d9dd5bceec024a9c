"""Fast inference of pruned models on a CPU: sparse kernels where they are measured to be faster."""

from .fast_model import FastModel, build_fast_model
from .kernels import KERNELS
from .measuring import Measure, Spread, median_milliseconds, processor_name, ratios, resident_bytes, time_in_turns
from .report import InferenceReport, LayerChoice

__all__ = [
    "KERNELS",
    "FastModel",
    "InferenceReport",
    "LayerChoice",
    "Measure",
    "Spread",
    "build_fast_model",
    "median_milliseconds",
    "processor_name",
    "ratios",
    "resident_bytes",
    "time_in_turns",
]
