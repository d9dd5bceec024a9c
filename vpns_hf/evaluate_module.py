"""Wrap a metric as a module of the `evaluate` library."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import datasets
import evaluate
import numpy as np

if TYPE_CHECKING:
    from .metrics import ClassificationMetric


class EvaluateModule(evaluate.Metric):
    """A metric of `vpns_hf.metrics` as an `evaluate.Metric`, kept in memory.

    Args:
        metric: the metric.
    """

    def __init__(self, metric: ClassificationMetric) -> None:
        self.metric = metric
        # Nothing is written, but evaluate makes its folder first, and the usual cache may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())
        self.info.module_name = metric.name

    def _info(self) -> evaluate.MetricInfo:
        takes_classes = self.metric.takes == "classes"
        one = datasets.Value("int64") if takes_classes else datasets.Sequence(datasets.Value("float32"))
        shape = "predicted classes [n]" if takes_classes else f"{self.metric.takes} [n, classes]"
        return evaluate.MetricInfo(
            description=self.metric.description,
            citation="",
            inputs_description=f"predictions: {shape}; references: true classes [n].",
            features=datasets.Features({"predictions": one, "references": datasets.Value("int64")}),
            # evaluate's own rule: rows of scores have no numpy format.
            format="numpy" if takes_classes else None,
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {self.metric.name: self.metric.measure(np.asarray(predictions), np.asarray(references))}
