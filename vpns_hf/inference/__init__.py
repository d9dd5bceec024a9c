"""Fast inference of pruned models: sparse kernels where measured faster on a CPU, and 2:4 on a GPU's tensor cores."""

from .fast_model import FastModel, build_fast_model
from .kernels import KERNELS
from .measuring import Measure, median_milliseconds
from .report import InferenceReport, LayerChoice
from .semi_structured import semi_structured_layers, to_semi_structured

__all__ = [
    "KERNELS",
    "FastModel",
    "InferenceReport",
    "LayerChoice",
    "Measure",
    "build_fast_model",
    "median_milliseconds",
    "semi_structured_layers",
    "to_semi_structured",
]
