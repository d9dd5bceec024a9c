"""Metrics, as `evaluate` modules that need neither a network nor a cache folder."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Share of predicted classes that are right: `Accuracy().compute(predictions=[...], references=[...])`.

    The same metric as `evaluate.load("accuracy")`, which would have to be downloaded.
    """

    def __init__(self) -> None:
        # Nothing is written, but evaluate makes its folder first, and the usual cache may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predicted classes that are right.",
            citation="",
            inputs_description="predictions: predicted classes; references: true classes.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def compute_accuracy(eval_prediction: EvalPrediction) -> dict[str, Any]:
    """Accuracy for `Trainer(compute_metrics=...)`.

    Args:
        eval_prediction: logits [n, classes] (or a tuple that starts with them) and true classes [n], or class
            probabilities [n, classes], of which the largest counts.

    Returns:
        `{"accuracy": share of images whose largest logit is the true class}`.
    """
    logits, labels = eval_prediction.predictions, eval_prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = np.argmax(labels, axis=-1) if labels.ndim == 2 else labels
    return Accuracy().compute(predictions=np.argmax(logits, axis=-1), references=labels)
