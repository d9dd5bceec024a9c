"""Fast inference of pruned models on a CPU: sparse kernels where they are measured to be faster."""

from .fast_model import FastModel, build_fast_model
from .kernels import KERNELS
from .measuring import Measure, median_milliseconds
from .report import InferenceReport, LayerChoice

__all__ = [
    "KERNELS",
    "FastModel",
    "InferenceReport",
    "LayerChoice",
    "Measure",
    "build_fast_model",
    "median_milliseconds",
]
