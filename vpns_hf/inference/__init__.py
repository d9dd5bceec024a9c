"""Fast inference of pruned models: sparse kernels where measured faster on a CPU, and 2:4 on a GPU's tensor cores."""

from .fast_model import FastModel, build_fast_model
from .kernels import KERNELS
from .measuring import Measure, Spread, median_milliseconds, processor_name, ratios, resident_bytes, time_in_turns
from .report import InferenceReport, LayerChoice
from .semi_structured import semi_structured_layers, to_semi_structured

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
    "semi_structured_layers",
    "time_in_turns",
    "to_semi_structured",
]
